//! Random weights of any shape and type: measurements need no model file.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use iceformer_kernels::linear::{WeightType, blocks};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::config::ModelConfig;
use crate::weight_source::{WeightRows, WeightSource};
use crate::weights::{TensorError, TensorName};

/// Different rows of one width; a prime, so that rows repeat at no regular place of a head.
const ROWS: usize = 257;

/// A model with random weights, made block by block in their own type and never held as f32.
///
/// Matrices of one width draw from one pool of rows: that is as good as fresh ones for measuring speed and memory, and
/// keeps the making cheap.
pub struct RandomWeights {
    config: ModelConfig,
    weight_type: WeightType,
    seed: u64,
    /// Rows of each width, `[ROWS, bytes of a row]`.
    pools: Mutex<HashMap<usize, Arc<Vec<u8>>>>,
}

/// Rows of a [`RandomWeights`] matrix.
pub struct RandomRows {
    weight_type: WeightType,
    rows: usize,
    columns: usize,
    pool: Arc<Vec<u8>>,
}

impl RandomWeights {
    /// Weights of one type, drawn from `seed`, for a model of this shape.
    ///
    /// # Errors
    /// A sentence for the user when a matrix of the model has rows that are no whole number of the type's blocks.
    pub fn new(config: ModelConfig, weight_type: WeightType, seed: u64) -> Result<Self, String> {
        for name in TensorName::all(&config).filter(|name| !name.is_vector()) {
            let (_, columns) = name.shape(&config).unwrap_or_default();
            if !columns.is_multiple_of(weight_type.block_weights()) {
                return Err(format!(
                    "{} weights come in blocks of {}; {name:?} has rows of {columns}",
                    weight_type.name(),
                    weight_type.block_weights()
                ));
            }
        }
        Ok(Self { config, weight_type, seed, pools: Mutex::default() })
    }

    fn pool(&self, columns: usize) -> Arc<Vec<u8>> {
        let mut pools = self.pools.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let pool = pools.entry(columns).or_insert_with(|| {
            let mut generator = ChaCha8Rng::seed_from_u64(self.seed ^ columns as u64);
            // Uniform with variance 1/columns, so that products keep the size of their input.
            let scale = (3.0 / columns as f32).sqrt();
            let mut values = vec![0.0; columns];
            let mut pool = Vec::new();
            for _ in 0..ROWS {
                values.fill_with(|| (generator.next_u32() as f32 / (1u64 << 31) as f32 - 1.0) * scale);
                pool.extend(blocks::quantise(self.weight_type, &values));
            }
            Arc::new(pool)
        });
        Arc::clone(pool)
    }
}

impl WeightSource for RandomWeights {
    type Rows = RandomRows;

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn matrix(&self, name: TensorName) -> Result<RandomRows, TensorError> {
        let missing = TensorError::NotInModel { family: self.config.family.name(), name };
        let (rows, columns) = name.shape(&self.config).ok_or(missing)?;
        Ok(RandomRows { weight_type: self.weight_type, rows, columns, pool: self.pool(columns) })
    }

    fn vector(&self, name: TensorName) -> Result<Vec<f32>, TensorError> {
        let missing = TensorError::NotInModel { family: self.config.family.name(), name };
        let (_, length) = name.shape(&self.config).ok_or(missing)?;
        Ok(vec![1.0; length])
    }
}

impl WeightRows for RandomRows {
    fn weight_type(&self) -> WeightType {
        self.weight_type
    }

    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    fn row_bytes(&self, index: usize) -> Cow<'_, [u8]> {
        let length = self.pool.len() / ROWS;
        Cow::Borrowed(&self.pool[index % ROWS * length..][..length])
    }
}
