//! Linear layers that read one input, joined where their weights have one type.
//!
//! Queries, keys and values, or gate and up, are then one product: the input is converted once and a single token's
//! work is one job for the threads instead of three.

use std::ops::Range;

use iceformer_kernels::ThreadTeam;
use iceformer_kernels::add::add_bias_rows;
use iceformer_kernels::linear::{LinearScratch, LinearWeights, PackError};

use crate::weight_source::{WeightRows, WeightSource};
use crate::weights::{TensorError, TensorName};

/// Why a decoder cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum DecoderError {
    /// A tensor is missing or unreadable.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// A tensor cannot be packed.
    #[error("tensor {name:?}: {error}")]
    Pack {
        /// The tensor.
        name: TensorName,
        /// What is wrong.
        error: PackError,
    },
    /// The rotary settings are out of range.
    #[error("rope: {0}")]
    Rope(#[from] iceformer_kernels::rope::RopeError),
}

/// A linear layer with its bias.
pub(crate) struct Linear {
    pub(crate) weights: LinearWeights,
    bias: Option<Vec<f32>>,
}

impl Linear {
    /// Packs a matrix, and reads `bias` where the model has it.
    pub(crate) fn load<S: WeightSource>(
        source: &S,
        name: TensorName,
        bias: Option<TensorName>,
        team: &ThreadTeam,
    ) -> Result<Self, DecoderError> {
        let mut joined = JoinedLinear::load(source, &[(name, bias)], team)?;
        Ok(joined.parts.remove(0))
    }

    /// `input` `[rows, in_features]`, `output` `[rows, out_features]`.
    pub(crate) fn forward(&self, input: &[f32], output: &mut [f32], team: &ThreadTeam, scratch: &mut LinearScratch) {
        self.weights.forward(input, output, team, scratch);
        if let Some(bias) = &self.bias {
            add_bias_rows(output, bias, team);
        }
    }
}

/// Several linear layers of one input.
pub(crate) struct JoinedLinear {
    pub(crate) parts: Vec<Linear>,
    /// For each tensor, in the order given: its part and its columns in the output of the part.
    places: Vec<(usize, Range<usize>)>,
}

/// Columns of one tensor in the output of [`JoinedLinear::forward`].
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    /// `[rows, stride]`, from the tensor's first column on.
    data: &'a [f32],
    stride: usize,
    width: usize,
}

impl JoinedLinear {
    /// Packs matrices with their biases (of which either all or none are present).
    pub(crate) fn load<S: WeightSource>(
        source: &S,
        tensors: &[(TensorName, Option<TensorName>)],
        team: &ThreadTeam,
    ) -> Result<Self, DecoderError> {
        let mut groups: Vec<(Vec<S::Rows>, Vec<f32>, TensorName)> = Vec::new();
        let mut places = Vec::new();
        for &(name, bias) in tensors {
            let rows = source.matrix(name)?;
            let bias = bias.map(|bias| source.vector(bias)).transpose()?.unwrap_or_default();
            let part = groups.iter().position(|(group, ..)| group[0].weight_type() == rows.weight_type());
            let part = part.unwrap_or_else(|| {
                groups.push((Vec::new(), Vec::new(), name));
                groups.len() - 1
            });
            let start: usize = groups[part].0.iter().map(WeightRows::rows).sum();
            places.push((part, start..start + rows.rows()));
            groups[part].1.extend(bias);
            groups[part].0.push(rows);
        }
        let parts = groups
            .into_iter()
            .map(|(group, bias, name)| {
                let weights = pack(&group, team).map_err(|error| DecoderError::Pack { name, error })?;
                Ok(Linear { weights, bias: Some(bias).filter(|bias| !bias.is_empty()) })
            })
            .collect::<Result<_, DecoderError>>()?;
        Ok(Self { parts, places })
    }

    /// Width of all outputs together.
    pub(crate) fn out_features(&self) -> usize {
        self.places.iter().map(|(_, columns)| columns.len()).sum()
    }

    /// Whether all tensors share one part, so that the output is `[rows, out_features]`.
    pub(crate) fn is_one_part(&self) -> bool {
        self.parts.len() == 1
    }

    /// `input` `[rows, in_features]`; `output` holds `rows · out_features` numbers, part after part, each `[rows, width]`.
    pub(crate) fn forward(
        &self,
        input: &[f32],
        rows: usize,
        mut output: &mut [f32],
        team: &ThreadTeam,
        scratch: &mut LinearScratch,
    ) {
        for part in &self.parts {
            let (own, rest) = output.split_at_mut(rows * part.weights.out_features());
            part.forward(input, own, team, scratch);
            output = rest;
        }
    }

    /// Where the output of tensor `tensor` stands in `output` of [`forward`](Self::forward).
    pub(crate) fn columns<'a>(&self, output: &'a [f32], rows: usize, tensor: usize) -> Columns<'a> {
        let (part, columns) = &self.places[tensor];
        let width = |part: &Linear| part.weights.out_features();
        let before: usize = self.parts[..*part].iter().map(width).sum();
        let stride = width(&self.parts[*part]);
        Columns { data: &output[rows * before..][columns.start..], stride, width: columns.len() }
    }
}

impl Columns<'_> {
    /// Writes the columns to `output`, `[rows, width]`.
    pub(crate) fn copy_to(&self, output: &mut [f32], team: &ThreadTeam) {
        const ROWS_PER_TASK: usize = 32;
        team.run_chunks(output, ROWS_PER_TASK * self.width, |task, part, _| {
            for (row, part) in part.chunks_exact_mut(self.width).enumerate() {
                part.copy_from_slice(&self.data[(task * ROWS_PER_TASK + row) * self.stride..][..self.width]);
            }
        });
    }
}

/// Packs the rows of several matrices of one type and width, one after the other.
fn pack<R: WeightRows>(group: &[R], team: &ThreadTeam) -> Result<LinearWeights, PackError> {
    let rows = group.iter().map(WeightRows::rows).sum();
    LinearWeights::pack(
        group[0].weight_type(),
        rows,
        group[0].columns(),
        |mut index| {
            let mut group = group.iter();
            loop {
                let matrix = group.next().expect("the index is below the rows of the group");
                if index < matrix.rows() {
                    return matrix.row_bytes(index);
                }
                index -= matrix.rows();
            }
        },
        team,
    )
}
