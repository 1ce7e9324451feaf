//! Settings by name.

use iceformer_attention::{Attention, BudgetSettings, DciSettings, KeyValueType, Method};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// The method of a name, with the budget where one is given.
pub fn method(name: &str, budget: Option<f32>) -> PyResult<Method> {
    let method = match (name, budget) {
        ("auto", None) | ("exact", _) => Method::Exact,
        ("auto" | "budgeted", Some(budget)) => Method::Budgeted(BudgetSettings { budget }),
        ("budgeted", None) => Method::Budgeted(BudgetSettings::DEFAULT),
        ("dci", _) => Method::Dci(DciSettings::PUBLISHED),
        _ => {
            let message = format!("method is {name:?}; expected \"auto\", \"exact\", \"budgeted\" or \"dci\"");
            return Err(PyValueError::new_err(message));
        }
    };
    if let Some(budget) = budget {
        let settings = BudgetSettings { budget };
        settings.validate().map_err(|error| PyValueError::new_err(error.to_string()))?;
    }
    Ok(method)
}

/// The cache type of a name; `None` for `auto`.
pub fn key_value_type(name: &str) -> PyResult<Option<KeyValueType>> {
    if name == "auto" {
        return Ok(None);
    }
    let found = KeyValueType::ALL.into_iter().find(|kind| kind.name() == name);
    found.map(Some).ok_or_else(|| {
        PyValueError::new_err(format!("kv_type is {name:?}; expected \"auto\", \"f32\", \"bf16\" or \"int8\""))
    })
}

/// The version of the package.
#[pyfunction]
pub fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// The name of the exact kernel that runs on keys and values of type `kv_type` on this machine.
#[pyfunction]
pub fn kernel(kv_type: &str) -> PyResult<&'static str> {
    Ok(Attention::kernel_name(key_value_type(kv_type)?.unwrap_or(KeyValueType::F32)))
}
