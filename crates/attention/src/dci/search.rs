//! Going down the tree with a beam, for the keys of some queries.
//!
//! The queries of a tile go down together, level by level, so that a node is read once for all of those that visit it (but
//! for one of which each query retrieves other keys), and what is done for each visit is little. What a query finds depends
//! on no other.

use std::ops::Range;

use iceformer_kernels::panels::{Panels, Visit, dot_panels};

use super::beam::{Beam, BeamScratch, Step};
use super::index::HeadIndex;
use super::level::{Level, Places};
use super::projections::Directions;
use super::rank::{Best, Selection, pack};
use super::scoring::{Scores, Target, candidates};
use super::settings::DciSettings;

/// Scores of queries that go down together, at most, where there are several: bounds the memory.
pub(crate) const MOST_SCORES: usize = 1 << 20;

/// Searches of the queries of a tile; its buffers are reused from one tile to the next.
#[derive(Default)]
pub(crate) struct SearchScratch {
    descents: Vec<Descent>,
    queue: Vec<u32>,
    /// From the lowest up.
    levels: Vec<Level>,
    visits: Visits,
    frontier: Vec<Step>,
    beam: BeamScratch,
    scored: Scores,
    /// Of comparisons with all keys.
    all_visits: Vec<Visit>,
    all_scores: Vec<f32>,
    selection: Selection,
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
    pub(crate) fn descent(&self, query: usize) -> &Descent {
        &self.descents[query]
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
        let Self { descents, all_scores: scores, all_visits: visits, selection, .. } = self;
        let longest = queued.iter().map(|&query| descents[query as usize].visible.len()).max().unwrap_or(0);
        for queued in queued.chunks((MOST_SCORES / longest.max(1)).max(1)) {
            let mut place = 0;
            visits.clear();
            visits.extend(queued.iter().map(|&query| {
                let visible = &descents[query as usize].visible;
                let (first_row, rows) = ((visible.start - first) as u32, visible.len() as u32);
                place += rows;
                Visit { vector: query, first_row, rows, place: place - rows }
            }));
            scores.resize(place as usize, 0.0);
            dot_panels(queries, width, panels, visits, scores);
            for visit in &*visits {
                let Descent { visible, evaluated, best, .. } = &mut descents[visit.vector as usize];
                *evaluated = u64::from(visit.rows);
                let (scores, first) = (&scores[visit.place as usize..][..visit.rows as usize], visible.start as u32);
                best.expect(scores, selection);
                best.offer(scores, selection, |indices, packed| {
                    packed.extend(indices.iter().map(|&index| pack(scores[index as usize], first + index)));
                });
                best.finish();
            }
        }
    }
}

impl Descent {
    /// The keys found, packed, largest score first.
    pub(crate) fn found(&self) -> &[u64] {
        self.best.found()
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
            // The more a query sees, the more it may be compared with.
            let ends = queue.iter().map(|&query| scratch.descents[query as usize].visible.end);
            let widest = self.beam(nodes, 0..ends.max().unwrap_or(1), false);
            let most_scores = widest.most_scores(self.index.largest_node()).saturating_mul(self.settings.levels);
            for pending in queue.chunks((MOST_SCORES / most_scores).max(1)) {
                self.descend(pending, queries, nodes, scratch);
            }
            // A mask may hide whole branches from a beam. At the latest when it is as wide as the tree, nothing is left
            // out.
            nodes = nodes.saturating_mul(4);
            queue.retain(|&query| {
                let descent = &scratch.descents[query as usize];
                descent.found().len() < self.settings.kept_keys.min(descent.visible.len())
            });
        }
        scratch.queue = queue;
    }

    fn beam(&self, average_nodes: usize, visible: Range<usize>, lowest: bool) -> Beam {
        Beam { average_nodes, levels: self.settings.levels, visible, lowest }
    }

    /// Goes down from the root once with the queries `pending`, along `nodes` nodes of the average size at each level.
    fn descend(&self, pending: &[u32], queries: &[f32], nodes: usize, scratch: &mut SearchScratch) {
        let (levels, width) = (self.settings.levels, self.directions.width());
        scratch.levels.resize_with(levels, Level::default);
        for height in (1..=levels).rev() {
            scratch.levels[height - 1].clear();
            scratch.visits.clear();
            for (rank, &query) in pending.iter().enumerate() {
                let SearchScratch { descents, levels: scored, frontier, beam, .. } = &mut *scratch;
                let of_query = self.beam(nodes, descents[query as usize].visible.clone(), height == 1);
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
        let SearchScratch { descents, levels, selection, .. } = scratch;
        for (rank, &query) in pending.iter().enumerate() {
            let Descent { visible, best, .. } = &mut descents[query as usize];
            best.begin(self.settings.kept_keys);
            // Above the lowest level keys out of sight are among those scored.
            let certain = if visible.start == 0 { levels.len() } else { 1 };
            levels[..certain].iter().for_each(|level| best.expect(level.keys(rank).0, selection));
            for level in &*levels {
                let (scores, keys) = level.keys(rank);
                best.offer(scores, selection, |indices, packed| {
                    let seen = indices.iter().filter(|&&index| keys[index as usize] as usize >= visible.start);
                    packed.extend(seen.map(|&index| pack(scores[index as usize], keys[index as usize])));
                });
            }
            best.finish();
        }
    }

    /// Notes which nodes query `query` visits at its frontier, and computes what is not computed with others.
    fn plan(&self, query: u32, height: usize, queries: &[f32], nodes: usize, scratch: &mut SearchScratch) {
        let SearchScratch { descents, levels, visits, frontier, scored, .. } = scratch;
        let (descent, level) = (&mut descents[query as usize], &mut levels[height - 1]);
        let owner = |step: &Step| Some((step.score, self.index.outline(step.node).own_below?));
        level.begin_query(frontier.iter().filter_map(owner));
        let least = nodes.max(self.settings.kept_keys);
        for Step { node, slots, .. } in &*frontier {
            let candidates = candidates(slots.len(), self.settings.whole_node, self.settings.query_share, least);
            if candidates < slots.len() {
                let width = self.directions.width();
                let vector = &queries[query as usize * width..][..width];
                let squared_norm: f32 = vector.iter().map(|value| value * value).sum();
                let target = Target {
                    vector,
                    bound: self.index.bound(descent.visible.end),
                    extra: None,
                    factor: if squared_norm > 0.0 { 1.0 / squared_norm.sqrt() } else { 0.0 },
                };
                let node = self.index.node(*node);
                let Descent { projected, evaluated, .. } = &mut *descent;
                let products = scored.score(node, slots.clone(), &target, candidates, self.directions, projected);
                *evaluated += products as u64;
                let first = level.add_keys(scored.scores.len());
                let Places { scores, keys, below } = level.places();
                for (place, (&score, &slot)) in (first..).zip(scored.scores.iter().zip(&scored.slots)) {
                    (scores[place], keys[place]) = (score, node.keys[slot as usize]);
                    if height > 1 {
                        below[place] = node.below[slot as usize];
                    }
                }
            } else if !slots.is_empty() {
                // Places of several queries are fewer than MOST_SCORES, those of one fewer than keys and nodes.
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
    /// For each node of the tree, its visits, or where the next is sorted in; zero before and after.
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
        for &(node, _) in &*nodes {
            counts[node as usize] = 0;
        }
        let mut first = 0;
        for (rank, &(node, end)) in nodes.iter().enumerate() {
            let next = nodes.get(rank + 1).map(|&(next, _)| next);
            take(node, next, &sorted[first..end as usize]);
            first = end as usize;
        }
    }
}
