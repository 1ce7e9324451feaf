//! The nodes that a search may go to one level down, and which of them it follows.

use std::ops::Range;

use iceformer_kernels::selection::{order_descending, push_reaching, reached_by};

use super::index::{HeadIndex, ROOT};
use super::level::Level;
use super::rank::Selection;

/// A node that a query goes to.
pub(crate) struct Step {
    /// Of the node's owner.
    pub score: f32,
    pub node: u32,
    /// The keys that the query is compared with.
    pub slots: Range<usize>,
}

/// How much of a level a query follows.
pub(crate) struct Beam {
    /// As many keys as this many nodes of the average size hold.
    pub average_nodes: usize,
    /// Levels of the tree.
    pub levels: usize,
    /// Keys that the query sees.
    pub visible: Range<usize>,
    /// Whether the nodes chosen are of the lowest level.
    pub lowest: bool,
}

/// Buffers of a choice.
#[derive(Default)]
pub(crate) struct BeamScratch {
    scores: Vec<f32>,
    nodes: Vec<u32>,
    order: Vec<u32>,
    selection: Selection,
}

impl Beam {
    /// The step to the root, where every search starts.
    pub(crate) fn root(&self, index: &HeadIndex) -> Step {
        Step { score: 0.0, node: ROOT, slots: self.slots(index, ROOT) }
    }

    /// The keys of `node` that the query is compared with: the tree as it was, and at the lowest level, where a key leads
    /// nowhere, none out of sight.
    fn slots(&self, index: &HeadIndex, node: u32) -> Range<usize> {
        let end = index.keys_before(node, self.visible.end);
        let hidden = self.lowest && self.visible.start > 0;
        if hidden { index.node(node).keys_from(self.visible.start, end)..end } else { 0..end }
    }

    /// Keys of the nodes to go to.
    fn wanted(&self) -> usize {
        let counted = if self.lowest { self.visible.len() } else { self.visible.end };
        ((counted as f64).powf(1.0 / self.levels as f64) * self.average_nodes as f64) as usize
    }

    /// Keys and owners of a level that the query can be compared with, at most, in a tree of nodes of up to `largest_node`
    /// keys.
    pub(crate) fn most_scores(&self, largest_node: usize) -> usize {
        // The best node is followed whatever its size, and the last may overshoot by half of its own.
        self.wanted().saturating_mul(2).saturating_add(largest_node).min(2 * self.visible.end)
    }

    /// Keeps in `kept` the best nodes that query `query` of `above` leads to, up to as many keys as `average_nodes`
    /// nodes hold; of equals the first that it leads to. Sizes differ much, and a mask may hide most keys of a node;
    /// counting keys spends the same work on every query. At the lowest level nodes without visible keys are dropped; above
    /// it the owner counts, which the next level holds too.
    pub(crate) fn choose(
        &self,
        index: &HeadIndex,
        above: &Level,
        query: usize,
        kept: &mut Vec<Step>,
        scratch: &mut BeamScratch,
    ) {
        let wanted = self.wanted();
        let mut keys = 0;
        kept.clear();
        // Best first. Returns whether there are enough.
        let mut take = |order: &[u32], scores: &[f32], nodes: &[u32]| {
            for &lead in order {
                let (score, node) = (scores[lead as usize], nodes[lead as usize]);
                let slots = self.slots(index, node);
                // Above the lowest level an empty node still leads to its owner's node below.
                if self.lowest && slots.is_empty() {
                    continue;
                }
                let count = slots.len() + usize::from(!self.lowest);
                // Above the lowest level a node fits whole or not at all; there the last one may overshoot by half.
                let fitting = if self.lowest { count / 2 } else { count };
                if !kept.is_empty() && keys + fitting > wanted {
                    return true;
                }
                keys += count;
                kept.push(Step { score, node, slots });
            }
            false
        };
        let BeamScratch { scores, nodes, order, selection: Selection { indices, largest } } = scratch;
        let (of_leads, below) = above.leads(query);
        // Mostly a few more than the beam are enough, and the others need no order.
        let mut few = self.average_nodes.saturating_add(self.average_nodes / 4 + 1);
        let mut more = self.average_nodes;
        let mut limit_before = f32::INFINITY;
        loop {
            let limit = reached_by(few, of_leads, largest);
            indices.clear();
            push_reaching(limit, of_leads, indices);
            few = indices.len().saturating_add(more);
            more = more.saturating_mul(2);
            // Those of the rounds before were taken. What is no number leads nowhere, and comes last.
            let is_last = limit == f32::NEG_INFINITY;
            let is_first = limit_before == f32::INFINITY;
            if !is_first || !is_last {
                indices.retain(|&lead| {
                    let score = of_leads[lead as usize];
                    if score.is_nan() { is_last } else { is_first || score < limit_before }
                });
            }
            scores.clear();
            scores.extend(indices.iter().map(|&lead| of_leads[lead as usize].max(f32::NEG_INFINITY)));
            nodes.clear();
            nodes.extend(indices.iter().map(|&lead| below[lead as usize]));
            order_descending(scores, order);
            if take(order, scores, nodes) || is_last {
                return;
            }
            limit_before = limit;
        }
    }
}
