//! Going down the tree with a beam, for the keys of some queries.
//!
//! The queries of a tile go down together, level by level, so that a node is read once for all of those that visit it, and
//! what is done for each visit is little. What a query finds depends on no other.

use std::ops::Range;

use iceformer_kernels::panels::{Panels, Visit, dot_panels};

use super::beam::{Beam, BeamScratch, Step};
use super::index::HeadIndex;
use super::level::{Level, Places, Scored};
use super::projections::Directions;
use super::rank::{Best, pack};
use super::scoring::{Scores, Target};
use super::settings::DciSettings;

/// Scores of all queries that go down together, at most, where there are several: bounds the memory.
const MOST_SCORES: usize = 1 << 22;

/// Searches of the queries of a tile; its buffers are reused from one tile to the next.
#[derive(Default)]
pub(crate) struct SearchScratch {
    descents: Vec<Descent>,
    queue: Vec<u32>,
    pending: Vec<u32>,
    /// From the lowest up.
    levels: Vec<Level>,
    visits: Visits,
    frontier: Vec<Step>,
    beam: BeamScratch,
    scored: Scores,
    scores: Vec<f32>,
}

/// The search of one query.
#[derive(Default)]
pub(crate) struct Descent {
    /// Keys that the query may attend to.
    pub visible: Range<usize>,
    /// Products computed so far.
    pub evaluated: u64,
    best: Best,
    /// The query's projections, from the first large node on.
    projected: Vec<f32>,
}

/// Searches over a tree.
pub(crate) struct Search<'a> {
    pub index: &'a HeadIndex,
    pub directions: &'a Directions,
    pub settings: &'a DciSettings,
}

impl SearchScratch {
    /// Starts the searches of queries that see these keys.
    pub(crate) fn begin(&mut self, kept_keys: usize, visible: impl ExactSizeIterator<Item = Range<usize>>) {
        if self.descents.len() < visible.len() {
            self.descents.resize_with(visible.len(), Descent::default);
        }
        self.queue.clear();
        for (descent, visible) in self.descents.iter_mut().zip(visible) {
            descent.visible = visible;
            descent.evaluated = 0;
            descent.best.begin(kept_keys);
            descent.projected.clear();
        }
    }

    /// The search of query `query`.
    pub(crate) fn descent(&mut self, query: usize) -> &mut Descent {
        &mut self.descents[query]
    }

    /// Puts query `query` among those that [`Search::find`] searches for.
    pub(crate) fn queue(&mut self, query: usize) {
        self.queue.push(query as u32);
    }

    /// Finds the best keys of `queued` queries, each of which is compared with all keys that it sees. `panels` hold the keys
    /// from position `first` on, `queries` are `[queries, row width]`.
    pub(crate) fn compare_with_all(
        &mut self,
        queued: &[u32],
        queries: &[f32],
        width: usize,
        panels: Panels<'_>,
        first: usize,
    ) {
        let Self { descents, scores, visits, beam: BeamScratch { selection, .. }, .. } = self;
        let mut place = 0;
        let visit = |&query: &u32| {
            let visible = &descents[query as usize].visible;
            let (first_row, rows) = ((visible.start - first) as u32, visible.len() as u32);
            place += rows;
            Visit { vector: query, first_row, rows, place: place - rows }
        };
        visits.sorted.clear();
        visits.sorted.extend(queued.iter().map(visit));
        scores.resize(place as usize, 0.0);
        dot_panels(queries, width, panels, &visits.sorted, scores);
        for visit in &visits.sorted {
            let descent = &mut descents[visit.vector as usize];
            descent.evaluated = u64::from(visit.rows);
            let (scores, first) =
                (&scores[visit.place as usize..][..visit.rows as usize], descent.visible.start as u32);
            descent.best.expect(scores, selection);
            descent.best.offer(scores, selection, |indices, packed| {
                packed.extend(indices.iter().map(|&index| pack(scores[index as usize], first + index)));
            });
        }
    }
}

impl Descent {
    /// The keys found, packed, largest score first.
    pub(crate) fn found(&mut self) -> &[u64] {
        self.best.finish()
    }
}

impl Search<'_> {
    /// Finds, for each query queued in `scratch`, the `kept_keys` keys among those it sees with the largest products (all
    /// of fewer). `queries` holds the queries of the tile, `[queries, row width]`.
    ///
    /// The tree is searched as it was when it held the keys before the end of what the query sees. Keys before the first
    /// that it sees still lead the way, but are not found.
    pub(crate) fn find(&self, queries: &[f32], scratch: &mut SearchScratch) {
        let mut queue = std::mem::take(&mut scratch.queue);
        let mut nodes = self.settings.beam();
        while !queue.is_empty() {
            // A level holds no more keys than the tree.
            let keys = self.index.keys();
            let of_node = (keys as f64).powf(1.0 / self.settings.levels as f64) as usize + 1;
            let most_scores = keys.min(nodes.saturating_mul(of_node));
            for pending in queue.chunks((MOST_SCORES / most_scores).max(1)) {
                scratch.pending.clear();
                scratch.pending.extend_from_slice(pending);
                self.descend(queries, nodes, scratch);
            }
            // A mask may hide whole branches from a beam. At the latest when it is as wide as the tree, nothing is left
            // out.
            nodes = nodes.saturating_mul(4);
            queue.retain(|&query| {
                let descent = &mut scratch.descents[query as usize];
                descent.found().len() < self.settings.kept_keys.min(descent.visible.len())
            });
        }
        scratch.queue = queue;
    }

    /// Goes down from the root once with all queries that are pending, along `nodes` nodes at each level.
    fn descend(&self, queries: &[f32], nodes: usize, scratch: &mut SearchScratch) {
        let (levels, width) = (self.settings.levels, self.directions.width());
        scratch.levels.resize_with(levels, Level::default);
        for height in (1..=levels).rev() {
            scratch.levels[height - 1].clear();
            scratch.visits.clear();
            for rank in 0..scratch.pending.len() {
                let SearchScratch { descents, pending, levels: scored, frontier, beam, .. } = scratch;
                let query = pending[rank];
                let visible = descents[query as usize].visible.clone();
                let of_query = Beam { nodes, levels, visible, lowest: height == 1 };
                if height == levels {
                    frontier.clear();
                    frontier.push(of_query.root(self.index));
                } else {
                    of_query.choose(self.index, &scored[height], rank, frontier, beam);
                }
                self.plan(query, height, queries, nodes, scratch);
            }
            let Places { scores, keys, below } = scratch.levels[height - 1].places();
            scratch.visits.for_each_node(self.index, |node, next, visits| {
                if let Some(next) = next {
                    self.index.node(next).fetch();
                }
                let node = self.index.node(node);
                dot_panels(queries, width, node.panels(), visits, scores);
                for visit in visits {
                    let slots = visit.first_row as usize..(visit.first_row + visit.rows) as usize;
                    let places = visit.place as usize..(visit.place + visit.rows) as usize;
                    keys[places.clone()].copy_from_slice(&node.keys[slots.clone()]);
                    if height > 1 {
                        below[places].copy_from_slice(&node.below[slots]);
                    }
                }
            });
        }
        let SearchScratch { descents, pending, levels, beam: BeamScratch { selection, .. }, .. } = scratch;
        for (rank, &query) in pending.iter().enumerate() {
            let Descent { visible, best, .. } = &mut descents[query as usize];
            best.begin(self.settings.kept_keys);
            // Above the lowest level keys out of sight are among those scored.
            let certain = if visible.start == 0 { levels.len() } else { 1 };
            levels[..certain].iter().for_each(|level| best.expect(level.keys(rank).scores, selection));
            for level in &*levels {
                let Scored { scores, keys, .. } = level.keys(rank);
                best.offer(scores, selection, |indices, packed| {
                    let seen = indices.iter().filter(|&&index| keys[index as usize] as usize >= visible.start);
                    packed.extend(seen.map(|&index| pack(scores[index as usize], keys[index as usize])));
                });
            }
        }
    }

    /// Notes which nodes query `query` visits at its frontier, and computes what is not computed with others.
    fn plan(&self, query: u32, height: usize, queries: &[f32], nodes: usize, scratch: &mut SearchScratch) {
        let SearchScratch { descents, levels, visits, frontier, scored, .. } = scratch;
        let (descent, level) = (&mut descents[query as usize], &mut levels[height - 1]);
        let owner = |step: &Step| Some((step.score, self.index.outline(step.node).own_below?));
        level.begin_query(frontier.iter().filter_map(owner));
        for Step { node, slots, .. } in &*frontier {
            if slots.len() > self.settings.whole_node {
                let vector = &queries[query as usize * self.directions.width()..][..self.directions.width()];
                let squared_norm: f32 = vector.iter().map(|value| value * value).sum();
                let target = Target {
                    vector,
                    bound: self.index.bound(descent.visible.end),
                    extra: None,
                    factor: if squared_norm > 0.0 { 1.0 / squared_norm.sqrt() } else { 0.0 },
                    share: self.settings.query_share,
                    least: nodes.max(self.settings.kept_keys),
                };
                let (node, whole_node) = (self.index.node(*node), self.settings.whole_node);
                let Descent { projected, .. } = &mut *descent;
                scored.score(node, slots.clone(), &target, whole_node, self.directions, projected);
                let first = level.add_keys(scored.scores.len());
                let Places { scores, keys, below } = level.places();
                for (place, (&score, &slot)) in (first..).zip(scored.scores.iter().zip(&scored.slots)) {
                    (scores[place], keys[place]) = (score, node.keys[slot as usize]);
                    if height > 1 {
                        below[place] = node.below[slot as usize];
                    }
                }
                descent.evaluated += scored.scores.len() as u64;
            } else if !slots.is_empty() {
                let place = level.add_keys(slots.len()) as u32;
                let (first_row, rows) = (slots.start as u32, slots.len() as u32);
                visits.push(*node, Visit { vector: query, first_row, rows, place });
                descent.evaluated += slots.len() as u64;
            }
        }
    }
}

/// Which queries visit which nodes.
#[derive(Default)]
struct Visits {
    visits: Vec<(u32, Visit)>,
    /// Sorted by node.
    sorted: Vec<Visit>,
    /// Nodes with the end of their visits among those sorted, in the order in which they were first visited.
    nodes: Vec<(u32, u32)>,
    /// For each node of the tree, its visits, or where the next is sorted in; zero between calls.
    counts: Vec<u32>,
}

impl Visits {
    fn clear(&mut self) {
        self.visits.clear();
    }

    fn push(&mut self, node: u32, visit: Visit) {
        self.visits.push((node, visit));
    }

    /// Calls `take` with each node that is visited, the one after it, and the visits of the former.
    fn for_each_node(&mut self, index: &HeadIndex, mut take: impl FnMut(u32, Option<u32>, &[Visit])) {
        let Self { visits, sorted, nodes, counts } = self;
        counts.resize(index.nodes(), 0);
        nodes.clear();
        for &(node, _) in &*visits {
            let count = &mut counts[node as usize];
            if *count == 0 {
                nodes.push((node, 0));
            }
            *count += 1;
        }
        let mut end = 0;
        for (node, end_of_node) in &mut *nodes {
            let count = std::mem::replace(&mut counts[*node as usize], end);
            end += count;
            *end_of_node = end;
        }
        sorted.resize(visits.len(), Visit::default());
        for &(node, visit) in &*visits {
            let place = &mut counts[node as usize];
            sorted[*place as usize] = visit;
            *place += 1;
        }
        let mut first = 0;
        for (rank, &(node, end)) in nodes.iter().enumerate() {
            counts[node as usize] = 0;
            let next = nodes.get(rank + 1).map(|&(next, _)| next);
            take(node, next, &sorted[first..end as usize]);
            first = end as usize;
        }
    }
}
