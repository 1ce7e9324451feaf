//! The native half of the Python package `iceformer`: what its Python half (`python/iceformer`) calls.
//!
//! Arrays cross the border as flat one-dimensional NumPy arrays with shape and strides beside them; the Python half
//! makes those without copying. The interpreter is released while anything is computed.

mod attend;
mod cache;
mod engine;
mod operand;
mod report;
mod settings;
mod teams;

use pyo3::prelude::*;

/// Native functions of `iceformer`.
#[pymodule]
mod _core {
    use iceformer_attention::InstructionSet;
    use iceformer_engine::silence_caught_panics;
    use pyo3::exceptions::PyValueError;
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::attend::attend;
    #[pymodule_export]
    use super::cache::Cache;
    #[pymodule_export]
    use super::engine::{Engine, Generation};
    #[pymodule_export]
    use super::report::{HeadReport, Report};
    #[pymodule_export]
    use super::settings::{kernel, version};
    #[pymodule_export]
    use super::teams::available_threads;

    /// # Errors
    /// `ValueError` where `ICEFORMER_ISA` names no instruction set that this machine has.
    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        silence_caught_panics();
        InstructionSet::from_environment().map(drop).map_err(PyValueError::new_err)
    }
}
