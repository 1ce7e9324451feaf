//! What the tests of IceFormer share: an f64 reference, tolerances and deterministic random data.

#![forbid(unsafe_code)]

pub mod attention;
pub mod compare;
pub mod elementwise;
pub mod random;
pub mod recall;
pub mod synthetic;
