//! The nodes that a search may go to one level down, and which of them it follows.

use std::ops::Range;

use iceformer_kernels::selection::{order_descending, push_reaching, reached_by};

use super::index::{HeadIndex, ROOT};
use super::level::{Level, Scored};
use super::rank::Selection;

/// A node that a query goes to.
#[derive(Clone)]
pub(crate) struct Step {
    /// Of the node's owner.
    pub score: f32,
    pub node: u32,
    /// The keys that the query is compared with.
    pub slots: Range<usize>,
}

/// How much of a level a query follows.
pub(crate) struct Beam {
    /// Nodes of the average size.
    pub nodes: usize,
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
    pub selection: Selection,
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

    /// Keeps in `kept` the best nodes that query `query` of `above` leads to, up to as many keys as `nodes` nodes of the
    /// average size hold; of equals the first that it leads to. Sizes differ much, and a mask may hide most keys of a node;
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
        let counted = if self.lowest { self.visible.len() } else { self.visible.end };
        let wanted = ((counted as f64).powf(1.0 / self.levels as f64) * self.nodes as f64) as usize;
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
        let leads = above.leads(query);
        // Mostly a few more than the beam are enough, and the others need no order.
        let (mut few, mut limit_before) = (self.nodes.saturating_add(self.nodes / 4 + 1), None);
        loop {
            let limit = reached_by(few, leads.scores, largest);
            indices.clear();
            push_reaching(limit, leads.scores, indices);
            few = indices.len().saturating_add(self.nodes);
            // Those of the rounds before were taken; also what is no number.
            if let Some(limit) = limit_before {
                indices.retain(|&lead| leads.scores[lead as usize] < limit);
            }
            gather(&leads, indices, scores, nodes);
            order_descending(scores, order);
            if take(order, scores, nodes) || limit == f32::NEG_INFINITY {
                return;
            }
            limit_before = Some(limit);
        }
    }
}

/// The scores and nodes of some of `leads`.
fn gather(leads: &Scored<'_>, indices: &[u32], scores: &mut Vec<f32>, nodes: &mut Vec<u32>) {
    // A key that is no number leads nowhere.
    let score = |&lead: &u32| Some(leads.scores[lead as usize]).filter(|score| !score.is_nan());
    scores.clear();
    scores.extend(indices.iter().map(|lead| score(lead).unwrap_or(f32::NEG_INFINITY)));
    nodes.clear();
    nodes.extend(indices.iter().map(|&lead| leads.below[lead as usize]));
}
