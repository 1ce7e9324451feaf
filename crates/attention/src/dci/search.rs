//! Going down the tree with a beam: for the keys of a query, and for the parent of a new key.

use std::cmp::Reverse;
use std::ops::Range;

use iceformer_kernels::rows::{dot_chosen_rows, dot_rows};

use super::index::HeadIndex;
use super::lift::Bound;
use super::node::Node;
use super::projections::{Directions, Retrieval, RetrievalScratch};
use super::rank::{Best, for_each_above, pack, reached_by, unpack};
use super::settings::DciSettings;

/// Root of every tree.
pub(crate) const ROOT: u32 = 0;

/// Buffers of a search, reused from one to the next.
#[derive(Default)]
pub(crate) struct SearchScratch {
    /// The keys found for a query.
    pub best: Best,
    frontier: Vec<Step>,
    next: Leads,
    scored: Scored,
    projected: Vec<f32>,
    retrieval: RetrievalScratch,
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

/// Nodes that keys lead to, one level down.
#[derive(Default)]
struct Leads {
    scores: Vec<f32>,
    owners: Vec<u32>,
    nodes: Vec<u32>,
    /// Those above a limit.
    steps: Vec<Step>,
    largest: Vec<f32>,
}

/// Scores of keys of one node.
#[derive(Default)]
struct Scored {
    scores: Vec<f32>,
    /// Which keys, where they are not all of a range.
    slots: Vec<u32>,
    keys: Vec<u32>,
}

/// Which keys of a node were scored.
enum Which {
    Range(Range<usize>),
    Chosen,
}

/// What keys are compared with.
struct Target<'a> {
    /// Filled up with zeros to the width of a row.
    vector: &'a [f32],
    bound: Bound,
    /// Last coordinate of a key in the lifted space; `None` for a query, whose scores are plain products.
    extra: Option<f32>,
    /// Makes the vector a unit vector (with `extra`) where it is projected.
    factor: f32,
    beam: usize,
    share: f32,
    /// Candidates that each composite index retrieves at least.
    least: usize,
}

/// One search over a tree.
pub(crate) struct Search<'a> {
    pub index: &'a HeadIndex,
    pub directions: &'a Directions,
    pub settings: &'a DciSettings,
}

impl Search<'_> {
    /// Finds the `kept_keys` keys among `visible` with the largest products with `query` (all of fewer) and leaves them in
    /// `scratch.best`. Returns how many products it computed.
    ///
    /// The tree is searched as it was when it held `visible.end` keys. Keys before `visible.start` still lead the way,
    /// but are not found.
    pub(crate) fn find(&self, query: &[f32], visible: Range<usize>, scratch: &mut SearchScratch) -> u64 {
        let settings = self.settings;
        let squared_norm: f32 = query.iter().map(|value| value * value).sum();
        let mut target = Target {
            vector: query,
            bound: self.index.bound(visible.end),
            extra: None,
            factor: if squared_norm > 0.0 { 1.0 / squared_norm.sqrt() } else { 0.0 },
            beam: settings.beam(),
            share: settings.query_share,
            least: settings.beam().max(settings.kept_keys),
        };
        scratch.projected.clear();
        let wanted = settings.kept_keys.min(visible.len());
        let mut evaluated = 0;
        loop {
            scratch.best.begin(settings.kept_keys);
            evaluated += self.descend(&target, &visible, scratch);
            if scratch.best.finish().len() >= wanted {
                return evaluated;
            }
            // A mask may hide whole branches from a beam. At the latest when it is as wide as the tree, nothing is left
            // out.
            target.beam = target.beam.saturating_mul(4);
            target.least = target.least.max(target.beam);
        }
    }

    /// Goes down from the root once, offers the visible keys on the way to `scratch.best`, and returns how many products
    /// it computed.
    fn descend(&self, target: &Target<'_>, visible: &Range<usize>, scratch: &mut SearchScratch) -> u64 {
        let settings = self.settings;
        scratch.frontier.clear();
        scratch.frontier.push(Step { rank: 0, node: ROOT });
        let mut evaluated = 0;
        for height in (1..=settings.levels).rev() {
            scratch.next.clear();
            for position in 0..scratch.frontier.len() {
                let step = scratch.frontier[position];
                let node = self.index.node(step.node);
                if let Some(own_below) = node.own_below {
                    scratch.next.push(step, own_below);
                }
                let end = node.keys_before(visible.end);
                // At the lowest level a key leads nowhere, and those out of sight need no product.
                let start = if height == 1 { node.keys_from(visible.start, end) } else { 0 };
                if start == end {
                    continue;
                }
                if let Some(step) = scratch.frontier.get(position + 1) {
                    self.index.node(step.node).fetch(self.directions.width());
                }
                let which = self.score(node, start..end, target, scratch);
                let SearchScratch { best, next, scored, .. } = scratch;
                evaluated += scored.scores.len() as u64;
                let keys = scored.keys(node, &which);
                let first =
                    if visible.start == 0 { 0 } else { keys.partition_point(|&key| (key as usize) < visible.start) };
                best.extend(&keys[first..], &scored.scores[first..]);
                if height > 1 {
                    scored.lead(node, &which, next);
                }
            }
            if height > 1 {
                let SearchScratch { frontier, next, .. } = scratch;
                self.keep_best(next, frontier, target.beam, visible.clone(), height == 2);
            }
        }
        evaluated
    }

    /// As [`find`](Self::find), by comparing with every visible key; the range ends at `whole_range` or before.
    pub(crate) fn find_among_first(&self, query: &[f32], visible: Range<usize>, scratch: &mut SearchScratch) -> u64 {
        scratch.best.begin(self.settings.kept_keys);
        // An empty range may lie behind the last key.
        if visible.is_empty() {
            return 0;
        }
        let rows = self.index.first_rows(visible.clone(), query.len());
        let Scored { keys, scores, .. } = &mut scratch.scored;
        keys.clear();
        keys.extend(visible.clone().map(|position| position as u32));
        scores.resize(visible.len(), 0.0);
        dot_rows(query, rows, scores);
        scratch.best.extend(keys, scores);
        visible.len() as u64
    }

    /// The node at height `level + 1` whose owner is the approximate nearest neighbour of a key, in the lifted space,
    /// among the keys before `position` that climbed that high.
    pub(crate) fn parent(
        &self,
        key: &[f32],
        squared_norm: f32,
        position: usize,
        level: usize,
        scratch: &mut SearchScratch,
    ) -> u32 {
        let settings = self.settings;
        let bound = self.index.bound(position + 1);
        let target = Target {
            vector: key,
            bound,
            extra: Some(bound.extra(squared_norm)),
            factor: bound.inverse(),
            beam: settings.build_beam,
            share: settings.build_share,
            least: settings.build_beam,
        };
        scratch.projected.clear();
        scratch.frontier.clear();
        scratch.frontier.push(Step { rank: 0, node: ROOT });
        for height in (level + 2..=settings.levels).rev() {
            scratch.next.clear();
            for index in 0..scratch.frontier.len() {
                let step = scratch.frontier[index];
                let node = self.index.node(step.node);
                if let Some(own_below) = node.own_below {
                    scratch.next.push(step, own_below);
                }
                let end = node.keys_before(position);
                if end > 0 {
                    let which = self.score(node, 0..end, &target, scratch);
                    scratch.scored.lead(node, &which, &mut scratch.next);
                }
            }
            let SearchScratch { frontier, next, .. } = scratch;
            frontier.clear();
            frontier.extend((0..next.scores.len()).map(|index| next.step(index)));
            best_only(frontier, if height == level + 2 { 1 } else { target.beam });
        }
        scratch.frontier[0].node
    }

    /// Scores the keys `slots` of `node`; of a large node those that Prioritized DCI retrieves.
    fn score(&self, node: &Node, slots: Range<usize>, target: &Target<'_>, scratch: &mut SearchScratch) -> Which {
        let SearchScratch { scored, projected, retrieval, .. } = scratch;
        let Scored { scores, slots: chosen, keys } = scored;
        let width = target.vector.len();
        // A small node is evaluated whole.
        let candidates = match slots.len() > self.settings.whole_node {
            true => ((slots.len() as f32 * target.share).ceil() as usize).max(target.least),
            false => slots.len(),
        };
        let which = if candidates < slots.len() {
            if projected.is_empty() {
                let extra = target.extra.unwrap_or(0.0);
                self.directions.project(target.vector, target.factor, extra, projected);
            }
            let wanted = Retrieval { projected, bound: target.bound, candidates };
            node.projections().retrieve(self.directions, &node.squared_norms, slots, wanted, retrieval, chosen);
            scores.resize(chosen.len(), 0.0);
            dot_chosen_rows(target.vector, node.rows(0..node.keys.len(), width), chosen, scores);
            keys.clear();
            keys.extend(chosen.iter().map(|&slot| node.keys[slot as usize]));
            Which::Chosen
        } else {
            scores.resize(slots.len(), 0.0);
            dot_rows(target.vector, node.rows(slots.clone(), width), scores);
            Which::Range(slots)
        };
        if let Some(extra) = target.extra {
            let lift = |score: &mut f32, squared_norm: f32| {
                *score = target.bound.lifted_product(*score, extra, target.bound.extra(squared_norm));
            };
            let scores = scores.iter_mut();
            match &which {
                Which::Range(slots) => {
                    scores.zip(&node.squared_norms[slots.clone()]).for_each(|(score, norm)| lift(score, *norm));
                }
                Which::Chosen => {
                    scores.zip(chosen).for_each(|(score, slot)| lift(score, node.squared_norms[*slot as usize]));
                }
            }
        }
        which
    }

    /// Keeps in `kept` the best nodes of `leads`, up to as many keys as `beam` nodes of the average size hold. Sizes differ
    /// much, and a mask may hide most keys of a node; counting keys spends the same work on every query. At the lowest level
    /// only visible keys count, and nodes without any are dropped; above it the owner counts, which the next level holds too.
    fn keep_best(&self, leads: &mut Leads, kept: &mut Vec<Step>, beam: usize, visible: Range<usize>, lowest: bool) {
        let counted = if lowest { visible.clone() } else { 0..visible.end };
        let wanted = ((counted.len() as f64).powf(1.0 / self.settings.levels as f64) * beam as f64) as usize;
        kept.clear();
        let mut keys = 0;
        // Best first. Returns whether there are enough.
        let mut take = |steps: &mut [Step]| {
            steps.sort_unstable_by_key(|step| Reverse(step.rank));
            for &step in &*steps {
                let node = self.index.node(step.node);
                let end = node.keys_before(counted.end);
                let owner = usize::from(!lowest);
                let count = end - node.keys_from(counted.start, end);
                // Above the lowest level an empty node still leads to its owner's node below.
                if lowest && count == 0 {
                    continue;
                }
                // Above the lowest level a node fits whole or not at all; there the last one may overshoot by half.
                let fitting = if lowest { count / 2 } else { count + owner };
                if !kept.is_empty() && keys + fitting > wanted {
                    return true;
                }
                keys += count + owner;
                kept.push(step);
            }
            false
        };
        // Nearly always a few more than the beam are enough, and the others need no place.
        let limit = reached_by(beam.saturating_add(beam / 4 + 1), &leads.scores, &mut leads.largest);
        let mut steps = std::mem::take(&mut leads.steps);
        steps.clear();
        for_each_above(limit, &leads.scores, |index| steps.push(leads.step(index)));
        if !take(&mut steps) {
            steps.clear();
            steps.extend(
                (0..leads.scores.len()).filter(|index| leads.scores[*index] < limit).map(|index| leads.step(index)),
            );
            let mut rest = &mut steps[..];
            while !rest.is_empty() {
                let piece = rest.len().min(beam.saturating_mul(2));
                if piece < rest.len() {
                    rest.select_nth_unstable_by_key(piece - 1, |step| Reverse(step.rank));
                }
                let (first, others) = rest.split_at_mut(piece);
                if take(first) {
                    break;
                }
                rest = others;
            }
        }
        leads.steps = steps;
    }
}

impl Leads {
    fn clear(&mut self) {
        self.scores.clear();
        self.owners.clear();
        self.nodes.clear();
    }

    /// Adds `node`, which belongs to the owner of the node of `step`.
    fn push(&mut self, step: Step, node: u32) {
        let (score, owner) = unpack(step.rank);
        self.scores.push(score);
        self.owners.push(owner);
        self.nodes.push(node);
    }

    /// What leads to node `index` of them.
    fn step(&self, index: usize) -> Step {
        Step::new(self.scores[index], self.owners[index], self.nodes[index])
    }
}

impl Scored {
    /// Positions of the keys scored.
    fn keys<'a>(&'a self, node: &'a Node, which: &Which) -> &'a [u32] {
        match which {
            Which::Range(slots) => &node.keys[slots.clone()],
            Which::Chosen => &self.keys,
        }
    }

    /// Adds the nodes that the keys scored lead to.
    fn lead(&self, node: &Node, which: &Which, leads: &mut Leads) {
        leads.scores.extend_from_slice(&self.scores);
        leads.owners.extend_from_slice(self.keys(node, which));
        match which {
            Which::Range(slots) => leads.nodes.extend_from_slice(&node.below[slots.clone()]),
            Which::Chosen => leads.nodes.extend(self.slots.iter().map(|&slot| node.below[slot as usize])),
        }
    }
}

/// Keeps the best `beam` nodes.
fn best_only(steps: &mut Vec<Step>, beam: usize) {
    if steps.len() > beam {
        steps.select_nth_unstable_by_key(beam - 1, |step| Reverse(step.rank));
        steps.truncate(beam);
    }
}
