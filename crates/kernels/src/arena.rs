//! Memory in huge pages for what grows piece by piece.

use std::sync::Arc;

use bytemuck::Pod;
use memmap2::MmapOptions;

use crate::AlignedBuffer;
use crate::aligned::{CacheLine, lines_of};

/// Bytes of a huge page.
const HUGE_PAGE: usize = 2 << 20;
/// Bytes handed out in ordinary memory first, so that at most a quarter more is held than is used.
const SMALL_BYTES: usize = 8 << 20;

/// Hands out zeroed buffers, the first megabytes from the ordinary allocator and those after from huge pages, where the
/// system has them: a walk over many small buffers otherwise waits for page tables, and the processor fetches nothing ahead
/// beyond a small page. A huge page is given back once none of its buffers is left.
#[derive(Default)]
pub struct HugePageArena {
    /// Bytes handed out and not returned.
    held: usize,
    /// The page in use, and how many of its lines are.
    page: Option<(Arc<HugePage>, usize)>,
}

impl HugePageArena {
    /// `length` zeros.
    pub fn zeroed<T: Pod>(&mut self, length: usize) -> AlignedBuffer<T> {
        let lines = lines_of::<T>(length);
        let bytes = lines * size_of::<CacheLine>();
        self.held += bytes;
        // What does not fit well would leave much of a page unused.
        if self.held <= SMALL_BYTES || bytes > HUGE_PAGE / 4 {
            return AlignedBuffer::zeroed(length);
        }
        match self.carve(lines) {
            Some(lines) => AlignedBuffer::in_huge_page(lines, length),
            None => AlignedBuffer::zeroed(length),
        }
    }

    /// Notes that buffers of so many bytes were dropped or lie elsewhere by now: what is small stays small however often it
    /// is cut and grows again.
    pub fn returned(&mut self, bytes: usize) {
        self.held = self.held.saturating_sub(bytes);
    }

    /// Whether what comes next may still lie in ordinary memory.
    pub fn is_small(&self) -> bool {
        self.held < SMALL_BYTES
    }

    /// Bytes handed out and not [`returned`](Self::returned).
    pub fn held(&self) -> usize {
        self.held
    }

    /// The next `lines` of the page in use, or of a new one; `None` where the system gives none.
    fn carve(&mut self, lines: usize) -> Option<HugePageLines> {
        if self.page.as_ref().is_none_or(|(page, used)| used + lines > page.lines) {
            self.page = Some((Arc::new(HugePage::new()?), 0));
        }
        let (page, used) = self.page.as_mut()?;
        // SAFETY: `used + lines` are within the page.
        let first = unsafe { page.first.add(*used) };
        *used += lines;
        Some(HugePageLines { first, lines, _page: page.clone() })
    }
}

/// Memory for one huge page, aligned as the system wants it.
struct HugePage {
    first: *mut CacheLine,
    lines: usize,
    /// Owns the memory.
    _memory: memmap2::MmapMut,
}

// SAFETY: the memory is reached through its carved lines alone, no two of which overlap.
unsafe impl Send for HugePage {}
// SAFETY: as above; the page itself reads and writes nothing.
unsafe impl Sync for HugePage {}

impl HugePage {
    fn new() -> Option<Self> {
        let map = |bytes: usize| MmapOptions::new().len(bytes).map_anon().ok();
        let is_aligned = |memory: &memmap2::MmapMut| memory.as_ptr().align_offset(HUGE_PAGE) == 0;
        // Not every system aligns it; what is never touched beside the page costs no memory.
        let mut memory = map(HUGE_PAGE).filter(is_aligned).or_else(|| map(2 * HUGE_PAGE))?;
        #[cfg(target_os = "linux")]
        // Without huge pages it serves as well, only slower.
        let _ = memory.advise(memmap2::Advice::HugePage);
        let start = memory.as_mut_ptr();
        let before = start.align_offset(HUGE_PAGE);
        // SAFETY: nothing lies before an aligned page, and of two pages at most all but one byte of the first.
        let first = unsafe { start.add(before) }.cast();
        Some(Self { first, lines: HUGE_PAGE / size_of::<CacheLine>(), _memory: memory })
    }
}

/// Some lines of a huge page, nobody else's.
pub(crate) struct HugePageLines {
    first: *mut CacheLine,
    lines: usize,
    /// Keeps the memory.
    _page: Arc<HugePage>,
}

// SAFETY: it owns its lines as a box would.
unsafe impl Send for HugePageLines {}
// SAFETY: shared references only read.
unsafe impl Sync for HugePageLines {}

impl std::ops::Deref for HugePageLines {
    type Target = [CacheLine];

    fn deref(&self) -> &[CacheLine] {
        // SAFETY: zeroed or written memory within the page, which lives as long as `self`; carved once.
        unsafe { std::slice::from_raw_parts(self.first, self.lines) }
    }
}

impl std::ops::DerefMut for HugePageLines {
    fn deref_mut(&mut self) -> &mut [CacheLine] {
        // SAFETY: as above, and `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.first, self.lines) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_and_apart_whatever_they_lie_in() {
        let mut arena = HugePageArena::default();
        let lengths = [1000, 4096, 17, 100_000, 300_000, 0];
        let mut buffers: Vec<AlignedBuffer<u32>> = Vec::new();
        for index in 0..400 {
            let mut buffer = arena.zeroed::<u32>(lengths[index % lengths.len()]);
            assert_eq!(buffer.len(), lengths[index % lengths.len()]);
            assert!(buffer.iter().all(|value| *value == 0), "buffer {index}");
            assert_eq!(buffer.as_ptr().align_offset(64), 0, "buffer {index}");
            buffer.fill(index as u32 + 1);
            buffers.push(buffer);
        }
        assert!(arena.page.is_some(), "the later ones lie in huge pages");
        for (index, buffer) in buffers.iter().enumerate() {
            assert!(buffer.iter().all(|value| *value == index as u32 + 1), "buffer {index}");
        }
        drop(arena);
        // Grown beyond its lines a buffer keeps what it holds.
        let kept = &mut buffers[399 - 399 % lengths.len() + 1];
        let first = kept[0];
        kept.grow(500_000);
        assert!(kept[..4096].iter().all(|value| *value == first));
        assert!(kept[4096..].iter().all(|value| *value == 0));
        assert_eq!(kept.clone()[..], kept[..]);
    }

    #[test]
    fn what_was_returned_does_not_count() {
        let mut arena = HugePageArena::default();
        let _kept = arena.zeroed::<u8>(HUGE_PAGE);
        for _ in 0..100 {
            let bytes = arena.zeroed::<u8>(HUGE_PAGE / 8).bytes();
            arena.returned(bytes);
        }
        assert!(arena.page.is_none() && arena.held() == HUGE_PAGE, "{} bytes held", arena.held());
        let buffers: Vec<AlignedBuffer<u8>> = (0..49).map(|_| arena.zeroed(HUGE_PAGE / 8)).collect();
        assert!(arena.page.is_some(), "{} bytes are many", buffers.len() * HUGE_PAGE / 8);
        arena.returned(usize::MAX);
        assert_eq!(arena.held(), 0);
    }

    #[test]
    fn a_page_is_given_back_with_its_last_buffer() {
        let mut arena = HugePageArena { held: SMALL_BYTES, page: None };
        let buffers: Vec<AlignedBuffer<u8>> = (0..5).map(|_| arena.zeroed(HUGE_PAGE / 4)).collect();
        let page = Arc::downgrade(&arena.page.as_ref().expect("a page in use").0);
        assert_eq!(page.strong_count(), 2, "the fifth quarter lies in a second page, which the arena holds too");
        drop(arena);
        assert_eq!(page.strong_count(), 1);
        drop(buffers);
        assert_eq!(page.strong_count(), 0);
    }
}
