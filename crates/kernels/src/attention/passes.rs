//! The passes of a micro-tile over the values of its block.

use std::ops::Range;

use super::tile::MicroTile;
use super::{FEW_ROWS, PAGE_KEYS};

/// Vectors of sums for each of up to six rows in one pass: with the vectors of values they fill the registers.
const PANELS: usize = 4;
/// As many for each of two rows.
const WIDE_PANELS: usize = 8;

/// The way in which few rows read values that take more than one pass: some pages after others, so that the later passes
/// find them in the first-level cache, beside what was asked for.
pub(super) struct WideValues {
    /// Pages to pass over before the next ones.
    pub pages: usize,
    /// Whether a pass takes eight panels for two rows, in the order of memory, rather than four panels for all rows.
    pub by_rows: bool,
}

impl WideValues {
    /// Passes of `rows` rows over values of this width.
    const fn passes(&self, rows: usize, value_dim: usize) -> usize {
        let panels = value_dim / PAGE_KEYS;
        if self.by_rows && rows <= FEW_ROWS {
            panels / WIDE_PANELS * rows.div_ceil(2) + (panels % WIDE_PANELS).div_ceil(PANELS)
        } else {
            panels.div_ceil(PANELS)
        }
    }

    /// Pages by which requests in the order of memory fall behind the first of the passes of `rows` rows.
    pub const fn pages_behind(&self, rows: usize, value_dim: usize) -> usize {
        match self.passes(rows, value_dim) {
            0 | 1 => 0,
            passes => self.pages - self.pages / passes,
        }
    }
}

/// Some pages, rows and value channels.
pub(super) struct Pass {
    /// Those from page 0 on are the first that meet the output: it shrinks with them to what it counts for beside the block.
    pub pages: Range<usize>,
    /// First of the channels.
    pub column: usize,
    /// First of the rows.
    pub first_row: usize,
}

/// What adds values to the output of `ROWS` rows.
pub(super) trait WeightedValues<const ROWS: usize> {
    /// The way in which few rows read wide values.
    const WIDE: WideValues;

    /// Adds those of `NOW` rows and `CHANNEL_PANELS` · 16 channels.
    ///
    /// # Safety
    /// The machine has the kernel's features; the pointers of `tile` hold for `ROWS` rows, and `pass` stays within its pages,
    /// rows and value width.
    unsafe fn add<const NOW: usize, const CHANNEL_PANELS: usize>(&mut self, tile: &MicroTile<'_>, pass: Pass);
}

/// Runs all passes, each of which takes some channels of all rows, or for few rows as the kernel says.
///
/// # Safety
/// The machine has the kernel's features; the pointers of `tile` hold for `ROWS` rows.
#[inline(always)]
pub(super) unsafe fn pass_over_values<const ROWS: usize, K: WeightedValues<ROWS>>(
    tile: &MicroTile<'_>,
    kernel: &mut K,
) {
    let by_rows = K::WIDE.by_rows && ROWS <= FEW_ROWS;
    let is_cut = ROWS <= FEW_ROWS && K::WIDE.passes(ROWS, tile.value_dim) > 1;
    let pages_at_once = if is_cut { K::WIDE.pages } else { tile.pages };
    let mut first = 0;
    while first < tile.pages {
        let pages = first..tile.pages.min(first + pages_at_once);
        let mut column = 0;
        while column < tile.value_dim {
            let panels = (tile.value_dim - column) / PAGE_KEYS;
            let pass = |first_row: usize| Pass { pages: pages.clone(), column, first_row };
            // SAFETY: forwarded from the caller; the panels are within the value width, the rows within `ROWS`.
            let taken = unsafe {
                match panels {
                    WIDE_PANELS.. if by_rows => {
                        match ROWS {
                            1 => kernel.add::<1, WIDE_PANELS>(tile, pass(0)),
                            2 => kernel.add::<2, WIDE_PANELS>(tile, pass(0)),
                            3 => {
                                kernel.add::<2, WIDE_PANELS>(tile, pass(0));
                                kernel.add::<1, WIDE_PANELS>(tile, pass(2));
                            }
                            _ => {
                                kernel.add::<2, WIDE_PANELS>(tile, pass(0));
                                kernel.add::<2, WIDE_PANELS>(tile, pass(2));
                            }
                        }
                        WIDE_PANELS
                    }
                    PANELS.. => {
                        kernel.add::<ROWS, PANELS>(tile, pass(0));
                        PANELS
                    }
                    3 => {
                        kernel.add::<ROWS, 3>(tile, pass(0));
                        3
                    }
                    2 => {
                        kernel.add::<ROWS, 2>(tile, pass(0));
                        2
                    }
                    _ => {
                        kernel.add::<ROWS, 1>(tile, pass(0));
                        1
                    }
                }
            };
            column += taken * PAGE_KEYS;
        }
        first = pages.end;
    }
}

/// Bytes to ask for with each pair of keys in a pass for `now` of `rows` rows over `bytes` of their values: as large a part
/// of them as of the work.
pub(super) const fn bytes_of_pair(bytes: usize, now: usize, rows: usize) -> usize {
    bytes * now / rows
}
