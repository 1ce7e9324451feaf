//! Going down the tree for the parent of a new key.

use std::cmp::Reverse;

use super::index::{HeadIndex, ROOT};
use super::projections::Directions;
use super::rank::pack;
use super::scoring::{Scores, Target, candidates};
use super::settings::DciSettings;

/// Buffers of a search for a parent.
#[derive(Default)]
pub(crate) struct ParentScratch {
    frontier: Vec<Lead>,
    next: Vec<Lead>,
    scored: Scores,
    projected: Vec<f32>,
}

/// A node that may be gone to, ranked by the score of its owner; of equals the earlier owner's comes first.
#[derive(Clone, Copy)]
struct Lead {
    rank: u64,
    node: u32,
}

impl Lead {
    fn new(score: f32, owner: u32, node: u32) -> Self {
        // A key that is no number leads nowhere.
        Self { rank: pack(if score.is_nan() { f32::NEG_INFINITY } else { score }, owner), node }
    }
}

/// A key that looks for its parent.
pub(crate) struct Newcomer<'a> {
    /// Filled up with zeros to the width of a row.
    pub row: &'a [f32],
    pub squared_norm: f32,
    pub position: usize,
    /// Level that it climbs to.
    pub level: usize,
}

/// The node at height `level + 1` whose owner is the approximate nearest neighbour of a key, in the lifted space, among the
/// keys before it that climbed that high.
pub(crate) fn parent(
    index: &HeadIndex,
    directions: &Directions,
    settings: &DciSettings,
    key: &Newcomer<'_>,
    scratch: &mut ParentScratch,
) -> u32 {
    let ParentScratch { frontier, next, scored, projected } = scratch;
    let bound = index.bound(key.position + 1);
    let target = Target { vector: key.row, bound, extra: Some(bound.extra(key.squared_norm)), factor: bound.inverse() };
    projected.clear();
    frontier.clear();
    frontier.push(Lead { rank: 0, node: ROOT });
    for height in (key.level + 2..=settings.levels).rev() {
        next.clear();
        for lead in &*frontier {
            let node = index.node(lead.node);
            if let Some(own_below) = index.outline(lead.node).own_below {
                next.push(Lead { node: own_below, ..*lead });
            }
            let end = index.keys_before(lead.node, key.position);
            if end > 0 {
                let candidates = candidates(end, settings.whole_node, settings.build_share, settings.build_beam);
                scored.score(node, 0..end, &target, candidates, directions, projected);
                let scored = scored.scores.iter().zip(&scored.slots);
                next.extend(
                    scored.map(|(&score, &slot)| Lead::new(score, node.keys[slot as usize], node.below[slot as usize])),
                );
            }
        }
        if height == key.level + 2 {
            return next.iter().max_by_key(|lead| lead.rank).map_or(ROOT, |lead| lead.node);
        }
        if next.len() > settings.build_beam {
            next.select_nth_unstable_by_key(settings.build_beam - 1, |lead| Reverse(lead.rank));
            next.truncate(settings.build_beam);
        }
        std::mem::swap(frontier, next);
    }
    ROOT
}
