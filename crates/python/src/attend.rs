//! One attention call on arrays.

use std::ops::{ControlFlow, Range};

use iceformer_attention::{Arrays, Attention, Mask};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::operand::{Operand, Output};
use crate::report::Report;
use crate::{settings, teams};

/// Which keys are seen, and how logits become weights.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Options {
    pub method: String,
    pub budget: Option<f32>,
    pub causal: bool,
    pub window: Option<usize>,
    pub scale: f32,
    pub first_position: usize,
    /// First and one-past-last key of each entry of the batch.
    pub key_ranges: Option<Vec<(usize, usize)>>,
    pub soft_cap: Option<f32>,
    pub sinks: Option<Vec<f32>>,
    pub kv_type: String,
    pub threads: usize,
}

impl Options {
    pub fn attention(&self) -> PyResult<Attention> {
        Ok(Attention {
            method: settings::method(&self.method, self.budget)?,
            mask: Mask { causal: self.causal, window: self.window, keys: None },
            scale: self.scale,
        })
    }
}

/// Calls `work` without the interpreter, and lets Ctrl-C through between its steps: `work` is given a function that
/// says whether to go on.
pub fn interruptible<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&mut dyn FnMut() -> ControlFlow<()>) -> ControlFlow<(), T> + Send,
) -> PyResult<T> {
    let (outcome, error) = py.detach(|| {
        let mut error = None;
        let mut proceed = || match Python::attach(|py| py.check_signals()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(signal) => {
                error = Some(signal);
                ControlFlow::Break(())
            }
        };
        (work(&mut proceed), error)
    });
    match (outcome, error) {
        (ControlFlow::Continue(value), _) => Ok(value),
        (ControlFlow::Break(()), Some(error)) => Err(error),
        (ControlFlow::Break(()), None) => unreachable!("only a signal stops a call"),
    }
}

/// Attention of `queries` `[batch, query_heads, tokens, key_dim]` over `keys` `[batch, kv_heads, keys, key_dim]` and
/// `values` `[batch, kv_heads, keys, value_dim]`, written to `output` `[batch, tokens, query_heads, value_dim]`.
#[pyfunction]
pub fn attend(
    py: Python<'_>,
    queries: Operand<'_>,
    keys: Operand<'_>,
    values: Operand<'_>,
    output: Output<'_>,
    options: Options,
) -> PyResult<Report> {
    let attention = options.attention()?;
    let key_value_type = settings::key_value_type(&options.kv_type)?;
    let (query_memory, key_memory, value_memory) = (queries.borrow()?, keys.borrow()?, values.borrow()?);
    let mut output_memory = output.borrow()?;
    let key_ranges: Option<Vec<Range<usize>>> =
        options.key_ranges.as_ref().map(|ranges| ranges.iter().map(|&(start, end)| start..end.max(start)).collect());
    let arrays = Arrays {
        queries: queries.view(&query_memory)?,
        keys: keys.view(&key_memory)?,
        values: values.view(&value_memory)?,
        key_value_type,
        first_position: options.first_position,
        key_ranges: key_ranges.as_deref(),
        soft_cap: options.soft_cap,
        sinks: options.sinks.as_deref(),
    };
    arrays.validate().map_err(|error| PyValueError::new_err(error.to_string()))?;
    let output = output_memory.elements()?;
    if output.len() != arrays.output_len() {
        let message = format!("the output has {} numbers; expected {}", output.len(), arrays.output_len());
        return Err(PyValueError::new_err(message));
    }
    let threads = options.threads;
    let report = interruptible(py, |proceed| {
        let team = teams::team(threads);
        teams::with_scratch(|scratch| attention.run_arrays(&arrays, output, &team, scratch, proceed))
    })?;
    Ok(report.into())
}
