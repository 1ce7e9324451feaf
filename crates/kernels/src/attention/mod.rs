//! Attention tiles: many query rows against blocks of keys and values, with an online softmax.
//!
//! The unit of storage is a *page* of [`PAGE_KEYS`] keys, laid out as the matrix kernels read it: sixteen keys are
//! the sixteen lanes of a vector, so a score product is the same loop as a linear layer. Page layouts, with `key_dim`
//! padded to a multiple of [`KEY_DIM_MULTIPLE`] and `value_dim` to [`VALUE_DIM_MULTIPLE`] by zeros:
//!
//! | type | keys | values |
//! |---|---|---|
//! | f32 | `[key_dim][16]` | `[16][value_dim]` |
//! | bf16 | `[key_dim / 2][16][2]` | `[8][value_dim][2]` |
//! | int8 | `[key_dim / 4][16][4]`, u8 = integer + 128 | `[8][value_dim][2]`, i8 |
//!
//! [`AttentionTile`] is the tiled attention of FlashAttention (Dao et al. 2022) cut to a CPU's caches: block after
//! block of keys and values stays in the second-level cache while all rows of the tile pass over it, six at a time.

mod ahead;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod block;
mod clusters;
#[cfg(target_arch = "x86_64")]
mod clusters_bf16;
mod expand;
mod float;
#[cfg(target_arch = "x86_64")]
mod int8;
#[cfg(target_arch = "x86_64")]
mod int8_avx2;
mod masses;
mod moments;
#[cfg(target_arch = "x86_64")]
mod passes;
mod queries;
mod read;
mod running_softmax;
#[cfg(target_arch = "x86_64")]
mod softmax;
mod tile;
mod transpose;
#[cfg(target_arch = "x86_64")]
mod value_scales;
mod widened;

pub use ahead::fetch;
pub use block::KeyBlock;
pub use clusters::{ClusterQueries, ClusterSummaries, PANEL_CLUSTERS};
pub use masses::{add_squared_errors, largest, masses_in_place, sum_of_squared_errors, sums_up_to};
pub use moments::{KeyMoments, add_cross_moments, value_moments};
pub use read::{read_keys, read_values};
pub use tile::{AttentionTile, TileShape, multiplies_brain_floats};
pub use transpose::transpose_keys;

/// Keys in a page.
pub const PAGE_KEYS: usize = 16;
/// The key width in a page is a multiple of this.
pub const KEY_DIM_MULTIPLE: usize = 4;
/// The value width in a page is a multiple of this.
pub const VALUE_DIM_MULTIPLE: usize = 16;
/// Most keys of one block.
pub const MAX_BLOCK_KEYS: usize = 512;
/// Query rows of a micro-tile: 6 rows × 4 vectors fill 24 of 32 registers with sums.
pub const MICRO_ROWS: usize = 6;
/// Pairs of keys in a page.
#[cfg(target_arch = "x86_64")]
const PAGE_PAIRS: usize = PAGE_KEYS / 2;
/// Up to so many rows (a decode step of a group of heads) wait for memory: keys and values are read in order, each page once,
/// and the work on each takes much the same time.
#[cfg(target_arch = "x86_64")]
const FEW_ROWS: usize = 4;
/// Pages whose scores a micro-tile of `rows` rows computes side by side: more than a few are bound by the products, which
/// need the pages side by side.
#[cfg(target_arch = "x86_64")]
const fn pages_at_once(rows: usize) -> usize {
    if rows <= FEW_ROWS { 1 } else { 4 }
}
