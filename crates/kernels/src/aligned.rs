//! Buffers that start on a cache line.

use bytemuck::{Pod, Zeroable};

use crate::arena::HugePageLines;

/// One cache line. Vectors of it give 64-byte aligned storage without an allocator of our own.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct CacheLine([u8; 64]);

/// Cache lines of `length` elements.
pub(crate) fn lines_of<T>(length: usize) -> usize {
    (length * size_of::<T>()).div_ceil(size_of::<CacheLine>())
}

/// A zero-initialised buffer of plain numbers, 64-byte aligned, so that a 512-bit load never crosses a line.
pub struct AlignedBuffer<T> {
    lines: Lines,
    length: usize,
    element: std::marker::PhantomData<T>,
}

/// Where a buffer lies.
enum Lines {
    Own(Vec<CacheLine>),
    HugePage(HugePageLines),
}

impl Lines {
    fn all(&self) -> &[CacheLine] {
        match self {
            Self::Own(lines) => lines,
            Self::HugePage(lines) => lines,
        }
    }

    fn all_mut(&mut self) -> &mut [CacheLine] {
        match self {
            Self::Own(lines) => lines,
            Self::HugePage(lines) => lines,
        }
    }
}

impl<T> Default for AlignedBuffer<T> {
    fn default() -> Self {
        Self { lines: Lines::Own(Vec::new()), length: 0, element: std::marker::PhantomData }
    }
}

impl<T> Clone for AlignedBuffer<T> {
    fn clone(&self) -> Self {
        Self { lines: Lines::Own(self.lines.all().to_vec()), length: self.length, element: self.element }
    }
}

impl<T: Pod> AlignedBuffer<T> {
    /// `length` zeros.
    pub fn zeroed(length: usize) -> Self {
        let mut buffer = Self::default();
        buffer.grow(length);
        buffer
    }

    /// The first `length` elements of `lines`.
    pub(crate) fn in_huge_page(lines: HugePageLines, length: usize) -> Self {
        Self { lines: Lines::HugePage(lines), length, element: std::marker::PhantomData }
    }

    /// Makes the buffer `length` elements long. New elements are zero, or what an earlier, longer use left.
    pub fn grow(&mut self, length: usize) {
        let lines = lines_of::<T>(length);
        if lines > self.lines.all().len() {
            if let Lines::HugePage(shorter) = &self.lines {
                self.lines = Lines::Own(shorter.to_vec());
            }
            if let Lines::Own(own) = &mut self.lines {
                own.resize(lines, CacheLine::zeroed());
            }
        }
        self.length = length;
    }

    /// Bytes held in memory.
    pub fn bytes(&self) -> usize {
        let lines = match &self.lines {
            Lines::Own(lines) => lines.capacity(),
            Lines::HugePage(lines) => lines.len(),
        };
        lines * size_of::<CacheLine>()
    }
}

impl<T: Pod> std::ops::Deref for AlignedBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(self.lines.all())[..self.length]
    }
}

impl<T: Pod> std::ops::DerefMut for AlignedBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(self.lines.all_mut())[..self.length]
    }
}

/// A growing byte buffer, aligned to cache lines, whose contents do not survive growth in any meaningful way.
#[derive(Default)]
pub(crate) struct AlignedScratch {
    buffer: AlignedBuffer<u8>,
}

impl AlignedScratch {
    /// The first `bytes` bytes; grows (with zeros) when shorter, keeps whatever was there otherwise.
    pub(crate) fn bytes(&mut self, bytes: usize) -> &mut [u8] {
        self.buffer.grow(bytes);
        &mut self.buffer
    }
}
