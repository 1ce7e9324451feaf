//! The search index beside a cache: one tree of keys for each head, grown as the cache grows.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use iceformer_kernels::panels::Panels;
use iceformer_kernels::rows::ROW_MULTIPLE;

use super::lift::{Bound, larger_norm};
use super::node::{Node, Outline, PanelBuffer};
use super::parent::{Newcomer, ParentScratch, parent};
use super::projections::Directions;
use super::random::uniform;
use super::search::Search;
use super::settings::DciSettings;
use crate::{KeyValueCache, KeyValueType, ThreadTeam};

/// Keys taken from the cache at a time: bounds the memory of an append.
const BLOCK_KEYS: usize = 1024;
/// Keys of one task of the search for parents.
const TASK_KEYS: usize = 32;

/// Root of every tree.
pub(crate) const ROOT: u32 = 0;

/// A tree of keys for each head of a cache.
///
/// What the index holds is a function of settings and keys alone: in one piece, in chunks or one by one, on any number
/// of threads, truncated and refilled, it is the same.
pub(crate) struct DciIndex {
    settings: DciSettings,
    directions: Directions,
    heads: Vec<HeadIndex>,
    len: usize,
}

/// The tree of one head.
pub(crate) struct HeadIndex {
    full_precision: bool,
    nodes: Vec<Node>,
    /// One for each node.
    outlines: Vec<Outline>,
    /// Keys of the largest node there has been.
    largest_node: usize,
    /// Vectors of the first keys, up to `whole_range`, for queries that see no others.
    first_keys: PanelBuffer,
    /// `[keys]`: the largest squared norm of this key and all before it.
    largest_norms: Vec<f32>,
    incoming: Incoming,
}

/// Keys of a block on their way into the tree.
#[derive(Default)]
struct Incoming {
    /// `[keys][row width]`
    rows: Vec<f32>,
    squared_norms: Vec<f32>,
}

impl DciIndex {
    /// An empty index for the keys of `cache`.
    pub(crate) fn new(settings: &DciSettings, cache: &KeyValueCache) -> Self {
        let shape = cache.shape();
        let DciSettings { simple_indices, composite_indices, seed, .. } = *settings;
        let full_precision = full_precision(cache.kind());
        Self {
            settings: *settings,
            directions: Directions::new(simple_indices, composite_indices, shape.key_dim, seed),
            heads: (0..shape.kv_heads).map(|_| HeadIndex::new(full_precision)).collect(),
            len: 0,
        }
    }

    /// Whether the tree was, or would be, built alike under `settings`.
    pub(crate) fn fits(&self, settings: &DciSettings) -> bool {
        let built =
            |settings: &DciSettings| DciSettings { kept_keys: 1, query_beam: None, query_share: 1.0, ..*settings };
        built(&self.settings) == built(settings)
    }

    /// Vectors of the first keys of head `head`, up to `whole_range`.
    pub(crate) fn first_keys(&self, head: usize) -> Panels<'_> {
        self.heads[head].first_keys.panels()
    }

    /// A search of head `head` under `settings`, which [fit](Self::fits).
    pub(crate) fn search<'a>(&'a self, head: usize, settings: &'a DciSettings) -> Search<'a> {
        Search { index: &self.heads[head], directions: &self.directions, settings }
    }

    /// Takes in the keys of `cache` that are not yet held: `O(build_beam · keys^(1/levels))` products for each.
    pub(crate) fn extend(&mut self, cache: &KeyValueCache, team: &ThreadTeam, scratch: &[Mutex<ParentScratch>]) {
        while self.len < cache.len() {
            let block = self.len..cache.len().min(self.len + BLOCK_KEYS);
            // A decode step is shorter than waking the team takes.
            let alone = (block.len() < 16).then(|| ThreadTeam::new(1));
            self.extend_block(cache, block.clone(), alone.as_ref().unwrap_or(team), scratch);
            self.len = block.end;
        }
    }

    fn extend_block(
        &mut self,
        cache: &KeyValueCache,
        block: Range<usize>,
        team: &ThreadTeam,
        scratch: &[Mutex<ParentScratch>],
    ) {
        let whole_range = self.settings.whole_range;
        team.run_chunks(&mut self.heads, 1, |head, index, _| {
            index[0].read(cache, head, block.clone(), whole_range);
        });
        let levels: Vec<usize> = block.clone().map(|position| level(&self.settings, position)).collect();
        let padded = block.len().next_multiple_of(TASK_KEYS);
        let mut parents = vec![ROOT; self.heads.len() * padded];
        // From the top: a key's parent is one of the level above, and later keys there are cut off by position.
        for wanted in (0..self.settings.levels).rev() {
            let is_wanted = |offset: &usize| levels.get(*offset) == Some(&wanted);
            if wanted + 1 < self.settings.levels {
                team.run_chunks(&mut parents, TASK_KEYS, |task, parents, worker| {
                    let (head, first) = (task * TASK_KEYS / padded, task * TASK_KEYS % padded);
                    let index = &self.heads[head];
                    let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
                    for offset in (first..first + TASK_KEYS).filter(is_wanted) {
                        let (row, squared_norm) = index.incoming(offset);
                        let newcomer = Newcomer { row, squared_norm, position: block.start + offset, level: wanted };
                        parents[offset - first] =
                            parent(index, &self.directions, &self.settings, &newcomer, &mut scratch);
                    }
                });
            }
            let (directions, whole_node) = (&self.directions, self.settings.whole_node);
            team.run_chunks(&mut self.heads, 1, |head, index, _| {
                let index = &mut index[0];
                for offset in (0..block.len()).filter(is_wanted) {
                    let parent = parents[head * padded + offset];
                    index.insert(offset, block.start + offset, wanted, parent);
                    index.nodes[parent as usize].project(directions, whole_node);
                }
            });
        }
    }

    /// Drops all keys from `len` on.
    pub(crate) fn truncate(&mut self, len: usize) {
        if len < self.len {
            self.heads.iter_mut().for_each(|head| head.truncate(len));
            self.len = len;
        }
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.directions.bytes() + self.heads.iter().map(HeadIndex::bytes).sum::<usize>()
    }
}

/// Whether the index of a cache of this type holds keys in full; half precision adds little to the rounding of the
/// narrower caches.
pub(crate) fn full_precision(kind: KeyValueType) -> bool {
    kind == KeyValueType::F32
}

/// Level that the key at `position` climbs to.
///
/// The published rule sends a key of a prompt of `n` up with probability `n^(−1/levels)`, so that level `t` holds
/// `n^(1 − t/levels)` keys; it needs to know `n`. With the derivative of that number as the probability for the key at
/// position `n`, each level holds as many keys as published at every length, and none depends on what is to come.
fn level(settings: &DciSettings, position: usize) -> usize {
    let top = settings.levels - 1;
    if position == 0 {
        return top;
    }
    let number = uniform(settings.seed, position as u64);
    let probability = |level: usize| {
        let share = level as f64 / settings.levels as f64;
        (1.0 - share) * ((position + 1) as f64).powf(-share)
    };
    (1..=top).rev().find(|&level| number < probability(level)).unwrap_or(0)
}

impl HeadIndex {
    fn new(full_precision: bool) -> Self {
        Self {
            full_precision,
            nodes: vec![Node::new(full_precision)],
            outlines: vec![Outline::new(0, None)],
            largest_node: 0,
            first_keys: PanelBuffer::new(full_precision),
            largest_norms: Vec::new(),
            incoming: Incoming::default(),
        }
    }

    pub(crate) fn node(&self, node: u32) -> &Node {
        &self.nodes[node as usize]
    }

    pub(crate) fn outline(&self, node: u32) -> &Outline {
        &self.outlines[node as usize]
    }

    /// Number of keys of `node` at positions below `end`.
    pub(crate) fn keys_before(&self, node: u32, end: usize) -> usize {
        self.outline(node).keys_before(self.node(node), end)
    }

    /// Number of nodes.
    pub(crate) fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Keys of the largest node.
    pub(crate) fn largest_node(&self) -> usize {
        self.largest_node
    }

    /// Bound on the norms of the first `keys` keys.
    pub(crate) fn bound(&self, keys: usize) -> Bound {
        Bound::new(keys.checked_sub(1).map_or(0.0, |last| self.largest_norms[last]))
    }

    fn incoming(&self, offset: usize) -> (&[f32], f32) {
        let width = self.incoming.rows.len() / self.incoming.squared_norms.len();
        (&self.incoming.rows[offset * width..][..width], self.incoming.squared_norms[offset])
    }

    /// Fetches a block of keys and carries the bound on.
    fn read(&mut self, cache: &KeyValueCache, head: usize, block: Range<usize>, whole_range: usize) {
        let key_dim = cache.shape().key_dim;
        let width = key_dim.next_multiple_of(ROW_MULTIPLE);
        let Incoming { rows, squared_norms } = &mut self.incoming;
        rows.clear();
        rows.resize(block.len() * width, 0.0);
        squared_norms.clear();
        for (row, position) in rows.chunks_exact_mut(width).zip(block) {
            cache.read_centred_key(head, position, &mut row[..key_dim]);
            if position < whole_range {
                self.first_keys.push(position, row);
            }
            let squared_norm = row.iter().map(|value| value * value).sum();
            squared_norms.push(squared_norm);
            let so_far = self.largest_norms.last().copied().unwrap_or(0.0);
            self.largest_norms.push(larger_norm(so_far, squared_norm));
        }
    }

    /// Puts an incoming key under `parent`, and makes its own nodes down to height 1.
    fn insert(&mut self, offset: usize, position: usize, level: usize, parent: u32) {
        let mut below = None;
        for _ in 0..level {
            self.nodes.push(Node::new(self.full_precision));
            self.outlines.push(Outline::new(position as u32, below));
            below = Some((self.nodes.len() - 1) as u32);
        }
        let width = self.incoming.rows.len() / self.incoming.squared_norms.len();
        let row = &self.incoming.rows[offset * width..][..width];
        let squared_norm = self.incoming.squared_norms[offset];
        let node = &mut self.nodes[parent as usize];
        node.push(position as u32, row, squared_norm, below);
        self.outlines[parent as usize].update(node);
        self.largest_node = self.largest_node.max(node.keys.len());
    }

    /// Drops all keys from position `len` on, and their nodes.
    fn truncate(&mut self, len: usize) {
        self.largest_norms.truncate(len);
        // The root stays, whoever owned the first key.
        let stays: Vec<bool> = self.outlines.iter().map(|outline| (outline.owner as usize) < len).collect();
        let stays = |index: usize| index == ROOT as usize || stays[index];
        let mut renamed = Vec::with_capacity(self.nodes.len());
        let mut kept = 0;
        for index in 0..self.nodes.len() {
            renamed.push(kept);
            kept += u32::from(stays(index));
        }
        let mut indices = 0..self.nodes.len();
        self.nodes.retain_mut(|_| indices.next().is_some_and(stays));
        let mut indices = 0..self.outlines.len();
        self.outlines.retain_mut(|_| indices.next().is_some_and(stays));
        for (node, outline) in self.nodes.iter_mut().zip(&mut self.outlines) {
            node.truncate(len);
            node.below.iter_mut().chain(&mut outline.own_below).for_each(|below| *below = renamed[*below as usize]);
            outline.update(node);
        }
    }

    fn bytes(&self) -> usize {
        let nodes = self.nodes.iter().map(Node::bytes).sum::<usize>();
        let outlines = self.outlines.capacity() * size_of::<Outline>();
        nodes + outlines + self.first_keys.bytes() + 4 * self.largest_norms.capacity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_hold_as_many_keys_as_published_at_every_length() {
        for levels in [1, 2, 3, 5] {
            let settings = DciSettings { levels, ..DciSettings::PUBLISHED };
            let mut counts = vec![0.0; levels];
            for position in 0..100_000_usize {
                (0..=level(&settings, position)).for_each(|level| counts[level] += 1.0);
                let keys = (position + 1) as f64;
                if [1_000.0, 10_000.0, 100_000.0].contains(&keys) {
                    for (level, count) in counts.iter().enumerate() {
                        let published = keys.powf(1.0 - level as f64 / levels as f64);
                        let error = (count - published).abs();
                        assert!(error < 4.0 * published.sqrt() + 2.0, "{count} of {keys} keys at {level} of {levels}");
                    }
                }
            }
        }
    }
}
