//! Where a decoder's weights come from: model files, or random numbers for measurements.

use std::borrow::Cow;

use iceformer_kernels::linear::WeightType;

use crate::config::ModelConfig;
use crate::model_files::ModelFiles;
use crate::weights::{TensorError, TensorName, TensorView};

/// The rows of a matrix, each in the bytes of its file format.
pub trait WeightRows: Sync {
    /// How the weights are stored.
    fn weight_type(&self) -> WeightType;
    /// Output features.
    fn rows(&self) -> usize;
    /// Input features.
    fn columns(&self) -> usize;
    /// Bytes of row `index`.
    fn row_bytes(&self, index: usize) -> Cow<'_, [u8]>;
}

/// Gives a decoder its configuration and weights, tensor by tensor.
pub trait WeightSource {
    /// The rows of one matrix.
    type Rows: WeightRows;

    /// The shape of the model.
    fn config(&self) -> &ModelConfig;

    /// The rows of a matrix.
    ///
    /// # Errors
    /// When the model has no such tensor or it cannot be read.
    fn matrix(&self, name: TensorName) -> Result<Self::Rows, TensorError>;

    /// A vector as f32.
    ///
    /// # Errors
    /// When the model has no such tensor or it cannot be read.
    fn vector(&self, name: TensorName) -> Result<Vec<f32>, TensorError>;
}

impl WeightRows for TensorView {
    fn weight_type(&self) -> WeightType {
        self.weight_type()
    }

    fn rows(&self) -> usize {
        self.rows()
    }

    fn columns(&self) -> usize {
        self.columns()
    }

    fn row_bytes(&self, index: usize) -> Cow<'_, [u8]> {
        self.row_bytes(index)
    }
}

impl WeightSource for ModelFiles {
    type Rows = TensorView;

    fn config(&self) -> &ModelConfig {
        self.config()
    }

    fn matrix(&self, name: TensorName) -> Result<TensorView, TensorError> {
        self.tensor(name)
    }

    fn vector(&self, name: TensorName) -> Result<Vec<f32>, TensorError> {
        self.vector(name)
    }
}
