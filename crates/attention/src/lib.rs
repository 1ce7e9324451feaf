//! Attention on the CPU over a paged key/value cache, on plain slices: no runtime, no tensors.
//!
//! ```
//! use iceformer_attention::{
//!     Attention, AttentionScratch, CacheShape, KeyValueCache, KeyValueType, Mask, Method, Queries, ThreadTeam,
//! };
//!
//! let team = ThreadTeam::new(2);
//! let mut cache = KeyValueCache::new(CacheShape { kv_heads: 1, key_dim: 2, value_dim: 2 }, KeyValueType::F32);
//! cache.append(&[1.0, 0.0, 0.0, 1.0], &[1.0, 2.0, 3.0, 4.0], &team);
//! let attention = Attention { method: Method::Exact, mask: Mask::causal(), scale: 1.0 };
//! let queries = Queries { data: &[0.0, 0.0], query_heads: 1, first_position: 1 };
//! let mut output = [0.0; 2];
//! attention.run(queries, &cache, &mut output, None, &team, &mut AttentionScratch::default());
//! assert_eq!(output, [2.0, 3.0]); // equal logits: the mean of both values
//! ```

mod arrays;
mod budgeted;
mod cache;
mod dci;
mod exact;
mod few;
mod mask;
mod method;
mod output;
mod page;
mod places;
mod report;
mod rounding;
mod segment;
mod short;
mod strided;
mod tiles;

pub use arrays::{ArrayScratch, Arrays, ArraysError};
pub use budgeted::{BudgetError, BudgetSettings};
pub use cache::{CacheShape, KeyValueCache, KeyValueType};
pub use dci::{DciSettings, DciSettingsError};
pub use exact::AttentionScratch;
pub use iceformer_kernels::{InstructionSet, ThreadTeam};
pub use mask::Mask;
pub use method::{Attention, Method, MethodError, Queries, Sequence};
pub use report::{HeadReport, MassHistogram, Report};
pub use strided::{Elements, ElementsMut, StridedError, StridedView};
