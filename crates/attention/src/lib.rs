//! Attention on the CPU over a paged key/value cache, on plain slices: no runtime, no tensors.

#![forbid(unsafe_code)]

mod cache;
mod method;

pub use cache::{CacheShape, KeyValueCache, KeyValueType};
pub use iceformer_kernels::ThreadTeam;
pub use method::{Attention, AttentionScratch, Mask, Method, Queries, Report};
