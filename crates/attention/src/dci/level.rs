//! What the queries of a tile are compared with at one level of the tree: keys, their scores, and where they lead.

use std::ops::Range;

/// Scores of some queries, those of a query one behind the other.
///
/// The nodes of owners come first: an owner is not among the keys of this level, but has a node one level down too.
#[derive(Default)]
pub(crate) struct Level {
    // More room than is used.
    scores: Vec<f32>,
    keys: Vec<u32>,
    below: Vec<u32>,
    used: usize,
    queries: Vec<OfQuery>,
}

/// Where the scores of one query lie.
struct OfQuery {
    all: Range<usize>,
    first_key: usize,
}

/// Room in a level.
pub(crate) struct Places<'a> {
    pub scores: &'a mut [f32],
    /// Positions of keys.
    pub keys: &'a mut [u32],
    /// Nodes that keys lead to, one level down.
    pub below: &'a mut [u32],
}

impl Level {
    pub(crate) fn clear(&mut self) {
        self.used = 0;
        self.queries.clear();
    }

    /// Begins the next query. `owners` are the scores of owners, with their nodes.
    pub(crate) fn begin_query(&mut self, owners: impl Iterator<Item = (f32, u32)>) {
        let start = self.used;
        for (score, node) in owners {
            let place = self.add(1);
            (self.scores[place], self.below[place]) = (score, node);
        }
        self.queries.push(OfQuery { all: start..self.used, first_key: self.used });
    }

    /// Room for further keys of the query begun last; returns the first place.
    pub(crate) fn add_keys(&mut self, keys: usize) -> usize {
        let place = self.add(keys);
        self.queries.last_mut().expect("a query was begun").all.end = self.used;
        place
    }

    fn add(&mut self, count: usize) -> usize {
        let place = self.used;
        self.used += count;
        if self.used > self.scores.len() {
            let room = 2 * self.used;
            self.scores.resize(room, 0.0);
            self.keys.resize(room, 0);
            self.below.resize(room, 0);
        }
        place
    }

    /// All places.
    pub(crate) fn places(&mut self) -> Places<'_> {
        Places { scores: &mut self.scores, keys: &mut self.keys, below: &mut self.below }
    }

    /// Scores of the owners and keys of query `query`, in the order of their being added, and the nodes they lead to.
    pub(crate) fn leads(&self, query: usize) -> (&[f32], &[u32]) {
        let OfQuery { all, .. } = &self.queries[query];
        (&self.scores[all.clone()], &self.below[all.clone()])
    }

    /// Scores of the keys of query `query`, and their positions.
    pub(crate) fn keys(&self, query: usize) -> (&[f32], &[u32]) {
        let OfQuery { all, first_key } = &self.queries[query];
        (&self.scores[*first_key..all.end], &self.keys[*first_key..all.end])
    }
}
