//! Asking for memory before it is needed.

#[cfg(target_arch = "x86_64")]
use super::PAGE_KEYS;
use super::block::KeyBlock;
#[cfg(target_arch = "x86_64")]
use super::passes::Pass;
use crate::InstructionSet;

/// Asks the memory for the cache lines of `values`, which will be needed soon.
#[inline]
pub fn fetch<T>(values: &[T]) {
    let level = CacheLevel::wanted();
    for offset in (0..size_of_val(values)).step_by(64) {
        level.fetch(values.as_ptr(), offset as isize);
    }
}

/// The cache that lines are fetched to.
#[derive(Clone, Copy, Default)]
enum CacheLevel {
    #[default]
    First,
    Second,
}

impl CacheLevel {
    /// What suits the processor. A Xeon decodes 5 to 15 % faster where lines come to the second-level cache, as its first
    /// level waits for sixteen lines at most; a Zen 4 decodes 8 % faster where they come to the first, a Zen 5 3 %.
    #[inline]
    fn wanted() -> Self {
        if InstructionSet::is_intel() { Self::Second } else { Self::First }
    }

    /// Asks for the cache line `offset` bytes from `address`. Only a hint: any address may be given.
    #[inline(always)]
    fn fetch<T>(self, address: *const T, offset: isize) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
            let address = address.cast::<i8>().wrapping_offset(offset);
            // SAFETY: a prefetch never faults, whatever the address; SSE is part of x86-64.
            unsafe {
                match self {
                    Self::First => _mm_prefetch::<_MM_HINT_T0>(address),
                    Self::Second => _mm_prefetch::<_MM_HINT_T1>(address),
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (self, address, offset);
    }
}

/// How far ahead of its use a line is asked for in a walk that waits for memory.
#[cfg(target_arch = "x86_64")]
const DISTANCE: usize = 8 << 10;

/// What a micro-tile asks the memory for while it computes: for each page of its keys, then for each page of its values, one
/// that is needed soon. The lines of a page are asked for one by one between products, because the processor waits when too
/// many are on their way at a time, and in the order of memory, because it fetches more by itself where they follow one another.
#[derive(Clone, Copy, Default)]
pub(super) struct Ahead {
    of_keys: Pages,
    of_values: Pages,
    /// The next block's scales of keys and of values. One line of each belongs to a page.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    scales: [usize; 2],
    /// First page of the block that the micro-tile sees.
    first_page: usize,
    level: CacheLevel,
}

/// Where the pages to ask for lie: up to a turn in one place, from there on in another.
#[derive(Clone, Copy, Default)]
struct Pages {
    turn: usize,
    before: Run,
    after: Run,
}

/// Pages that follow one another.
#[derive(Clone, Copy, Default)]
struct Run {
    first: usize,
    bytes: usize,
}

impl Run {
    /// Address of page `page`.
    #[inline(always)]
    fn at(self, page: usize) -> usize {
        self.first.wrapping_add(page.wrapping_mul(self.bytes))
    }
}

impl Pages {
    #[inline(always)]
    fn at(self, page: usize) -> *const u8 {
        let address = if page < self.turn { self.before.at(page) } else { self.after.at(page - self.turn) };
        std::ptr::without_provenance(address)
    }
}

impl Ahead {
    /// The keys of the `next` block with the keys of this one, its values with the values: for many rows, which use the block
    /// again and again meanwhile. `key_bytes` and `value_bytes` are those of a page.
    pub fn of_next(next: KeyBlock<'_>, key_bytes: usize, value_bytes: usize) -> Self {
        let (keys, values) = next.addresses();
        let throughout =
            |first: usize, bytes: usize| Pages { turn: 0, before: Run::default(), after: Run { first, bytes } };
        Self {
            of_keys: throughout(keys, key_bytes),
            of_values: throughout(values, value_bytes),
            scales: next.scale_addresses(),
            first_page: 0,
            level: CacheLevel::wanted(),
        }
    }

    /// What a walk over the keys of `block`, of so many `pages`, its values and then the `next` block comes to after
    /// [`DISTANCE`], and `value_pages` more: for few rows, which wait for memory. By the time that a line comes it is about
    /// to be used.
    #[cfg(target_arch = "x86_64")]
    pub fn along(
        block: KeyBlock<'_>,
        next: Option<KeyBlock<'_>>,
        pages: usize,
        key_bytes: usize,
        value_bytes: usize,
        value_pages: usize,
    ) -> Self {
        // Without a next block this one's own lines, which are there.
        let next = next.unwrap_or(block);
        let run = |first: usize, bytes: usize| Run { first, bytes };
        let from = |distance: usize, walked: Run, then: Run| {
            let turn = pages.saturating_sub(distance);
            Pages { turn, before: run(walked.at(pages - turn), walked.bytes), after: then }
        };
        // As many pages in both phases, lest some be left out at the turns.
        let distance = DISTANCE.div_ceil(key_bytes.min(value_bytes).max(1)) + value_pages;
        let (keys, values) = block.addresses();
        let (keys, values) = (run(keys, key_bytes), run(values, value_bytes));
        Self {
            of_keys: from(distance, keys, values),
            of_values: from(distance, values, run(next.addresses().0, key_bytes)),
            scales: next.scale_addresses(),
            first_page: 0,
            level: CacheLevel::wanted(),
        }
    }

    /// As asked for by a micro-tile that sees pages from `first_page` of the block on.
    pub fn starting_at(self, first_page: usize) -> Self {
        Self { first_page, ..self }
    }

    /// What to ask for with page `page` of the keys.
    #[inline(always)]
    pub fn key_page(&self, page: usize) -> *const u8 {
        self.of_keys.at(self.first_page + page)
    }

    /// What to ask for with page `page` of the values.
    #[inline(always)]
    pub fn value_page(&self, page: usize) -> *const u8 {
        self.of_values.at(self.first_page + page)
    }

    /// What to ask for with page `page` of the values in a pass for `now` of `rows` rows that takes `channels` of
    /// `value_dim`: as much of each page as the pass takes of the work on it, in the order of memory over all passes.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn value_line(
        &self,
        pass: &Pass,
        page: usize,
        (now, rows): (usize, usize),
        (channels, value_dim): (usize, usize),
        element_bytes: usize,
    ) -> *const u8 {
        if now == rows && channels == value_dim {
            return self.value_page(page);
        }
        let Pass { ref pages, column, first_row } = *pass;
        let earlier = pages.len() * (column * rows + channels * first_row);
        let passed = (earlier + (page - pages.start) * channels * now) / rows;
        let page = self.value_page(pages.start + passed / value_dim);
        page.wrapping_add(passed % value_dim * PAGE_KEYS * element_bytes)
    }

    /// The cache that lines are asked for to: [`FIRST`] or [`SECOND`].
    #[cfg(target_arch = "x86_64")]
    pub fn level(&self) -> u8 {
        match self.level {
            CacheLevel::First => FIRST,
            CacheLevel::Second => SECOND,
        }
    }

    /// Asks for the line `offset` bytes from `address`.
    #[inline(always)]
    pub fn fetch(&self, address: *const u8, offset: usize) {
        self.level.fetch(address, offset as isize);
    }

    /// Asks for the next block's scales of page `page`.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn fetch_scales<const LEVEL: u8>(&self, page: usize) {
        for scales in self.scales() {
            fetch_to::<LEVEL>(scales, page * 64);
        }
    }

    /// The next block's scales of keys and of values, from the first page on that the micro-tile sees.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn scales(&self) -> [*const u8; 2] {
        self.scales.map(|scales| std::ptr::without_provenance(scales.wrapping_add(64 * self.first_page)))
    }
}

/// What kernels know at compile time of the cache that lines are asked for to, as a branch for each line would keep loops
/// from being unrolled: nothing is asked for at all, [`CacheLevel::First`] or [`CacheLevel::Second`].
#[cfg(target_arch = "x86_64")]
pub(super) const NOTHING: u8 = 0;
#[cfg(target_arch = "x86_64")]
pub(super) const FIRST: u8 = 1;
#[cfg(target_arch = "x86_64")]
pub(super) const SECOND: u8 = 2;

/// Asks for the line `offset` bytes from `address`, to the cache `LEVEL`, if any.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn fetch_to<const LEVEL: u8>(address: *const u8, offset: usize) {
    match LEVEL {
        FIRST => CacheLevel::First.fetch(address, offset as isize),
        SECOND => CacheLevel::Second.fetch(address, offset as isize),
        _ => {}
    }
}

/// Defines `micro_tile_rows`, which enters the `micro_tile::<ROWS, AHEAD>` of a kernel compiled with `$features`.
#[cfg(target_arch = "x86_64")]
macro_rules! enter_micro_tile {
    ($features:literal) => {
        /// Runs `rows` (1 to 6) rows.
        ///
        /// # Safety
        /// The machine has the features; the pointers of `tile` hold for `rows` rows with queries, keys and values of the types
        /// that the kernel takes.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn micro_tile_rows(rows: usize, tile: &mut MicroTile<'_>) {
            // SAFETY: forwarded from the caller.
            unsafe {
                match tile.ahead.map_or(ahead::NOTHING, |ahead| ahead.level()) {
                    ahead::FIRST => any_rows::<{ ahead::FIRST }>(rows, tile),
                    ahead::SECOND => any_rows::<{ ahead::SECOND }>(rows, tile),
                    _ => any_rows::<{ ahead::NOTHING }>(rows, tile),
                }
            }
        }

        /// As [`micro_tile_rows`], asking for lines to the cache `AHEAD`.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn any_rows<const AHEAD: u8>(rows: usize, tile: &mut MicroTile<'_>) {
            // SAFETY: forwarded from the caller.
            unsafe {
                match rows {
                    1 => micro_tile::<1, AHEAD>(tile),
                    2 => micro_tile::<2, AHEAD>(tile),
                    3 => micro_tile::<3, AHEAD>(tile),
                    4 => micro_tile::<4, AHEAD>(tile),
                    5 => micro_tile::<5, AHEAD>(tile),
                    _ => micro_tile::<6, AHEAD>(tile),
                }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use enter_micro_tile;

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    /// Keys and values of a block, some pages of them.
    struct Block {
        keys: Vec<u8>,
        values: Vec<i8>,
        scales: Vec<f32>,
    }

    impl Block {
        fn new(pages: usize, key_dim: usize, value_dim: usize) -> Self {
            let keys = pages * PAGE_KEYS;
            Self { keys: vec![0; keys * key_dim], values: vec![0; keys * value_dim], scales: vec![0.0; keys] }
        }

        fn block(&self) -> KeyBlock<'_> {
            let (key_scales, value_scales) = (&*self.scales, &*self.scales);
            KeyBlock::Int8 { keys: &self.keys, key_scales, values: &self.values, value_scales }
        }

        /// Addresses of its pages in the order in which they are read.
        fn pages(&self, pages: usize) -> Vec<usize> {
            let (keys, values) = self.block().addresses();
            let all = |first: usize, bytes: usize| (0..pages).map(move |page| first + page * (bytes / pages));
            all(keys, self.keys.len()).chain(all(values, self.values.len())).collect()
        }
    }

    #[test]
    fn few_rows_ask_for_each_page_of_a_walk_once_and_in_order() {
        for (key_dim, width, pages) in
            [(64, 64, 32), (128, 128, 32), (1024, 1024, 3), (16, 16, 2), (192, 128, 32), (64, 128, 32)]
        {
            let blocks: Vec<_> = (0..4).map(|_| Block::new(pages, key_dim, width)).collect();
            let read: Vec<usize> = blocks.iter().flat_map(|block| block.pages(pages)).collect();
            let mut asked = Vec::new();
            for (number, block) in blocks.iter().enumerate() {
                let next = blocks.get(number + 1).map(Block::block);
                let ahead = Ahead::along(block.block(), next, pages, PAGE_KEYS * key_dim, PAGE_KEYS * width, 0);
                asked.extend((0..pages).map(|page| ahead.key_page(page).addr()));
                asked.extend((0..pages).map(|page| ahead.value_page(page).addr()));
            }
            let distance = DISTANCE.div_ceil(PAGE_KEYS * width.min(key_dim)).min(pages);
            let known = read.len() - distance;
            assert_eq!(asked[..known], read[distance..], "widths {key_dim} and {width}, {pages} pages");
        }
    }

    #[test]
    fn the_passes_over_wide_values_ask_for_them_in_order() {
        // Keys of another width, whose pages come after the values'.
        let (pages, key_dim, value_dim) = (8, 192, 128);
        let (block, next) = (Block::new(pages, key_dim, value_dim), Block::new(pages, key_dim, value_dim));
        let ahead =
            Ahead::along(block.block(), Some(next.block()), pages, PAGE_KEYS * key_dim, PAGE_KEYS * value_dim, 0);
        for by_rows in [false, true] {
            let mut asked = Vec::new();
            for first in (0..pages).step_by(2) {
                for pass in 0..2 {
                    let (column, first_row) = if by_rows { (0, 2 * pass) } else { (64 * pass, 0) };
                    let pass = Pass { pages: first..first + 2, column, first_row };
                    let (now, channels) = if by_rows { (2, value_dim) } else { (4, 64) };
                    let line = |page: usize| ahead.value_line(&pass, page, (now, 4), (channels, value_dim), 1).addr();
                    asked.extend(pass.pages.clone().map(line));
                }
            }
            let halves = |page: usize| {
                let start = ahead.value_page(page).addr();
                [start, start + PAGE_KEYS * value_dim / 2]
            };
            assert_eq!(asked, (0..pages).flat_map(halves).collect::<Vec<_>>(), "by rows: {by_rows}");
        }
    }
}
