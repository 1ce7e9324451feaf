//! IceFormer: pretrained Transformers on long inputs on ordinary CPUs.
//!
//! [`attention`] works on plain slices and needs nothing else (`default-features = false`); `engine` (feature `engine`)
//! runs whole models from their files; `evaluation` (feature `evaluation`) compares methods on tasks and texts.

#![forbid(unsafe_code)]

pub use iceformer_attention as attention;
#[cfg(feature = "engine")]
pub use iceformer_engine as engine;
#[cfg(feature = "evaluation")]
pub use iceformer_evaluation as evaluation;
