//! The keys of one node compared with one vector: all of a small node, of a large one those that Prioritized DCI retrieves.

use std::ops::Range;

use iceformer_kernels::panels::{PANEL_ROWS, Visit, dot_panels};

use super::lift::Bound;
use super::node::Node;
use super::projections::{Directions, Retrieval, RetrievalScratch};

/// What keys are compared with.
pub(crate) struct Target<'a> {
    /// Filled up with zeros to the width of a row.
    pub vector: &'a [f32],
    pub bound: Bound,
    /// Last coordinate of a key in the lifted space; `None` for a query, whose scores are plain products.
    pub extra: Option<f32>,
    /// Makes the vector a unit vector (with `extra`) where it is projected.
    pub factor: f32,
}

/// Keys that each composite index retrieves of the `keys` keys of a node: all of up to `whole_node`, of others a share, and
/// `least` at least.
pub(crate) fn candidates(keys: usize, whole_node: usize, share: f32, least: usize) -> usize {
    match keys > whole_node {
        true => ((keys as f32 * share).ceil() as usize).max(least).min(keys),
        false => keys,
    }
}

/// Scores of keys of one node.
#[derive(Default)]
pub(crate) struct Scores {
    pub scores: Vec<f32>,
    /// Where the keys stand in the node, ascending.
    pub slots: Vec<u32>,
    visits: Vec<Visit>,
    retrieval: RetrievalScratch,
}

impl Scores {
    /// Scores the keys `slots` of `node`, or those among them that its composite indices retrieve, `candidates` each.
    /// Returns the number of products computed. `projected` holds the vector's projections from the first retrieval on, and
    /// is empty before.
    pub(crate) fn score(
        &mut self,
        node: &Node,
        slots: Range<usize>,
        target: &Target<'_>,
        candidates: usize,
        directions: &Directions,
        projected: &mut Vec<f32>,
    ) -> usize {
        let Self { scores, slots: scored, visits, retrieval } = self;
        let width = target.vector.len();
        let visit = |rows: Range<usize>| Visit {
            vector: 0,
            first_row: rows.start as u32,
            rows: rows.len() as u32,
            place: (rows.start - slots.start) as u32,
        };
        scores.resize(slots.len(), 0.0);
        scored.clear();
        visits.clear();
        if candidates < slots.len() {
            if projected.is_empty() {
                directions.project(target.vector, target.factor, target.extra.unwrap_or(0.0), projected);
            }
            let wanted = Retrieval { projected, bound: target.bound, candidates };
            node.projections().retrieve(directions, &node.squared_norms, slots.clone(), wanted, retrieval, scored);
            // A panel is computed whole: its rows lie side by side.
            for panel in scored.chunk_by(|a, b| *a as usize / PANEL_ROWS == *b as usize / PANEL_ROWS) {
                let first = panel[0] as usize / PANEL_ROWS * PANEL_ROWS;
                visits.push(visit(first.max(slots.start)..slots.end.min(first + PANEL_ROWS)));
            }
        } else {
            scored.extend(slots.clone().map(|slot| slot as u32));
            visits.push(visit(slots.clone()));
        }
        dot_panels(target.vector, width, node.panels(), visits, scores);
        if scored.len() < slots.len() {
            for (place, &slot) in scored.iter().enumerate() {
                scores[place] = scores[slot as usize - slots.start];
            }
            scores.truncate(scored.len());
        }
        if let Some(extra) = target.extra {
            for (score, &slot) in scores.iter_mut().zip(&*scored) {
                let extra_of_key = target.bound.extra(node.squared_norms[slot as usize]);
                *score = target.bound.lifted_product(*score, extra, extra_of_key);
            }
        }
        visits.iter().map(|visit| visit.rows as usize).sum()
    }
}
