//! Safetensors files of a Hugging Face folder: one file, or shards named by an index.

use std::collections::BTreeMap;
use std::path::Path;

use iceformer_kernels::linear::{StoredType, WeightType};
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde_json::Value;

use crate::file_map::FileSource;
use crate::text::quoted;
use crate::weights::{Layout, StoredTensor, TensorTable};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// More shards than any model has; each is an open file.
const MAXIMUM_SHARDS: usize = 1024;

/// What is wrong with safetensors files.
#[derive(Debug, thiserror::Error)]
pub enum SafetensorsError {
    /// The folder has no weights in this format.
    #[error("no {SINGLE} and no {INDEX} in this folder; other weight formats must be converted to safetensors or GGUF")]
    NoWeights,
    /// The index is not what it should be.
    #[error("{INDEX}: {0}")]
    Index(String),
    /// A file named by the index is not there.
    #[error("{INDEX} names shard {}, which cannot be opened: {error}", quoted(.shard))]
    Shard {
        /// Name of the file.
        shard: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// A shard lacks a tensor that the index places in it.
    #[error("{}: tensor {} is missing, which {INDEX} places here", .shard, quoted(.tensor))]
    NotInShard {
        /// Name of the file.
        shard: String,
        /// Name of the tensor.
        tensor: String,
    },
    /// A file's header is malformed.
    #[error("{file}: {problem}")]
    Header {
        /// Name of the file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// A file could not be read.
    #[error("{file}: {error}")]
    Read {
        /// Name of the file.
        file: String,
        /// What the system said.
        error: std::io::Error,
    },
}

/// Opens the weights of a folder; `model.safetensors` wins over an index, as in transformers.
pub(crate) fn open_folder(folder: &Path) -> Result<TensorTable, SafetensorsError> {
    let single = folder.join(SINGLE);
    if single.exists() {
        let source = FileSource::open(&single)
            .map_err(|error| SafetensorsError::Read { file: single.display().to_string(), error })?;
        return open_single(source);
    }
    let index = folder.join(INDEX);
    if !index.exists() {
        return Err(SafetensorsError::NoWeights);
    }
    let index = crate::model_files::read_small(&index)
        .map_err(|error| SafetensorsError::Read { file: index.display().to_string(), error })?;
    let shards = parse_index(&index)?;
    let mut table = TensorTable { layout: Layout::HuggingFace, sources: Vec::new(), tensors: BTreeMap::new() };
    for (shard, names) in shards {
        let source = FileSource::open(&folder.join(&shard))
            .map_err(|error| SafetensorsError::Shard { shard: shard.clone(), error })?;
        let mut tensors = read_header(&source, table.sources.len())?;
        for name in names {
            let tensor = tensors
                .remove(&name)
                .ok_or_else(|| SafetensorsError::NotInShard { shard: source.name.clone(), tensor: name.clone() })?;
            table.tensors.insert(name, tensor);
        }
        table.sources.push(source);
    }
    Ok(table)
}

/// Opens one file that holds all tensors.
pub(crate) fn open_single(source: FileSource) -> Result<TensorTable, SafetensorsError> {
    let tensors = read_header(&source, 0)?;
    Ok(TensorTable { layout: Layout::HuggingFace, sources: vec![source], tensors })
}

/// Reads an index: for each shard the names of its tensors.
pub(crate) fn parse_index(json: &[u8]) -> Result<BTreeMap<String, Vec<String>>, SafetensorsError> {
    let problem = |text: String| SafetensorsError::Index(text);
    let index: Value = serde_json::from_slice(json).map_err(|error| problem(format!("not valid JSON: {error}")))?;
    let Some(Value::Object(map)) = index.get("weight_map") else {
        return Err(problem("weight_map is missing or no object".into()));
    };
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in map {
        let Value::String(shard) = shard else {
            return Err(problem(format!("weight_map.{} is no file name", quoted(tensor))));
        };
        // A plain name only: an index must not reach outside its folder.
        let plain = !shard.contains(['/', '\\', ':', '\0']) && shard.ends_with(".safetensors");
        if !plain {
            return Err(problem(format!(
                "weight_map.{} is {}; expected the plain name of a .safetensors file in the same folder",
                quoted(tensor),
                quoted(shard)
            )));
        }
        shards.entry(shard.clone()).or_default().push(tensor.clone());
    }
    if shards.is_empty() {
        return Err(problem("weight_map is empty".into()));
    }
    if shards.len() > MAXIMUM_SHARDS {
        return Err(problem(format!("{} shards; expected at most {MAXIMUM_SHARDS}", shards.len())));
    }
    Ok(shards)
}

fn read_header(source: &FileSource, index: usize) -> Result<BTreeMap<String, StoredTensor>, SafetensorsError> {
    let bytes = source.all().map_err(|error| SafetensorsError::Read { file: source.name.clone(), error })?;
    let (header, metadata) = SafeTensors::read_metadata(&bytes)
        .map_err(|error| SafetensorsError::Header { file: source.name.clone(), problem: explain(&error) })?;
    // The library has checked that the tensors follow each other without a gap from the header to the file's end.
    let data = 8 + header as u64;
    let tensors = metadata.tensors().into_iter().map(|(name, info)| {
        let (type_name, weight_type) = describe(info.dtype);
        let (start, end) = info.data_offsets;
        let tensor = StoredTensor {
            source: index,
            type_name,
            stored: weight_type.map(StoredType::Computed),
            shape: info.shape.iter().map(|&length| length as u64).collect(),
            start: data + start as u64,
            bytes: (end - start) as u64,
        };
        (name, tensor)
    });
    Ok(tensors.collect())
}

fn describe(dtype: Dtype) -> (&'static str, Option<WeightType>) {
    match dtype {
        Dtype::F32 => ("f32", Some(WeightType::F32)),
        Dtype::F16 => ("f16", Some(WeightType::F16)),
        Dtype::BF16 => ("bf16", Some(WeightType::Bf16)),
        Dtype::F64 => ("f64", None),
        Dtype::I64 => ("i64", None),
        Dtype::I32 => ("i32", None),
        Dtype::I16 => ("i16", None),
        Dtype::I8 => ("i8", None),
        Dtype::U64 => ("u64", None),
        Dtype::U32 => ("u32", None),
        Dtype::U16 => ("u16", None),
        Dtype::U8 => ("u8", None),
        Dtype::BOOL => ("bool", None),
        Dtype::F8_E4M3 => ("F8_E4M3", None),
        Dtype::F8_E5M2 => ("F8_E5M2", None),
        Dtype::F8_E8M0 => ("F8_E8M0", None),
        Dtype::F6_E2M3 => ("F6_E2M3", None),
        Dtype::F6_E3M2 => ("F6_E3M2", None),
        Dtype::F4 => ("F4", None),
        _ => ("another type", None),
    }
}

fn explain(error: &SafeTensorError) -> String {
    match error {
        SafeTensorError::HeaderTooSmall => "the file is too short for a safetensors header".into(),
        SafeTensorError::HeaderTooLarge => "the header length is beyond what safetensors allows (100 MB)".into(),
        SafeTensorError::InvalidHeaderLength => "the header is longer than the file; the file ends early".into(),
        SafeTensorError::InvalidHeader(_) => "the header is not UTF-8".into(),
        SafeTensorError::InvalidHeaderDeserialization(error) => {
            format!("the header is not valid: {}", quoted(&error.to_string()))
        }
        SafeTensorError::InvalidOffset(name) => {
            format!("tensor {} has data_offsets that overlap, leave a gap or run backwards", quoted(name))
        }
        SafeTensorError::TensorInvalidInfo => {
            "a tensor's shape and dtype take another number of bytes than its data_offsets".into()
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            "the tensors do not end where the file ends; it was cut or has bytes behind them".into()
        }
        SafeTensorError::ValidationOverflow => "a tensor's shape is too large to count".into(),
        other => format!("not a valid safetensors file: {}", quoted(&other.to_string())),
    }
}
