//! Going down the tree for the parent of a new key.

use std::cmp::Reverse;

use super::index::{HeadIndex, ROOT};
use super::projections::Directions;
use super::rank::pack;
use super::scoring::{Scores, Target};
use super::settings::DciSettings;

/// Buffers of a search for a parent.
#[derive(Default)]
pub(crate) struct ParentScratch {
    frontier: Vec<Step>,
    next: Vec<Step>,
    scored: Scores,
    projected: Vec<f32>,
}

/// A node to go to, ranked by the score of its owner.
#[derive(Clone, Copy)]
struct Step {
    rank: u64,
    node: u32,
}

impl Step {
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
    let target = Target {
        vector: key.row,
        bound,
        extra: Some(bound.extra(key.squared_norm)),
        factor: bound.inverse(),
        share: settings.build_share,
        least: settings.build_beam,
    };
    projected.clear();
    frontier.clear();
    frontier.push(Step { rank: 0, node: ROOT });
    for height in (key.level + 2..=settings.levels).rev() {
        next.clear();
        for step in &*frontier {
            let node = index.node(step.node);
            if let Some(own_below) = index.outline(step.node).own_below {
                next.push(Step { node: own_below, ..*step });
            }
            let end = index.keys_before(step.node, key.position);
            if end > 0 {
                scored.score(node, 0..end, &target, settings.whole_node, directions, projected);
                let scored = scored.scores.iter().zip(&scored.slots);
                next.extend(
                    scored.map(|(&score, &slot)| Step::new(score, node.keys[slot as usize], node.below[slot as usize])),
                );
            }
        }
        if height == key.level + 2 {
            return next.iter().max_by_key(|step| step.rank).map_or(ROOT, |step| step.node);
        }
        if next.len() > settings.build_beam {
            next.select_nth_unstable_by_key(settings.build_beam - 1, |step| Reverse(step.rank));
            next.truncate(settings.build_beam);
        }
        std::mem::swap(frontier, next);
    }
    ROOT
}
