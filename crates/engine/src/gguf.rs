//! GGUF files, versions 2 and 3: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
//!
//! The file is not trusted. Every count and length is held against the bytes that remain before anything is allocated
//! for it, all arithmetic is checked, nothing recurses, and tensors must lie within the file without overlapping, so that
//! memory use is bounded by the size of the file.

mod error;
mod reader;
mod split;
mod types;
mod value;

pub use error::GgufError;
pub(crate) use split::open;
pub(crate) use types::TensorType;
pub(crate) use value::Metadata;
use value::Value;

use std::collections::BTreeMap;

use reader::Reader;

/// Bytes `GGUF`.
const MAGIC: [u8; 4] = *b"GGUF";
/// What the format allows.
const MAXIMUM_DIMENSIONS: u32 = 4;
/// More than any real file uses (32 or 64).
const MAXIMUM_ALIGNMENT: u64 = 1 << 16;
/// Length that the format allows for a key, in bytes.
const MAXIMUM_KEY: usize = (1 << 16) - 1;
/// llama.cpp allows 63 bytes for a tensor's name.
const MAXIMUM_TENSOR_NAME: usize = 255;

/// What a GGUF file states about itself.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) metadata: Metadata,
    pub(crate) tensors: Vec<Tensor>,
}

/// A tensor of a GGUF file.
#[derive(Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) kind: TensorType,
    /// Slowest dimension first.
    pub(crate) shape: Vec<u64>,
    /// First byte in the file.
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

impl Header {
    /// Reads a file's header; `file` is all of its bytes, of which the tensors' are not touched.
    pub(crate) fn parse(file: &[u8]) -> Result<Self, GgufError> {
        let mut reader = Reader::new(file);
        let version = read_version(&mut reader)?;
        let tensor_count = reader.count("tensor_count", 8 + 4 + 8 + 4 + 8)?;
        let metadata_count = reader.count("metadata_kv_count", 8 + 4 + 1)?;

        let mut metadata = BTreeMap::new();
        for index in 0..metadata_count {
            let key = reader.name(MAXIMUM_KEY, || format!("key {index} of the metadata"))?;
            let value = Value::read(&mut reader, &key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(GgufError::DuplicateKey(key));
            }
        }
        let metadata = Metadata::new(metadata);

        let mut tensors = Vec::with_capacity(tensor_count);
        for index in 0..tensor_count {
            tensors.push(read_tensor(&mut reader, index)?);
        }
        let alignment = alignment(&metadata)?;
        place_tensors(&mut tensors, reader.position(), file.len() as u64, alignment)?;
        Ok(Self { version, metadata, tensors })
    }
}

fn read_version(reader: &mut Reader<'_>) -> Result<u32, GgufError> {
    if reader.array("magic")? != MAGIC {
        return Err(GgufError::Magic);
    }
    match reader.u32("version")? {
        version @ (2 | 3) => Ok(version),
        version if matches!(version.swap_bytes(), 1..=16) => Err(GgufError::BigEndian),
        version => Err(GgufError::Version(version)),
    }
}

fn read_tensor(reader: &mut Reader<'_>, index: usize) -> Result<Tensor, GgufError> {
    let name = reader.name(MAXIMUM_TENSOR_NAME, || format!("the name of tensor {index}"))?;
    let dimensions = reader.u32("the number of dimensions of a tensor")?;
    if !(1..=MAXIMUM_DIMENSIONS).contains(&dimensions) {
        return Err(GgufError::Dimensions { tensor: name, found: dimensions });
    }
    let mut shape = Vec::with_capacity(dimensions as usize);
    for _ in 0..dimensions {
        shape.push(reader.u64("a dimension of a tensor")?);
    }
    let type_id = reader.u32("the type of a tensor")?;
    let offset = reader.u64("the offset of a tensor")?;

    let kind = TensorType::from_id(type_id)
        .ok_or_else(|| GgufError::UnknownTensorType { tensor: name.clone(), found: type_id })?;
    if shape.contains(&0) {
        return Err(GgufError::EmptyTensor(name));
    }
    if !shape[0].is_multiple_of(kind.block_weights) {
        return Err(GgufError::RowLength { tensor: name, row: shape[0], kind: kind.name, block: kind.block_weights });
    }
    let weights = shape.iter().try_fold(1u64, |product, &length| product.checked_mul(length));
    let bytes = weights.and_then(|weights| (weights / kind.block_weights).checked_mul(kind.block_bytes));
    let Some(bytes) = bytes else { return Err(GgufError::ShapeOverflow { tensor: name, shape }) };
    shape.reverse();
    Ok(Tensor { name, kind, shape, start: offset, bytes })
}

fn alignment(metadata: &Metadata) -> Result<u64, GgufError> {
    match metadata.u32("general.alignment")? {
        None => Ok(32),
        Some(found) => {
            let alignment = u64::from(found);
            if alignment.is_power_of_two() && alignment <= MAXIMUM_ALIGNMENT {
                Ok(alignment)
            } else {
                Err(GgufError::Alignment { found, maximum: MAXIMUM_ALIGNMENT })
            }
        }
    }
}

/// Turns offsets within the data into positions in the file and checks that the tensors lie in it without overlapping.
fn place_tensors(tensors: &mut [Tensor], header_end: u64, file_length: u64, alignment: u64) -> Result<(), GgufError> {
    let data_start = header_end.next_multiple_of(alignment);
    for tensor in tensors.iter_mut() {
        let offset = tensor.start;
        if !offset.is_multiple_of(alignment) {
            return Err(GgufError::Misaligned { tensor: tensor.name.clone(), offset, alignment });
        }
        let start = data_start.checked_add(offset);
        let end = start.and_then(|start| start.checked_add(tensor.bytes)).filter(|&end| end <= file_length);
        let (Some(start), Some(_)) = (start, end) else {
            return Err(GgufError::OutsideFile {
                tensor: tensor.name.clone(),
                offset,
                bytes: tensor.bytes,
                available: file_length.saturating_sub(data_start),
            });
        };
        tensor.start = start;
    }
    let mut order: Vec<&Tensor> = tensors.iter().collect();
    order.sort_by_key(|tensor| tensor.start);
    for pair in order.windows(2) {
        if pair[0].start + pair[0].bytes > pair[1].start {
            return Err(GgufError::Overlap { first: pair[0].name.clone(), second: pair[1].name.clone() });
        }
    }
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(GgufError::DuplicateTensor(pair[0].into())),
        None => Ok(()),
    }
}
