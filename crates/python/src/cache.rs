//! A key/value cache for incremental use.

use std::sync::{PoisonError, RwLock};

use iceformer_attention::{CacheShape, KeyValueCache, StridedView};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::attend::{Options, interruptible};
use crate::operand::{Operand, Output};
use crate::report::Report;
use crate::{settings, teams};

/// More than any model has; a cache takes memory for each head and width from the start.
const MOST_HEADS_OR_WIDTH: usize = 1 << 16;
const MOST_NUMBERS: usize = 1 << 22;

/// Packed keys and values of one sequence.
#[pyclass(frozen, module = "iceformer._core")]
pub struct Cache {
    inner: RwLock<KeyValueCache>,
    shape: CacheShape,
}

#[pymethods]
impl Cache {
    #[new]
    fn new(kv_heads: usize, key_dim: usize, value_dim: usize, kv_type: &str) -> PyResult<Self> {
        for (name, value) in [("kv_heads", kv_heads), ("key_dim", key_dim), ("value_dim", value_dim)] {
            if !(1..=MOST_HEADS_OR_WIDTH).contains(&value) {
                return Err(PyValueError::new_err(format!("{name} is {value}; expected 1 to {MOST_HEADS_OR_WIDTH}")));
            }
        }
        let numbers = kv_heads * (key_dim + value_dim);
        if numbers > MOST_NUMBERS {
            return Err(PyValueError::new_err(format!(
                "kv_heads · (key_dim + value_dim) is {numbers}; expected at most {MOST_NUMBERS} numbers for a token"
            )));
        }
        let shape = CacheShape { kv_heads, key_dim, value_dim };
        let kind = settings::key_value_type(kv_type)?.unwrap_or(iceformer_attention::KeyValueType::F32);
        Ok(Self { inner: RwLock::new(KeyValueCache::new(shape, kind)), shape })
    }

    /// Appends keys and values `[1, kv_heads, tokens, width]`.
    fn append(&self, py: Python<'_>, keys: Operand<'_>, values: Operand<'_>, threads: usize) -> PyResult<()> {
        let (key_memory, value_memory) = (keys.borrow()?, values.borrow()?);
        let (keys, values) = (keys.view(&key_memory)?, values.view(&value_memory)?);
        let CacheShape { kv_heads, key_dim, value_dim } = self.shape;
        for (name, view, width) in [("keys", keys, key_dim), ("values", values, value_dim)] {
            let [batch, heads, tokens, found] = view.shape();
            if (batch, heads, found) != (1, kv_heads, width) {
                return Err(PyValueError::new_err(format!(
                    "{name} are [{heads}, {tokens}, {found}]; expected [{kv_heads}, tokens, {width}]"
                )));
            }
        }
        let (tokens, value_tokens) = (keys.shape()[2], values.shape()[2]);
        if tokens != value_tokens {
            return Err(PyValueError::new_err(format!(
                "there are {tokens} keys and {value_tokens} values; expected as many of both"
            )));
        }
        py.detach(|| {
            let mut cache = self.inner.write().unwrap_or_else(PoisonError::into_inner);
            cache.append_view(keys, values, &teams::team(threads));
        });
        Ok(())
    }

    /// Attention of queries `[1, query_heads, tokens, key_dim]`, the last of which stands at the last key unless
    /// `first_position` says where the first one stands.
    fn attend(
        &self,
        py: Python<'_>,
        queries: Operand<'_>,
        output: Output<'_>,
        options: Options,
        first_position: Option<usize>,
    ) -> PyResult<Report> {
        let attention = options.attention()?;
        let query_memory = queries.borrow()?;
        let queries: StridedView<'_> = queries.view(&query_memory)?;
        let [batch, heads, tokens, width] = queries.shape();
        let CacheShape { kv_heads, key_dim, value_dim } = self.shape;
        if batch != 1 || heads == 0 || !heads.is_multiple_of(kv_heads) || width != key_dim {
            return Err(PyValueError::new_err(format!(
                "queries are [{heads}, {tokens}, {width}]; expected [a multiple of {kv_heads}, tokens, {key_dim}]"
            )));
        }
        let mut output_memory = output.borrow()?;
        let output = output_memory.elements()?;
        let expected = tokens * heads * value_dim;
        if output.len() != expected {
            return Err(PyValueError::new_err(format!("the output has {} numbers; expected {expected}", output.len())));
        }
        let threads = options.threads;
        let report = interruptible(py, |proceed| {
            let cache = self.inner.read().unwrap_or_else(PoisonError::into_inner);
            let first_position = first_position.unwrap_or(cache.len().saturating_sub(tokens));
            let team = teams::team(threads);
            teams::with_scratch(|scratch| {
                attention.run_cached(queries, first_position, &cache, output, &team, scratch, proceed)
            })
        })?;
        Ok(report.into())
    }

    /// Drops all tokens from `length` on.
    fn truncate(&self, py: Python<'_>, length: usize) {
        py.detach(|| self.inner.write().unwrap_or_else(PoisonError::into_inner).truncate(length));
    }

    fn __len__(&self, py: Python<'_>) -> usize {
        py.detach(|| self.inner.read().unwrap_or_else(PoisonError::into_inner).len())
    }

    /// Bytes held for keys and values.
    #[getter]
    fn nbytes(&self, py: Python<'_>) -> usize {
        py.detach(|| self.inner.read().unwrap_or_else(PoisonError::into_inner).bytes())
    }

    /// `(kv_heads, key_dim, value_dim)`
    #[getter]
    fn shape(&self) -> (usize, usize, usize) {
        (self.shape.kv_heads, self.shape.key_dim, self.shape.value_dim)
    }

    /// `f32`, `bf16` or `int8`.
    #[getter]
    fn kv_type(&self, py: Python<'_>) -> &'static str {
        py.detach(|| self.inner.read().unwrap_or_else(PoisonError::into_inner).kind().name())
    }
}
