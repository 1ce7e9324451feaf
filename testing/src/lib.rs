//! What the tests of IceFormer share: an f64 reference, tolerances and deterministic random data.

#![forbid(unsafe_code)]

pub mod attention;
pub mod compare;
pub mod elementwise;
pub mod recall;

// What tests and measurements share.
pub use iceformer_study::{random, synthetic};
