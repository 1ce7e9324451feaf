use std::path::PathBuf;

use super::*;
use crate::{Inputs, Shape};

const SHAPE: Shape = Shape { query_tokens: 5, key_tokens: 5, query_heads: 4, kv_heads: 2, key_dim: 3, value_dim: 2 };

fn description() -> Description {
    Description {
        scale: 0.25,
        causal: true,
        windows: vec![None, Some(7)],
        source: "a \"text\"\nof two lines".into(),
        model: "models/none".into(),
    }
}

fn inputs(layer: usize) -> Inputs {
    Inputs::new(crate::synthetic::Kind::Gauss, SHAPE, layer as u64)
}

/// A folder and a dump in it, written in pieces of 2, 2 and 1 tokens through all layers.
fn written(numbers: NumberType) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dump.safetensors");
    let mut writer = DumpWriter::create(&path, &description(), SHAPE, numbers).unwrap();
    for tokens in [0..2, 2..4, 4..5] {
        for layer in 0..2 {
            let inputs = inputs(layer);
            let of = |data: &[f32], width: usize| data[tokens.start * width..tokens.end * width].to_vec();
            writer.append(layer, &of(&inputs.queries, 12), &of(&inputs.keys, 6), &of(&inputs.values, 4)).unwrap();
        }
    }
    assert!(!path.exists(), "nothing is in place before the dump is whole");
    let bytes = writer.finish().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), bytes);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
    (folder, path)
}

#[test]
fn what_is_written_is_read() {
    for (numbers, tolerance) in [(NumberType::F32, 0.0), (NumberType::F16, 1e-3)] {
        let (_folder, path) = written(numbers);
        let dump = Dump::open(&path).unwrap();
        assert_eq!((dump.layers(), dump.description()), (2, &description()));
        for layer in 0..2 {
            let (read, expected) = (dump.read(layer).unwrap(), inputs(layer));
            assert_eq!((read.shape, read.scale, read.causal), (SHAPE, 0.25, true));
            assert_eq!(read.window, description().windows[layer]);
            let pairs = [
                (&read.inputs.queries, &expected.queries),
                (&read.inputs.keys, &expected.keys),
                (&read.inputs.values, &expected.values),
            ];
            for (read, expected) in pairs {
                assert_eq!(read.len(), expected.len());
                assert!(read.iter().zip(expected).all(|(a, b)| (a - b).abs() <= tolerance * b.abs().max(0.1)));
            }
        }
        // Any reader of safetensors reads it.
        let bytes = std::fs::read(&path).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(tensors.tensor("layer.1.keys").unwrap().shape(), [5, 2, 3]);
    }
}

#[test]
fn numbers_that_do_not_fit_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dump.safetensors");
    let write = |numbers, number: f32| {
        let mut writer = DumpWriter::create(&path, &description(), SHAPE, numbers).unwrap();
        let error = writer.append(1, &[0.5; 12], &[number; 6], &[0.5; 4]).map_err(|error| error.to_string());
        drop(writer);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left");
        error
    };
    let error = write(NumberType::F16, 1e5).unwrap_err();
    assert!(error.ends_with("layer.1.keys holds a number beyond f16; write f32 instead"), "{error}");
    assert!(write(NumberType::F32, 1e5).is_ok());
    for (numbers, number) in
        [(NumberType::F16, f32::NAN), (NumberType::F32, f32::NAN), (NumberType::F16, f32::INFINITY)]
    {
        let error = write(numbers, number).unwrap_err();
        assert!(error.contains("layer.1.keys holds what is not a number; the model's weights are damaged"), "{error}");
    }
    let nowhere = DumpWriter::create(&folder.path().join("no/dump"), &description(), SHAPE, NumberType::F16);
    assert!(nowhere.err().unwrap().to_string().contains("no/dump: "));
}

/// A file with this header and `data` bytes behind it.
fn file(header: &str, data: usize) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dump.safetensors");
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
    std::fs::write(&path, bytes).unwrap();
    (folder, path)
}

const METADATA: &str = r#""__metadata__":{"format":"iceformer-dump","scale":"0.5","causal":"false","window":"none","source":"s","model":"m"}"#;
const TENSORS: &str = r#""layer.0.queries":{"dtype":"F32","shape":[2,2,1],"data_offsets":[0,16]},"layer.0.keys":{"dtype":"F32","shape":[2,1,1],"data_offsets":[16,24]},"layer.0.values":{"dtype":"F32","shape":[2,1,3],"data_offsets":[24,48]}"#;

#[track_caller]
fn assert_refused(metadata: &str, tensors: &str, data: usize, part: &str) {
    let (_folder, path) = file(&format!("{{{metadata},{tensors}}}"), data);
    let error = Dump::open(&path).unwrap_err().to_string();
    assert!(error.contains("dump.safetensors: ") && error.contains(part), "{part:?} is not in {error}");
    assert!(error.lines().count() == 1 && error.len() < 400, "{error}");
}

#[test]
fn malformed_dumps_are_refused_in_one_line() {
    let (_folder, path) = file(&format!("{{{METADATA},{TENSORS}}}"), 48);
    assert!(Dump::open(&path).is_ok(), "the file that the others differ from");

    assert_refused(METADATA, TENSORS, 47, "was cut");
    assert_refused(METADATA, TENSORS, 49, "bytes behind");
    assert_refused(METADATA, &TENSORS.replace("keys", "kiwis"), 48, "layer.0.keys is missing");
    assert_refused(METADATA, &TENSORS.replace("layer.0.", "layer.1."), 48, "layer.0.queries is missing");
    assert_refused(METADATA, &TENSORS.replace("[2,2,1]", "[4,1,1]"), 48, "layer.0.keys has shape [2, 1, 1]");
    assert_refused(METADATA, &TENSORS.replace("[2,1,3]", "[1,2,3]"), 48, "layer.0.values has shape");
    assert_refused(METADATA, &TENSORS.replace("[2,2,1]", "[2,2]"), 48, "expected [tokens, heads, width]");
    assert_refused(METADATA, &TENSORS.replace("[2,2,1]", "[2,3,1]"), 48, "header is not valid");
    assert_refused(METADATA, &TENSORS.replace("[16,24]", "[12,20]"), 48, "header is not valid");
    let integers = TENSORS.replace(r#""F32","shape":[2,2,1]"#, r#""I32","shape":[2,2,1]"#);
    assert_refused(METADATA, &integers, 48, "type I32");
    let huge = TENSORS.replace("[2,2,1]", "[4294967296,4294967296,4294967296]");
    assert_refused(METADATA, &huge, 48, "header is not valid");
    let extra = format!(r#"{TENSORS},"x":{{"dtype":"F32","shape":[0],"data_offsets":[48,48]}}"#);
    assert_refused(METADATA, &extra, 48, "4 tensors");

    assert_refused(r#""__metadata__":{"format":"pt"}"#, TENSORS, 48, "format is \"pt\"");
    for (from, to, part) in [
        ("0.5", "-1", "scale is \"-1\""),
        ("0.5", "NaN", "scale is \"NaN\""),
        ("false", "no", "causal is \"no\""),
        (r#""window":"none""#, r#""window":"0""#, "window is \"0\""),
        (r#""window":"none""#, r#""window":"1,2""#, "window is \"1,2\""),
        (r#","model":"m""#, "", "metadata model is missing"),
    ] {
        assert_refused(&METADATA.replace(from, to), TENSORS, 48, part);
    }
    let noisy = METADATA.replace("none", &"\\n\\u001b".repeat(1_000));
    assert_refused(&noisy, TENSORS, 48, "window is");
}

#[test]
fn files_that_are_no_safetensors_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dump.safetensors");
    let refused = |bytes: &[u8], part: &str| {
        std::fs::write(&path, bytes).unwrap();
        let error = Dump::open(&path).unwrap_err().to_string();
        assert!(error.contains(part), "{part:?} is not in {error}");
    };
    refused(b"", "too short");
    refused(b"a text that is no dump", "beyond what the format allows");
    refused(&[100, 0, 0, 0, 0, 0, 0, 0, b'{'], "ends early");
    refused(&[2, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'], "no metadata");
    refused(&[2, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff], "header is not valid");
    assert!(Dump::open(folder.path()).is_err());
    assert!(Dump::open(&folder.path().join("none")).unwrap_err().to_string().contains("none: "));
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    let (_folder, path) = written(NumberType::F32);
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let dump = Dump::open(&path).unwrap();
    assert!(dump.read(0).is_ok());
    let error = dump.read(1).unwrap_err().to_string();
    assert!(error.ends_with("layer.1.values holds inf at place 19; expected finite numbers"), "{error}");
}

#[test]
fn damaged_files_never_panic() {
    let (_folder, path) = written(NumberType::F16);
    let whole = std::fs::read(&path).unwrap();
    let mut random = crate::random::Random::new(1);
    let (mut refused, mut read) = (0, 0);
    for _ in 0..3_000 {
        let mut bytes = whole.clone();
        for _ in 0..1 + random.below(3) {
            // Most of the damage to the header, where what it says is believed.
            let place = if random.below(8) == 0 { random.below(bytes.len()) } else { random.below(900) };
            bytes[place] = match random.below(3) {
                0 => random.bits() as u8,
                1 => bytes[random.below(900)],
                _ => b"0123456789[]{}\",:"[random.below(17)],
            };
        }
        std::fs::write(&path, bytes).unwrap();
        match Dump::open(&path) {
            Err(error) => {
                refused += 1;
                assert_eq!(error.to_string().lines().count(), 1, "{error}");
            }
            Ok(dump) => read += (0..dump.layers()).filter(|&layer| dump.read(layer).is_ok()).count(),
        }
    }
    assert!(refused > 1_000 && read > 0, "{refused} refused, {read} layers read");
}
