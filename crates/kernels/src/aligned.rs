//! Byte buffers aligned to cache lines.

use bytemuck::{Pod, Zeroable};

/// One cache line.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

/// A growing buffer, aligned to cache lines, whose contents do not survive growth in any meaningful way.
#[derive(Default)]
pub(crate) struct AlignedScratch {
    lines: Vec<Line>,
}

impl AlignedScratch {
    /// The first `bytes` bytes; grows (with zeros) when shorter, keeps whatever was there otherwise.
    pub(crate) fn bytes(&mut self, bytes: usize) -> &mut [u8] {
        let lines = bytes.div_ceil(64);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line::zeroed());
        }
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..bytes]
    }
}
