//! Buffers that start on a cache line.

use bytemuck::{Pod, Zeroable};

/// One cache line. Vectors of it give 64-byte aligned storage without an allocator of our own.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct CacheLine([u8; 64]);

/// A zero-initialised buffer of plain numbers, 64-byte aligned, so that a 512-bit load never crosses a line.
#[derive(Clone)]
pub struct AlignedBuffer<T> {
    lines: Vec<CacheLine>,
    length: usize,
    element: std::marker::PhantomData<T>,
}

impl<T> Default for AlignedBuffer<T> {
    fn default() -> Self {
        Self { lines: Vec::new(), length: 0, element: std::marker::PhantomData }
    }
}

impl<T: Pod> AlignedBuffer<T> {
    /// `length` zeros.
    pub fn zeroed(length: usize) -> Self {
        let mut buffer = Self::default();
        buffer.grow(length);
        buffer
    }

    /// Makes the buffer `length` elements long. New elements are zero, or what an earlier, longer use left.
    pub fn grow(&mut self, length: usize) {
        let lines = (length * size_of::<T>()).div_ceil(size_of::<CacheLine>());
        if lines > self.lines.len() {
            self.lines.resize(lines, CacheLine::zeroed());
        }
        self.length = length;
    }

    /// Bytes held in memory.
    pub fn bytes(&self) -> usize {
        self.lines.capacity() * size_of::<CacheLine>()
    }
}

impl<T: Pod> std::ops::Deref for AlignedBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.length]
    }
}

impl<T: Pod> std::ops::DerefMut for AlignedBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.length]
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
