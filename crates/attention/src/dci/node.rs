//! A node of the tree: some keys, one behind the other in the order of their positions.

use iceformer_kernels::AlignedBuffer;
use iceformer_kernels::half::bf16;
use iceformer_kernels::panels::{PANEL_ROWS, Panels, fetch, row_mut};

use super::projections::{Directions, Projections};

/// Vectors of keys, `[panels][row width][PANEL_ROWS]`.
pub(crate) enum PanelBuffer {
    F32(AlignedBuffer<f32>),
    Bf16(AlignedBuffer<u16>),
}

impl PanelBuffer {
    /// Full precision, or half the memory.
    pub(crate) fn new(full: bool) -> Self {
        if full { Self::F32(AlignedBuffer::default()) } else { Self::Bf16(AlignedBuffer::default()) }
    }

    /// Writes row `rows`, the next.
    pub(crate) fn push(&mut self, rows: usize, row: &[f32]) {
        let length = (rows + 1).next_multiple_of(PANEL_ROWS) * row.len();
        match self {
            Self::F32(buffer) => {
                buffer.grow(length);
                row_mut(buffer, rows, row.len()).zip(row).for_each(|(place, &value)| *place = value);
            }
            Self::Bf16(buffer) => {
                buffer.grow(length);
                let places = row_mut(buffer, rows, row.len());
                places.zip(row).for_each(|(place, &value)| *place = bf16::from_f32(value).to_bits());
            }
        }
    }

    pub(crate) fn panels(&self) -> Panels<'_> {
        match self {
            Self::F32(panels) => Panels::F32(panels),
            Self::Bf16(panels) => Panels::Bf16(panels),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::F32(panels) => panels.bytes(),
            Self::Bf16(panels) => panels.bytes(),
        }
    }
}

/// A key that climbed to the node's height, and the keys of the level below that were nearest to it when they came.
///
/// A key stands in one node only, that of the highest level it climbed to; below, it is present as the owner of a node.
/// The lists only ever grow at their end, so the tree as it was at an earlier position is a prefix of every list:
/// causal queries of a whole prompt run in parallel on the finished tree, each cut at its own position.
pub(crate) struct Node {
    /// Positions, ascending.
    pub keys: Vec<u32>,
    /// `[keys]`: the key's node one level down; empty at the lowest.
    pub below: Vec<u32>,
    pub squared_norms: Vec<f32>,
    panels: PanelBuffer,
    /// Only of nodes too large to be evaluated whole.
    projections: Option<Box<Projections>>,
}

/// What is asked of many nodes before one is read.
pub(crate) struct Outline {
    /// Position of the key that the node belongs to; 0 for the root.
    pub owner: u32,
    /// The owner's node one level down; `None` at the lowest, and for the root.
    pub own_below: Option<u32>,
    /// Number of keys.
    keys: u32,
    /// Behind the position of the last.
    end: u32,
}

impl Outline {
    pub(crate) fn new(owner: u32, own_below: Option<u32>) -> Self {
        Self { owner, own_below, keys: 0, end: 0 }
    }

    /// Takes in what `node` holds now.
    pub(crate) fn update(&mut self, node: &Node) {
        self.keys = node.keys.len() as u32;
        self.end = node.keys.last().map_or(0, |last| last + 1);
    }

    /// [`Node::keys_before`] of `node`, to which this belongs, which is seldom looked at.
    pub(crate) fn keys_before(&self, node: &Node, end: usize) -> usize {
        if self.end as usize <= end { self.keys as usize } else { node.keys_before(end) }
    }
}

impl Node {
    pub(crate) fn new(full_precision: bool) -> Self {
        Self {
            keys: Vec::new(),
            below: Vec::new(),
            squared_norms: Vec::new(),
            panels: PanelBuffer::new(full_precision),
            projections: None,
        }
    }

    /// Appends a key; `row` is filled up with zeros.
    pub(crate) fn push(&mut self, key: u32, row: &[f32], squared_norm: f32, below: Option<u32>) {
        self.panels.push(self.keys.len(), row);
        self.keys.push(key);
        self.squared_norms.push(squared_norm);
        self.below.extend(below);
    }

    /// Projects the keys that are not yet, where there are more than `whole_node`.
    pub(crate) fn project(&mut self, directions: &Directions, whole_node: usize) {
        if self.keys.len() > whole_node {
            let projections = self.projections.get_or_insert_default();
            let keys = self.keys.len();
            projections.extend(directions, self.panels.panels(), keys);
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
        self.keys.partition_point(|&key| (key as usize) < end)
    }

    /// Number of keys at positions below `start`, among the first `end`.
    pub(crate) fn keys_from(&self, start: usize, end: usize) -> usize {
        if start == 0 { 0 } else { self.keys[..end].partition_point(|&key| (key as usize) < start) }
    }

    /// Vectors of the keys.
    pub(crate) fn panels(&self) -> Panels<'_> {
        self.panels.panels()
    }

    /// Asks for the vectors ahead of their use: nodes lie anywhere in memory.
    pub(crate) fn fetch(&self) {
        fetch(self.panels());
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of::<Self>()
            + 4 * (self.keys.capacity() + self.below.capacity() + self.squared_norms.capacity())
            + self.panels.bytes()
            + self.projections.as_ref().map_or(0, |projections| projections.bytes())
    }
}
