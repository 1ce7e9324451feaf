//! What measurements and studies of attention need and the product does not: inputs ([`synthetic`], or a [`Dump`] of a
//! model, [tiled](tile) to any length), the [true error](error) of sampled rows, and [replays](replay) of choices of keys.
//!
//! Everything here is plain loops over slices, and nothing depends on the kernels that it judges.

pub mod dump;
pub mod error;
pub mod inputs;
pub mod random;
pub mod replay;
pub mod synthetic;
pub mod tile;

pub use dump::{Dump, DumpError, DumpWriter};
pub use inputs::{Inputs, Shape};
