//! The passes of a micro-tile over the values of its block.

use std::ops::Range;

use super::tile::MicroTile;
use super::{FEW_ROWS, PAGE_KEYS};

/// Vectors of sums for each of up to six rows in one pass: with the vectors of values they fill the registers.
const PANELS: usize = 4;
/// As many for each of two rows.
const WIDE_PANELS: usize = 8;

/// How few rows read values of more than four panels, which take more than one pass: for some pages after the others, so
/// that the later passes find them in the first-level cache, beside what was asked for.
pub(super) struct WideValues {
    /// Pages to pass over before the next ones.
    pub pages: usize,
    /// Whether a pass takes eight panels for two rows, in the order of memory, rather than four panels for all rows.
    pub by_rows: bool,
}

impl WideValues {
    /// Pages that a pass over values of this width has come to before the lines of as many were asked for.
    pub const fn pages_passed_early(&self, value_dim: usize) -> usize {
        if value_dim > PANELS * PAGE_KEYS { self.pages / 2 } else { 0 }
    }
}

/// Some pages, rows and value channels.
pub(super) struct Pass {
    pub pages: Range<usize>,
    /// First of the channels.
    pub column: usize,
    /// First of the rows.
    pub first_row: usize,
}

/// What adds values to the output of `ROWS` rows.
pub(super) trait WeightedValues<const ROWS: usize> {
    /// How few rows read wide values.
    const WIDE: WideValues;

    /// Does so for `NOW` rows and `PANELS` · 16 channels.
    ///
    /// # Safety
    /// The machine has the kernel's features; the pointers of `tile` hold for `ROWS` rows, and `pass` stays within its pages,
    /// rows and value width.
    unsafe fn add<const NOW: usize, const PANELS: usize>(&mut self, tile: &MicroTile<'_>, pass: Pass);

    /// All of the output has met the block's first values: earlier sums have shrunk as they must.
    fn has_shrunk(&mut self);
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
    // One or two rows take one pass over eight panels.
    let in_one_pass = if by_rows && ROWS <= 2 { WIDE_PANELS } else { PANELS };
    let is_wide = ROWS <= FEW_ROWS && tile.value_dim > in_one_pass * PAGE_KEYS;
    let pages_at_once = if is_wide { K::WIDE.pages } else { tile.pages };
    let mut first = 0;
    while first < tile.pages {
        let pages = first..tile.pages.min(first + pages_at_once);
        let mut column = 0;
        while column < tile.value_dim {
            let panels = (tile.value_dim - column) / PAGE_KEYS;
            let pass = |first_row: usize| Pass { pages: pages.clone(), column, first_row };
            // SAFETY: forwarded from the caller; the panels are within the value width, the rows within `ROWS`.
            unsafe {
                match panels {
                    WIDE_PANELS.. if by_rows => match ROWS {
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
                    },
                    PANELS.. => kernel.add::<ROWS, PANELS>(tile, pass(0)),
                    3 => kernel.add::<ROWS, 3>(tile, pass(0)),
                    2 => kernel.add::<ROWS, 2>(tile, pass(0)),
                    _ => kernel.add::<ROWS, 1>(tile, pass(0)),
                }
            }
            let taken = if by_rows && panels >= WIDE_PANELS { WIDE_PANELS } else { panels.min(PANELS) };
            column += taken * PAGE_KEYS;
        }
        kernel.has_shrunk();
        first = pages.end;
    }
}

/// Lines to ask for with each pair of keys in a pass for `now` of `rows` rows over `bytes` of their values: all of them, or
/// half where another pass takes as long.
pub(super) const fn lines_of_pair(bytes: usize, now: usize, rows: usize) -> usize {
    bytes.div_ceil(if now < rows { 128 } else { 64 })
}
