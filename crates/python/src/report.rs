//! What an attention call did, as Python sees it.

use iceformer_attention as attention;
use pyo3::prelude::*;

/// What an attention call did, over all heads and head by head.
#[pyclass(frozen, module = "iceformer")]
pub struct Report {
    inner: attention::Report,
    total: attention::HeadReport,
}

/// What was done for the queries of one head. A row is one query of one head.
#[pyclass(frozen, module = "iceformer")]
pub struct HeadReport {
    inner: attention::HeadReport,
}

impl From<attention::Report> for Report {
    fn from(inner: attention::Report) -> Self {
        Self { total: inner.total(), inner }
    }
}

fn describe(name: &str, report: &attention::HeadReport) -> String {
    format!(
        "{name}(rows={}, allowed_keys={}, evaluated_keys={}, kept_keys={}, kept_share={:.4}, fallback_rows={}, \
         rounded_rows={})",
        report.rows,
        report.allowed_keys,
        report.evaluated_keys,
        report.kept_keys,
        report.kept_share(),
        report.fallback_rows,
        report.rounded_rows
    )
}

macro_rules! figures {
    ($class:ident, $field:ident, { $($extra:tt)* }) => {
        #[pymethods]
        impl $class {
            $($extra)*

            /// Rows.
            #[getter]
            fn rows(&self) -> u64 {
                self.$field.rows
            }

            /// Rows that a method other than "exact" computed exactly because nothing else kept the budget or paid.
            #[getter]
            fn fallback_rows(&self) -> u64 {
                self.$field.fallback_rows
            }

            /// Rows that read keys and values rounded to a narrower type than the caller's, which takes a part of the
            /// budget (method "budgeted" with kv_type "auto").
            #[getter]
            fn rounded_rows(&self) -> u64 {
                self.$field.rounded_rows
            }

            /// (query, key) pairs that the mask allows.
            #[getter]
            fn allowed_keys(&self) -> u64 {
                self.$field.allowed_keys
            }

            /// (query, key) pairs whose logit was computed.
            #[getter]
            fn evaluated_keys(&self) -> u64 {
                self.$field.evaluated_keys
            }

            /// (query, key) pairs whose value entered the output.
            #[getter]
            fn kept_keys(&self) -> u64 {
                self.$field.kept_keys
            }

            /// Share of the allowed pairs whose value entered the output; 1 where nothing was allowed.
            #[getter]
            fn kept_share(&self) -> f64 {
                self.$field.kept_share()
            }

            /// The missed softmax mass that `share` of the rows stay below, as the method estimates it; None where it
            /// estimates none.
            #[pyo3(signature = (share=0.95))]
            fn missed_mass(&self, share: f64) -> Option<f32> {
                self.$field.estimated_missed_mass.quantile(share)
            }

            /// The missed softmax mass that `share` of the audited rows stay below (rows that were also computed
            /// exactly); None where none were.
            #[pyo3(signature = (share=0.95))]
            fn audited_missed_mass(&self, share: f64) -> Option<f32> {
                self.$field.audited_missed_mass.quantile(share)
            }

            fn __repr__(&self) -> String {
                describe(stringify!($class), &self.$field)
            }
        }
    };
}

figures!(Report, total, {
    /// One report for each query head.
    #[getter]
    fn heads(&self) -> Vec<HeadReport> {
        self.inner.heads.iter().map(|head| HeadReport { inner: head.clone() }).collect()
    }
});
figures!(HeadReport, inner, {});
