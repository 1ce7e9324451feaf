//! The tensors of all files of a model: names, types, shapes and where their bytes lie.

use std::collections::BTreeMap;

use iceformer_kernels::linear::{StoredType, WeightType};

use super::{TensorError, TensorInfo, TensorName, TensorView, interleaved_position};
use crate::config::ModelConfig;
use crate::file_map::FileSource;
use crate::text::printable;

/// How a kind of file names and orders tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    HuggingFace,
    Gguf,
}

/// One tensor of a file. The reader of the file has checked that `start + bytes` lies within it and that `bytes` is what
/// the shape takes.
#[derive(Clone, Debug)]
pub(crate) struct StoredTensor {
    pub(crate) source: usize,
    pub(crate) type_name: &'static str,
    /// `None` for types that the engine does not compute with.
    pub(crate) stored: Option<StoredType>,
    /// Slowest dimension first.
    pub(crate) shape: Vec<u64>,
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

#[derive(Debug)]
pub(crate) struct TensorTable {
    pub(crate) layout: Layout,
    pub(crate) sources: Vec<FileSource>,
    pub(crate) tensors: BTreeMap<String, StoredTensor>,
}

impl TensorTable {
    pub(crate) fn name_of(&self, name: TensorName) -> String {
        match self.layout {
            Layout::HuggingFace => name.hugging_face(),
            Layout::Gguf => name.gguf(),
        }
    }

    /// Folders saved from the base class of a model in transformers (`LlamaModel`) name their tensors without `model.`.
    fn without_prefix(&self, file_name: &str) -> Option<&StoredTensor> {
        let is_folder = self.layout == Layout::HuggingFace;
        file_name.strip_prefix("model.").filter(|_| is_folder).and_then(|name| self.tensors.get(name))
    }

    /// How messages call the file of a tensor, or the first of all files where it is in none.
    fn file_of(&self, tensor: Option<&StoredTensor>) -> String {
        let name = |index: usize| self.sources.get(index).map_or_else(String::new, |source| source.name.clone());
        match (tensor, self.sources.len()) {
            (Some(tensor), _) => name(tensor.source),
            (None, 0 | 1) => name(0),
            (None, files) => format!("{} and the other files ({files} in all)", name(0)),
        }
    }

    pub(crate) fn infos(&self) -> impl Iterator<Item = TensorInfo> + '_ {
        self.tensors.iter().map(|(name, tensor)| TensorInfo {
            name: printable(name),
            weight_type: tensor.type_name,
            computed_as: tensor.stored.map(|kind| kind.weight_type().name()),
            shape: tensor.shape.clone(),
            bytes: tensor.bytes,
        })
    }

    /// Checks that every tensor the configuration asks for is there, in a type and shape the engine can use.
    pub(crate) fn check(&self, config: &ModelConfig) -> Result<(), TensorError> {
        TensorName::all(config).try_for_each(|name| self.find(config, name).map(|_| ()))?;
        // A model cut short by a wrong number of layers would answer, and answer nonsense.
        match self.tensors.iter().find(|(name, _)| self.layer_of(name).is_some_and(|layer| layer >= config.layers)) {
            None => Ok(()),
            Some((name, tensor)) => Err(TensorError::MoreLayers {
                file: self.file_of(Some(tensor)),
                name: printable(name),
                layers: config.layers,
                field: match self.layout {
                    Layout::HuggingFace => "num_hidden_layers of config.json",
                    Layout::Gguf => "block_count",
                },
            }),
        }
    }

    /// The layer that a tensor of this name is of.
    fn layer_of(&self, name: &str) -> Option<usize> {
        let numbered = match self.layout {
            Layout::HuggingFace => name.strip_prefix("model.").unwrap_or(name).strip_prefix("layers.")?,
            Layout::Gguf => name.strip_prefix("blk.")?,
        };
        numbered.split_once('.')?.0.parse().ok()
    }

    fn find(
        &self,
        config: &ModelConfig,
        name: TensorName,
    ) -> Result<(&StoredTensor, StoredType, usize, usize), TensorError> {
        let (rows, columns) =
            name.shape(config).ok_or(TensorError::NotInModel { family: config.family.name(), name })?;
        let file_name = self.name_of(name);
        let Some(tensor) = self.tensors.get(&file_name).or_else(|| self.without_prefix(&file_name)) else {
            return Err(TensorError::Missing { file: self.file_of(None), name: file_name });
        };
        let expected = if name.is_vector() { vec![columns as u64] } else { vec![rows as u64, columns as u64] };
        if tensor.shape != expected {
            return Err(TensorError::Shape {
                file: self.file_of(Some(tensor)),
                name: file_name,
                expected,
                found: tensor.shape.clone(),
            });
        }
        let unsupported = |supported| TensorError::Type {
            file: self.file_of(Some(tensor)),
            name: file_name.clone(),
            found: tensor.type_name.into(),
            supported,
        };
        let stored = tensor.stored.ok_or_else(|| {
            unsupported(match self.layout {
                Layout::HuggingFace => "F32, F16 and BF16",
                Layout::Gguf => {
                    "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL and IQ4_XS"
                }
            })
        })?;
        if name.is_vector() && !matches!(stored.weight_type(), WeightType::F32 | WeightType::F16 | WeightType::Bf16) {
            return Err(unsupported("F32, F16 and BF16 for vectors"));
        }
        if !columns.is_multiple_of(stored.block_weights()) {
            return Err(unsupported("types whose block length divides the row length"));
        }
        Ok((tensor, stored, rows, columns))
    }

    pub(crate) fn view(&self, config: &ModelConfig, name: TensorName) -> Result<TensorView, TensorError> {
        let (tensor, stored, rows, columns) = self.find(config, name)?;
        let source = &self.sources[tensor.source];
        let bytes = source
            .bytes(tensor.start..tensor.start + tensor.bytes)
            .map_err(|error| TensorError::Read { file: source.name.clone(), error })?;
        let interleaved = self.is_interleaved(config, name) && !name.is_vector();
        let interleaved = interleaved.then_some(config.head_dim);
        Ok(TensorView::new(stored, rows, columns, bytes, interleaved))
    }

    pub(crate) fn vector(&self, config: &ModelConfig, name: TensorName) -> Result<Vec<f32>, TensorError> {
        if !name.is_vector() {
            return Err(TensorError::NotAVector(name));
        }
        let view = self.view(config, name)?;
        let stored = floats(view.weight_type(), &view.row_bytes(0));
        if !self.is_interleaved(config, name) {
            return Ok(stored);
        }
        Ok((0..stored.len()).map(|index| stored[interleaved_position(index, config.head_dim)]).collect())
    }

    fn is_interleaved(&self, config: &ModelConfig, name: TensorName) -> bool {
        self.layout == Layout::Gguf && name.is_interleaved_in_gguf(config.family)
    }
}

/// Numbers of an unquantised type as f32.
pub(crate) fn floats(weight_type: WeightType, bytes: &[u8]) -> Vec<f32> {
    match weight_type {
        WeightType::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        WeightType::F16 => bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        WeightType::Bf16 => bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => Vec::new(),
    }
}
