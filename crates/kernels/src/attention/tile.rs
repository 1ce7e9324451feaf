//! The query side of an attention tile and its walk over key blocks.

use std::ops::Range;

use super::ahead::Ahead;
use super::block::KeyBlock;
use super::expand::expand;
use super::float::FloatMicroTile;
#[cfg(target_arch = "x86_64")]
use super::value_scales::scale_values;
#[cfg(target_arch = "x86_64")]
use super::{FEW_ROWS, amx as amx_kernel, bf16 as bf16_kernel, int8 as int8_kernel, int8_avx2};
use super::{KEY_DIM_MULTIPLE, MAX_BLOCK_KEYS, MICRO_ROWS, PAGE_KEYS, VALUE_DIM_MULTIPLE, queries};
#[cfg(target_arch = "x86_64")]
use crate::amx::{Elements, PRODUCT_ROWS};
use crate::{AlignedBuffer, InstructionSet, brain_bits, simd};

/// Shape of the queries, keys and values of a tile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TileShape {
    /// Query rows.
    pub rows: usize,
    /// Width of keys in a page, a multiple of [`KEY_DIM_MULTIPLE`].
    pub key_dim: usize,
    /// Width of values in a page, a multiple of [`VALUE_DIM_MULTIPLE`].
    pub value_dim: usize,
}

/// What the products of a tile are computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arithmetic {
    /// f32 queries; keys and values widened to f32 where they are not.
    F32,
    /// bf16 queries and weights, f32 sums.
    Bf16,
    /// int8 queries against int8 keys, int16 weights against int8 values.
    Int8,
    /// The same integers, each widened to 16 bits before it is multiplied.
    Int16,
}

impl Arithmetic {
    /// Bytes of a query's number.
    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::Int16 => 2,
            Self::Int8 => 1,
        }
    }
}

/// Nats in one unit of the scores, which are logarithms of base 2.
pub(super) const NATS: f32 = std::f32::consts::LN_2;

/// Query rows of one key/value head with their running softmax and output.
///
/// Use: [`begin`](Self::begin), [`set_row`](Self::set_row) for every row, [`accumulate`](Self::accumulate) for every
/// block of keys in order, then [`finish_row`](Self::finish_row).
#[derive(Default)]
pub struct AttentionTile {
    pub(super) instruction_set: Option<InstructionSet>,
    arithmetic: Option<Arithmetic>,
    /// What scores are soft-capped to, in their unit; 0: nothing.
    soft_cap: f32,
    pub(super) shape: TileShape,
    /// `[rows][key_dim]`, of the type that the arithmetic takes; multiplied by the factor on the logits and by log2 e, as the
    /// kernels compute powers of two.
    queries_f32: AlignedBuffer<f32>,
    queries_bf16: AlignedBuffer<u16>,
    queries_int8: AlignedBuffer<i8>,
    queries_int16: AlignedBuffer<i16>,
    /// Value of one integer step of a row's queries (int8), else unused. `[rows]`
    query_scales: Vec<f32>,
    /// −128 · Σ of a row's integers: what the offset of the keys adds to every dot product. `[rows]`
    query_offsets: Vec<i32>,
    /// First and one-past-last key each row sees. `[rows]`
    visible: Vec<(usize, usize)>,
    /// Largest score so far. `[rows]`
    pub(super) maxima: Vec<f32>,
    /// Sum of weights so far, by lane. `[rows][16]`
    pub(super) sums: AlignedBuffer<f32>,
    /// Weighted sum of values so far. `[rows][value_dim]`
    pub(super) output: AlignedBuffer<f32>,
    /// Scores of a micro-tile. `[MICRO_ROWS][MAX_BLOCK_KEYS]`, or a strip of AMX tiles.
    scores: AlignedBuffer<f32>,
    /// Weights of a micro-tile in bf16 or int16, laid out as the scores.
    pub(super) weights: AlignedBuffer<u16>,
    expanded_keys: AlignedBuffer<f32>,
    expanded_values: AlignedBuffer<f32>,
    /// Int8 values of a block as brain floats, for AMX. `[pages · 8][value_dim][2]`
    brain_values: AlignedBuffer<u16>,
    /// Int8: scale of each value over the largest of the block, in steps of a weight. `[pages · 16]`
    value_factors: Vec<f32>,
}

/// Up to so many rows of an int8 block the vector kernel is faster, as it need not widen the values first.
const FEW_INT8_ROWS: usize = 12;
/// Up to so many rows of an int8 block integers are faster than f32 in vectors of 512 bits.
const FEW_INT16_ROWS: usize = 12;
/// Up to so many rows widening a bf16 block for each micro-tile is faster than expanding it first.
const FEW_BRAIN_ROWS: usize = 12;
#[cfg(target_arch = "x86_64")]
const AMX_STRIP: usize = amx_kernel::STRIP;
#[cfg(not(target_arch = "x86_64"))]
const AMX_STRIP: usize = 0;
#[cfg(not(target_arch = "x86_64"))]
const PRODUCT_ROWS: usize = MICRO_ROWS;

/// Smallest running maximum: finite, so that a row that has seen nothing yet never computes −∞ − −∞, and no logit's.
pub(super) const NOTHING_SEEN: f32 = f32::MIN;

/// Pointers of one micro-tile: `ROWS` rows of a tile against one block (or the visible pages of it).
/// Row `r` of queries starts `r · key_dim` elements on, of scores and weights `r · MAX_BLOCK_KEYS`, of sums
/// `r · 16`, of output `r · value_dim`; all rows are inside the tile's buffers for `r < ROWS`.
pub(super) struct MicroTile<'a> {
    pub pages: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    pub queries: *const u8,
    pub query_scales: *const f32,
    pub query_offsets: *const i32,
    pub keys: *const u8,
    pub key_scales: *const f32,
    pub values: *const u8,
    pub maxima: *mut f32,
    pub sums: *mut f32,
    pub output: *mut f32,
    pub scores: *mut f32,
    pub weights: *mut u16,
    /// Int8: factor of each key on the weights, `[pages · 16]`.
    pub value_factors: *const f32,
    /// Int8: value of one step of weight · value.
    pub value_step: f32,
    /// Int8: whether no value is so much larger than another that weights, rounded in relation to the largest of the
    /// block, would lose what counts for a row that does not attend to it.
    pub values_are_even: bool,
    /// What scores are soft-capped to, in their unit (f32 only); 0: nothing.
    pub soft_cap: f32,
    /// What to ask the memory for meanwhile. One micro-tile of a block does it.
    pub ahead: Option<Ahead>,
    /// First key of the first page, and what each row sees, when some row does not see all of the pages.
    pub mask: Option<(usize, &'a [(usize, usize)])>,
}

impl MicroTile<'_> {
    /// Sets the scores of keys that a row may not see to −∞.
    #[inline(always)]
    pub(super) unsafe fn apply_mask<const ROWS: usize>(&mut self) {
        let Some((first, visible)) = self.mask else { return };
        let keys = self.pages * PAGE_KEYS;
        for (row, (start, end)) in visible.iter().take(ROWS).enumerate() {
            // SAFETY: row `row` of scores holds at least `keys` elements.
            let scores = unsafe { std::slice::from_raw_parts_mut(self.scores.add(row * MAX_BLOCK_KEYS), keys) };
            let start = start.saturating_sub(first).min(keys);
            let end = end.saturating_sub(first).min(keys).max(start);
            scores[..start].fill(f32::NEG_INFINITY);
            scores[end..].fill(f32::NEG_INFINITY);
        }
    }
}

impl AttentionTile {
    /// Starts a new tile: all rows empty, nothing accumulated. `kind` is any block of the cache to come (only its type
    /// matters), which decides the arithmetic together with the instruction set.
    pub fn begin(&mut self, instruction_set: InstructionSet, shape: TileShape, kind: KeyBlock<'_>) {
        self.begin_capped(instruction_set, shape, kind, None);
    }

    /// As [`begin`](Self::begin); scores `s` become `limit · tanh(s / limit)` where there is a `soft_cap`, and all is
    /// then computed in f32.
    pub fn begin_capped(
        &mut self,
        instruction_set: InstructionSet,
        shape: TileShape,
        kind: KeyBlock<'_>,
        soft_cap: Option<f32>,
    ) {
        assert!(instruction_set <= InstructionSet::detected(), "this machine has no {}", instruction_set.name());
        assert_eq!(shape.key_dim % KEY_DIM_MULTIPLE, 0, "key width {} is not padded", shape.key_dim);
        assert_eq!(shape.value_dim % VALUE_DIM_MULTIPLE, 0, "value width {} is not padded", shape.value_dim);
        let TileShape { rows, key_dim, value_dim } = shape;
        // What follows multiplies them by one another and by the keys of a block.
        let fits = |width: usize| {
            rows.max(MAX_BLOCK_KEYS).checked_mul(width).is_some_and(|count| count <= isize::MAX as usize / 4)
        };
        assert!(fits(key_dim) && fits(value_dim), "no memory holds {shape:?}");
        self.instruction_set = Some(instruction_set);
        self.soft_cap = soft_cap.unwrap_or(0.0) / NATS;
        let arithmetic = match (instruction_set, kind) {
            _ if soft_cap.is_some() => Arithmetic::F32,
            (level, KeyBlock::Bf16 { .. }) if multiplies_brain_floats(level) => Arithmetic::Bf16,
            (level, KeyBlock::Int8 { .. }) if level >= InstructionSet::Avx512Vnni => Arithmetic::Int8,
            (InstructionSet::Avx2, KeyBlock::Int8 { .. }) => Arithmetic::Int16,
            (InstructionSet::Avx512, KeyBlock::Int8 { .. }) if rows <= FEW_INT16_ROWS => Arithmetic::Int16,
            _ => Arithmetic::F32,
        };
        self.arithmetic = Some(arithmetic);
        self.shape = shape;
        match arithmetic {
            Arithmetic::F32 => self.queries_f32.grow(rows * key_dim),
            Arithmetic::Bf16 => self.queries_bf16.grow(rows * key_dim),
            Arithmetic::Int8 => self.queries_int8.grow(rows * key_dim),
            Arithmetic::Int16 => {
                self.queries_int8.grow(key_dim);
                self.queries_int16.grow(rows * key_dim);
            }
        }
        self.query_scales.resize(rows, 1.0);
        self.query_offsets.resize(rows, 0);
        self.visible.clear();
        self.visible.resize(rows, (0, 0));
        self.maxima.clear();
        self.maxima.resize(rows, NOTHING_SEEN);
        self.sums.grow(rows * PAGE_KEYS);
        self.sums.fill(0.0);
        self.output.grow(rows * value_dim);
        self.output.fill(0.0);
        let room = (MICRO_ROWS * MAX_BLOCK_KEYS).max(AMX_STRIP);
        self.scores.grow(room);
        self.weights.grow(room);
    }

    /// Multiplies bf16 as such from here on, on a processor too that is slow at it.
    #[cfg(test)]
    pub(super) fn multiply_brain_floats(&mut self) {
        self.arithmetic = Some(Arithmetic::Bf16);
        self.queries_bf16.grow(self.shape.rows * self.shape.key_dim);
    }

    /// Name of the kernel that [`accumulate`](Self::accumulate) runs for many rows, as reports print it.
    pub fn kernel_name(instruction_set: InstructionSet, kind: KeyBlock<'_>) -> &'static str {
        match (instruction_set, kind) {
            (InstructionSet::Amx, KeyBlock::Bf16 { .. }) => "amx-bf16-32x32",
            (InstructionSet::Amx, KeyBlock::Int8 { .. }) => "amx-int8-32x32",
            (level, KeyBlock::Bf16 { .. }) if multiplies_brain_floats(level) => "avx512-bf16-6x64",
            (InstructionSet::Avx512Vnni | InstructionSet::Avx512Bf16, KeyBlock::Int8 { .. }) => "avx512-vnni-6x64",
            (InstructionSet::Portable, _) => "portable-f32-6x16",
            (InstructionSet::Avx2, KeyBlock::Int8 { .. }) => "avx2-int16-6x8",
            (InstructionSet::Avx2, _) => "avx2-f32-6x16",
            _ => "avx512-f32-6x64",
        }
    }

    /// Sets row `row`: its query (at most `key_dim` long, the rest counts as zero), the factor on its logits, and the
    /// keys it sees (`start..end`).
    pub fn set_row(&mut self, row: usize, query: &[f32], scale: f32, (start, end): (usize, usize)) {
        let key_dim = self.shape.key_dim;
        assert!(query.len() <= key_dim, "a query of width {} for keys of width {key_dim}", query.len());
        let range = row * key_dim..(row + 1) * key_dim;
        self.visible[row] = (start, end.max(start));
        let arithmetic = self.arithmetic.expect("begin was called");
        let factor = scale / NATS;
        match arithmetic {
            Arithmetic::F32 => {
                let target = &mut self.queries_f32[range];
                target.iter_mut().zip(query).for_each(|(target, value)| *target = value * factor);
                target[query.len()..].fill(0.0);
            }
            Arithmetic::Bf16 => {
                let target = &mut self.queries_bf16[range];
                for (target, value) in target.iter_mut().zip(query) {
                    *target = brain_bits(value * factor);
                }
                target[query.len()..].fill(0);
            }
            Arithmetic::Int8 | Arithmetic::Int16 => {
                let is_widened = arithmetic == Arithmetic::Int16;
                let target = &mut self.queries_int8[if is_widened { 0..key_dim } else { range.clone() }];
                let level = self.instruction_set.expect("begin was called");
                let (step, sum) = queries::quantise(level, query, target);
                target[query.len()..].fill(0);
                // A negative factor moves into the integers: the row maximum needs a positive step. What is no number may
                // have left −128.
                let sign = if factor < 0.0 { -1 } else { 1 };
                if sign < 0 {
                    target.iter_mut().for_each(|value| *value = value.wrapping_neg());
                }
                self.query_scales[row] = step * factor.abs();
                self.query_offsets[row] = -128 * sum * sign;
                if self.query_scales[row] == 0.0 {
                    // All scores are zero; a scale of zero would make NaN of the −∞ of keys that the row may not see.
                    target.fill(0);
                    (self.query_scales[row], self.query_offsets[row]) = (1.0, 0);
                }
                if is_widened {
                    let wide = &mut self.queries_int16[range];
                    wide.iter_mut().zip(target).for_each(|(wide, integer)| *wide = i16::from(*integer));
                }
            }
        }
    }

    /// Adds the keys of `block`, whose first key has index `first_key`, to every row that sees them. `next` is the
    /// block of the call that follows, if one is known: it is fetched from memory meanwhile.
    ///
    /// # Panics
    /// When the slices of the block are no whole number of pages of this tile's shape, have more than
    /// [`MAX_BLOCK_KEYS`] keys, or the block is of another type than [`begin`](Self::begin) was told.
    pub fn accumulate(&mut self, first_key: usize, block: KeyBlock<'_>, next: Option<KeyBlock<'_>>) {
        self.accumulate_in(first_key, block, next, self.micro_tiles(), |_| true);
    }

    /// As [`accumulate`](Self::accumulate), for those of `micro_tiles` that `wanted` names: number `i` holds the rows
    /// from `i ·` [`MICRO_ROWS`] on.
    ///
    /// # Panics
    /// As [`accumulate`](Self::accumulate).
    pub fn accumulate_in(
        &mut self,
        first_key: usize,
        block: KeyBlock<'_>,
        next: Option<KeyBlock<'_>>,
        micro_tiles: Range<usize>,
        wanted: impl Fn(usize) -> bool,
    ) {
        let TileShape { key_dim, value_dim, .. } = self.shape;
        let rows = micro_tiles.start * MICRO_ROWS..self.shape.rows.min(micro_tiles.end * MICRO_ROWS);
        let (key_elements, value_elements) = match block {
            KeyBlock::F32 { keys, values } => (keys.len(), values.len()),
            KeyBlock::Bf16 { keys, values } => (keys.len(), values.len()),
            KeyBlock::Int8 { keys, values, .. } => (keys.len(), values.len()),
        };
        let pages = value_elements / (PAGE_KEYS * value_dim);
        if let KeyBlock::Int8 { key_scales, value_scales, .. } = block {
            assert_eq!(key_scales.len(), pages * PAGE_KEYS, "one scale for each key");
            assert_eq!(value_scales.len(), pages * PAGE_KEYS, "one scale for each value");
        }
        assert_eq!(value_elements, pages * PAGE_KEYS * value_dim, "values are whole pages");
        assert_eq!(key_elements, pages * PAGE_KEYS * key_dim, "as many pages of keys as of values");
        assert!(pages * PAGE_KEYS <= MAX_BLOCK_KEYS, "{pages} pages are more than one block");
        let end_key = first_key + pages * PAGE_KEYS;
        if !self.visible[rows.clone()].iter().any(|&(start, end)| start < end_key && end > first_key && start < end) {
            return;
        }
        let level = self.instruction_set.expect("begin was called");
        let wanted_rows = || micro_tiles.clone().filter(|tile| wanted(*tile)).count() * MICRO_ROWS;
        let arithmetic = self.arithmetic.expect("begin was called");
        let amx = level == InstructionSet::Amx
            && match arithmetic {
                Arithmetic::F32 | Arithmetic::Int16 => false,
                Arithmetic::Bf16 => true,
                Arithmetic::Int8 => rows.len() > FEW_INT8_ROWS && wanted_rows() > FEW_INT8_ROWS,
            };
        let (mut value_step, mut values_are_even) = (0.0, true);
        let mut value_factors = std::ptr::null();
        let (mut stored_as, mut is_in_place) = (arithmetic, true);
        // Base pointers of the block as the arithmetic wants it.
        let (keys, key_scales, values): (*const u8, *const f32, *const u8) = match (arithmetic, block) {
            (Arithmetic::F32, KeyBlock::F32 { keys, values }) => {
                (keys.as_ptr().cast(), std::ptr::null(), values.as_ptr().cast())
            }
            (Arithmetic::F32, KeyBlock::Bf16 { keys, values }) if wanted_rows() <= FEW_BRAIN_ROWS => {
                stored_as = Arithmetic::Bf16;
                (keys.as_ptr().cast(), std::ptr::null(), values.as_ptr().cast())
            }
            (Arithmetic::F32, block) => {
                is_in_place = false;
                self.expanded_keys.grow(key_elements);
                self.expanded_values.grow(value_elements);
                let (keys, values) = (&mut self.expanded_keys, &mut self.expanded_values);
                expand(level, block, key_dim, value_dim, &mut keys[..key_elements], &mut values[..value_elements]);
                (self.expanded_keys.as_ptr().cast(), std::ptr::null(), self.expanded_values.as_ptr().cast())
            }
            (Arithmetic::Bf16, KeyBlock::Bf16 { keys, values }) => {
                (keys.as_ptr().cast(), std::ptr::null(), values.as_ptr().cast())
            }
            #[cfg(target_arch = "x86_64")]
            (Arithmetic::Int8, KeyBlock::Int8 { keys, key_scales, values, value_scales }) if amx => {
                value_factors = value_scales.as_ptr();
                self.brain_values.grow(value_elements);
                // SAFETY: a level is only in use when this machine has it.
                unsafe { amx_kernel::widen(values, &mut self.brain_values) };
                (keys.as_ptr(), key_scales.as_ptr(), self.brain_values.as_ptr().cast())
            }
            #[cfg(target_arch = "x86_64")]
            (Arithmetic::Int8 | Arithmetic::Int16, KeyBlock::Int8 { keys, key_scales, values, value_scales }) => {
                stored_as = Arithmetic::Int8;
                self.value_factors.resize(value_scales.len(), 0.0);
                (value_step, values_are_even) = scale_values(level, value_scales, &mut self.value_factors);
                value_factors = self.value_factors.as_ptr();
                (keys.as_ptr(), key_scales.as_ptr(), values.as_ptr().cast())
            }
            _ => panic!("the block is of another type than the tile began with"),
        };
        let query_base: *const u8 = match arithmetic {
            Arithmetic::F32 => self.queries_f32.as_ptr().cast(),
            Arithmetic::Bf16 => self.queries_bf16.as_ptr().cast(),
            Arithmetic::Int8 => self.queries_int8.as_ptr().cast(),
            Arithmetic::Int16 => self.queries_int16.as_ptr().cast(),
        };
        let (query_bytes, key_bytes) = (arithmetic.bytes(), stored_as.bytes());
        let value_bytes = if amx { size_of::<u16>() } else { key_bytes };

        let (key_page, value_page) = (PAGE_KEYS * key_dim * key_bytes, PAGE_KEYS * value_dim * key_bytes);
        // Only where the block is used in place: an expanded one is read by `expand`.
        let mut ahead = match next.filter(|_| is_in_place) {
            #[cfg(target_arch = "x86_64")]
            _ if !amx && matches!(arithmetic, Arithmetic::Bf16 | Arithmetic::Int8) && rows.len() <= FEW_ROWS => {
                let wide = if arithmetic == Arithmetic::Bf16 { bf16_kernel::WIDE } else { int8_kernel::WIDE };
                Some(Ahead::along(block, next, pages, key_page, value_page, wide.pages_behind(rows.len(), value_dim)))
            }
            next => next.map(|next| Ahead::of_next(next, key_page, value_page)),
        };
        let micro_rows = if amx { PRODUCT_ROWS } else { MICRO_ROWS };
        let mut together = Vec::new();
        // Once for all micro-tiles: those of AMX are kept, and would not outlive another borrow.
        let (maxima, sums, output) = (self.maxima.as_mut_ptr(), self.sums.as_mut_ptr(), self.output.as_mut_ptr());
        let (scores, weights) = (self.scores.as_mut_ptr(), self.weights.as_mut_ptr());
        let mut next_row = rows.start;
        while next_row < rows.end {
            let row = next_row;
            // The rows of wanted micro-tiles that follow one another, as many as the kernel takes.
            let end_of = |row: usize| (row / MICRO_ROWS + 1) * MICRO_ROWS;
            let mut end = row;
            while end < rows.end.min(row + micro_rows) && wanted(end / MICRO_ROWS) {
                end = end_of(end).min(row + micro_rows).min(rows.end);
            }
            if end == row {
                next_row = end_of(row);
                continue;
            }
            next_row = end;
            let visible = &self.visible[row..end];
            // Only the pages that some row sees; a row that sees nothing here does not widen them.
            let seeing = visible.iter().filter(|(start, end)| start < end && *start < end_key && *end > first_key);
            let Some((start, end)) = seeing.fold(None, |bounds: Option<(usize, usize)>, &(start, end)| {
                Some(bounds.map_or((start, end), |(low, high)| (low.min(start), high.max(end))))
            }) else {
                continue;
            };
            let first_page = start.saturating_sub(first_key) / PAGE_KEYS;
            let last_page = end.min(end_key).saturating_sub(first_key).div_ceil(PAGE_KEYS);
            let start_key = first_key + first_page * PAGE_KEYS;
            let stop_key = first_key + last_page * PAGE_KEYS;
            let partial = visible.iter().any(|&(start, end)| start > start_key || end < stop_key);
            // SAFETY: all offsets stay inside the buffers checked above: `row + ROWS <= rows`, and
            // `first_page + pages <= pages of the block`.
            let mut tile = unsafe {
                MicroTile {
                    pages: last_page - first_page,
                    key_dim,
                    value_dim,
                    queries: query_base.add(row * key_dim * query_bytes),
                    query_scales: self.query_scales.as_ptr().add(row),
                    query_offsets: self.query_offsets.as_ptr().add(row),
                    keys: keys.add(first_page * PAGE_KEYS * key_dim * key_bytes),
                    key_scales: if key_scales.is_null() { key_scales } else { key_scales.add(first_page * PAGE_KEYS) },
                    values: values.add(first_page * PAGE_KEYS * value_dim * value_bytes),
                    maxima: maxima.add(row),
                    sums: sums.add(row * PAGE_KEYS),
                    output: output.add(row * value_dim),
                    scores,
                    weights,
                    value_factors: if value_factors.is_null() {
                        value_factors
                    } else {
                        value_factors.add(first_page * PAGE_KEYS)
                    },
                    value_step,
                    values_are_even,
                    soft_cap: self.soft_cap,
                    ahead: ahead.take().map(|ahead| ahead.starting_at(first_page)),
                    mask: partial.then_some((start_key, visible)),
                }
            };
            if amx {
                together.push((visible.len(), tile));
                continue;
            }
            // SAFETY: the pointers hold for `visible.len()` rows, and `begin` checked the instruction set.
            unsafe { run_micro_tile(level, arithmetic, stored_as, visible.len(), &mut tile) }
        }
        #[cfg(target_arch = "x86_64")]
        if amx {
            let elements = if arithmetic == Arithmetic::Bf16 { Elements::Bf16 } else { Elements::Int8 };
            // SAFETY: the pointers hold for the rows beside them, and `begin` checked the instruction set.
            unsafe { amx_kernel::micro_tiles(elements, &together) }
        }
    }

    /// Its micro-tiles, by number.
    pub fn micro_tiles(&self) -> Range<usize> {
        0..self.shape.rows.div_ceil(MICRO_ROWS)
    }
}

/// Whether tiles multiply bf16 as such at this level: not without the instructions, and not where they are slow. Keys and
/// values of bf16 are widened to f32 there.
pub fn multiplies_brain_floats(level: InstructionSet) -> bool {
    match level {
        InstructionSet::Avx512Bf16 => !InstructionSet::brain_dots_are_slow(),
        level => level > InstructionSet::Avx512Bf16,
    }
}

/// Enters the kernel of the instruction set and the number of rows.
///
/// # Safety
/// The machine has the instruction set, and the pointers of `tile` hold for `rows` rows in this arithmetic, with keys and
/// values of the type of `stored_as`.
unsafe fn run_micro_tile(
    level: InstructionSet,
    arithmetic: Arithmetic,
    stored_as: Arithmetic,
    rows: usize,
    tile: &mut MicroTile<'_>,
) {
    // SAFETY: forwarded from the caller.
    unsafe {
        match (arithmetic, level) {
            #[cfg(target_arch = "x86_64")]
            (Arithmetic::Bf16, _) => bf16_kernel::micro_tile_rows(rows, tile),
            #[cfg(target_arch = "x86_64")]
            (Arithmetic::Int8, _) => int8_kernel::micro_tile_rows(rows, tile),
            #[cfg(target_arch = "x86_64")]
            (Arithmetic::Int16, _) => int8_avx2::micro_tile_rows(rows, tile),
            _ => simd::run(level, FloatMicroTile { tile, rows, brain: stored_as == Arithmetic::Bf16 }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys of no width have scales all the same, and the kernels read them.
    #[test]
    #[should_panic(expected = "one scale for each key")]
    fn keys_without_scales_are_refused_whatever_their_width() {
        let block = KeyBlock::Int8 { keys: &[], key_scales: &[], values: &[0; 256], value_scales: &[1.0; 16] };
        let mut tile = AttentionTile::default();
        tile.begin(InstructionSet::current(), TileShape { rows: 1, key_dim: 0, value_dim: 16 }, block);
        tile.set_row(0, &[], 1.0, (0, 16));
        tile.accumulate(0, block, None);
    }
}
