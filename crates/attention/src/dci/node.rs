//! A node of the tree: some keys, one behind the other in the order of their positions.

use std::ops::Range;

use iceformer_kernels::AlignedBuffer;
use iceformer_kernels::half::bf16;
use iceformer_kernels::rows::{Rows, fetch};

use super::projections::{Directions, Projections};

/// Vectors of a node's keys, `[keys][row width]`.
pub(crate) enum RowBuffer {
    F32(AlignedBuffer<f32>),
    Bf16(AlignedBuffer<u16>),
}

impl RowBuffer {
    /// Full precision, or half the memory.
    pub(crate) fn new(full: bool) -> Self {
        if full { Self::F32(AlignedBuffer::default()) } else { Self::Bf16(AlignedBuffer::default()) }
    }

    /// Writes row `rows`, the next.
    pub(crate) fn push(&mut self, rows: usize, row: &[f32]) {
        let range = rows * row.len()..(rows + 1) * row.len();
        match self {
            Self::F32(buffer) => {
                buffer.grow(range.end);
                buffer[range].copy_from_slice(row);
            }
            Self::Bf16(buffer) => {
                buffer.grow(range.end);
                let target = buffer[range].iter_mut().zip(row);
                target.for_each(|(target, value)| *target = bf16::from_f32(*value).to_bits());
            }
        }
    }

    /// Rows `range` of `width` numbers each.
    pub(crate) fn rows(&self, range: Range<usize>, width: usize) -> Rows<'_> {
        let range = range.start * width..range.end * width;
        match self {
            Self::F32(rows) => Rows::F32(&rows[range]),
            Self::Bf16(rows) => Rows::Bf16(&rows[range]),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::F32(rows) => rows.bytes(),
            Self::Bf16(rows) => rows.bytes(),
        }
    }
}

/// A key that climbed to the node's height, and the keys of the level below that were nearest to it when they came.
///
/// A key stands in one node only, that of the highest level it climbed to; below, it is present as the owner of a node.
/// The lists only ever grow at their end, so the tree as it was at an earlier position is a prefix of every list:
/// causal queries of a whole prompt run in parallel on the finished tree, each cut at its own position.
pub(crate) struct Node {
    /// Position of the key that the node belongs to; 0 for the root.
    pub owner: u32,
    /// The owner's node one level down; `None` at the lowest, and for the root.
    pub own_below: Option<u32>,
    /// Positions, ascending.
    pub keys: Vec<u32>,
    /// `[keys]`: the key's node one level down; empty at the lowest.
    pub below: Vec<u32>,
    pub squared_norms: Vec<f32>,
    rows: RowBuffer,
    /// Only of nodes too large to be evaluated whole.
    projections: Option<Box<Projections>>,
}

impl Node {
    pub(crate) fn new(owner: u32, own_below: Option<u32>, full_precision: bool) -> Self {
        Self {
            owner,
            own_below,
            keys: Vec::new(),
            below: Vec::new(),
            squared_norms: Vec::new(),
            rows: RowBuffer::new(full_precision),
            projections: None,
        }
    }

    /// Appends a key; `row` is filled up with zeros.
    pub(crate) fn push(&mut self, key: u32, row: &[f32], squared_norm: f32, below: Option<u32>) {
        self.rows.push(self.keys.len(), row);
        self.keys.push(key);
        self.squared_norms.push(squared_norm);
        self.below.extend(below);
    }

    /// Projects the keys that are not yet, where there are more than `whole_node`.
    pub(crate) fn project(&mut self, directions: &Directions, whole_node: usize) {
        if self.keys.len() > whole_node {
            let projections = self.projections.get_or_insert_default();
            let keys = self.keys.len();
            projections.extend(directions, self.rows.rows(0..keys, directions.width()), keys);
        }
    }

    /// Projections of a node with more keys than are evaluated whole.
    pub(crate) fn projections(&self) -> &Projections {
        self.projections.as_deref().expect("a large node is projected as it grows")
    }

    /// Drops all keys from position `end` on.
    pub(crate) fn truncate(&mut self, end: usize) {
        let keys = self.keys_before(end);
        self.keys.truncate(keys);
        self.below.truncate(keys);
        self.squared_norms.truncate(keys);
        if let Some(projections) = &mut self.projections {
            projections.truncate(keys);
        }
    }

    /// Number of keys at positions below `end`.
    pub(crate) fn keys_before(&self, end: usize) -> usize {
        match self.keys.last() {
            Some(&last) if last as usize >= end => self.keys.partition_point(|&key| (key as usize) < end),
            _ => self.keys.len(),
        }
    }

    /// Number of keys at positions below `start`, among the first `end`.
    pub(crate) fn keys_from(&self, start: usize, end: usize) -> usize {
        if start == 0 { 0 } else { self.keys[..end].partition_point(|&key| (key as usize) < start) }
    }

    /// Vectors of the keys `slots`.
    pub(crate) fn rows(&self, slots: Range<usize>, width: usize) -> Rows<'_> {
        self.rows.rows(slots, width)
    }

    /// Asks for the vectors ahead of their use: nodes lie anywhere in memory.
    pub(crate) fn fetch(&self, width: usize) {
        fetch(self.rows.rows(0..self.keys.len(), width));
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of::<Self>()
            + 4 * (self.keys.capacity() + self.below.capacity() + self.squared_norms.capacity())
            + self.rows.bytes()
            + self.projections.as_ref().map_or(0, |projections| projections.bytes())
    }
}
