//! Tensors are mapped one by one and given back: a model's file never stands in memory beside its packed weights.
#![cfg(target_os = "linux")]
#![allow(missing_docs)]

mod common;

use common::{safetensors_of, scratch_folder, tiny_config, tiny_shapes};
use iceformer_engine::{LayerTensor, ModelFiles, TensorName};

const MIB: usize = 1 << 20;
const INTERMEDIATE: usize = MIB;

/// Bytes of this process that are in memory, mapped files counted.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[test]
fn pages_are_given_back() {
    let folder = scratch_folder("mapping");
    let mut shapes = tiny_shapes(64);
    for (name, shape) in &mut shapes {
        if name.contains("mlp") {
            shape.iter_mut().filter(|length| **length == 16).for_each(|length| *length = INTERMEDIATE);
        }
    }
    let mut config = tiny_config(64);
    config["intermediate_size"] = INTERMEDIATE.into();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("model.safetensors"), safetensors_of(&shapes)).unwrap();

    let files = ModelFiles::open(&folder).unwrap();
    let before = resident();
    for name in [LayerTensor::Gate, LayerTensor::Up, LayerTensor::Down] {
        let view = files.tensor(TensorName::Layer(0, name)).unwrap();
        let sum: f32 = (0..view.rows())
            .map(|row| {
                let bytes = view.row_bytes(row);
                bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes) / 8.0).sum::<f32>()
            })
            .sum();
        assert_eq!(sum, INTERMEDIATE as f32);
        let during = resident();
        assert!(during < before + 48 * MIB, "{} MiB more while a tensor of 32 MiB is read", (during - before) / MIB);
        drop(view);
        let after = resident();
        assert!(after < before + 8 * MIB, "{} MiB are still there", (after - before) / MIB);
    }
    std::fs::remove_dir_all(folder).unwrap();
}
