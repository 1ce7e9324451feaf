//! Asking for memory before it is needed.

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
const DISTANCE: usize = 8 << 10;

/// What a micro-tile asks the memory for while it computes: for each page of its keys, then for each page of its values, one
/// that is needed soon. The lines of a page are asked for one by one between products, as many on their way at a time would
/// make the processor wait, and in the order of memory, as it fetches more by itself where they follow one another.
#[derive(Clone, Copy, Default)]
pub(super) struct Ahead {
    of_keys: Pages,
    of_values: Pages,
    /// The next block's scales of keys and of values. One line of each belongs to a page.
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
        let distance = |bytes: usize| DISTANCE.div_ceil(bytes.max(1)) + value_pages;
        let (keys, values) = block.addresses();
        let (keys, values) = (run(keys, key_bytes), run(values, value_bytes));
        Self {
            of_keys: from(distance(key_bytes), keys, values),
            of_values: from(distance(value_bytes), values, run(next.addresses().0, key_bytes)),
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
    ) -> *const u8 {
        if now == rows && channels == value_dim {
            return self.value_page(page);
        }
        let Pass { ref pages, column, first_row } = *pass;
        let earlier = pages.len() * (column * rows + channels * first_row);
        let passed = (earlier + (page - pages.start) * channels * now) / rows;
        let part = self.of_values.after.bytes / value_dim * (passed % value_dim);
        self.value_page(pages.start + passed / value_dim).wrapping_add(part)
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
        self.scales.map(|scales| std::ptr::without_provenance(scales + 64 * self.first_page))
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

/// Asks for the line `offset` bytes from `address`, to the cache `LEVEL`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn fetch_to<const LEVEL: u8>(address: *const u8, offset: usize) {
    let level = if LEVEL == SECOND { CacheLevel::Second } else { CacheLevel::First };
    level.fetch(address, offset as isize);
}
