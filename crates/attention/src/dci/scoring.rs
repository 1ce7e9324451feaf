//! The keys of one node compared with one vector: all of a small node, of a large one those that Prioritized DCI retrieves.

use std::ops::Range;

use iceformer_kernels::panels::{Visit, dot_panels};

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
    /// Share of a large node's keys that each composite index retrieves.
    pub share: f32,
    /// Candidates that each composite index retrieves at least.
    pub least: usize,
}

/// Scores of keys of one node.
#[derive(Default)]
pub(crate) struct Scores {
    pub scores: Vec<f32>,
    /// Where the keys stand in the node, ascending.
    pub slots: Vec<u32>,
    retrieval: RetrievalScratch,
}

impl Scores {
    /// Scores the keys `slots` of `node`, all of up to `whole_node`. `projected` holds the vector's projections from the
    /// first large node on, and is empty before.
    pub(crate) fn score(
        &mut self,
        node: &Node,
        slots: Range<usize>,
        target: &Target<'_>,
        whole_node: usize,
        directions: &Directions,
        projected: &mut Vec<f32>,
    ) {
        let Self { scores, slots: scored, retrieval } = self;
        let width = target.vector.len();
        let candidates = match slots.len() > whole_node {
            true => ((slots.len() as f32 * target.share).ceil() as usize).max(target.least),
            false => slots.len(),
        };
        scores.resize(slots.len(), 0.0);
        let visit = Visit { vector: 0, first_row: slots.start as u32, rows: slots.len() as u32, place: 0 };
        dot_panels(target.vector, width, node.panels(), &[visit], scores);
        scored.clear();
        if candidates < slots.len() {
            if projected.is_empty() {
                directions.project(target.vector, target.factor, target.extra.unwrap_or(0.0), projected);
            }
            let wanted = Retrieval { projected, bound: target.bound, candidates };
            node.projections().retrieve(directions, &node.squared_norms, slots.clone(), wanted, retrieval, scored);
            // Several composite indices retrieve nearly all of a node between them: a product more costs less than a gap.
            for (place, &slot) in scored.iter().enumerate() {
                scores[place] = scores[slot as usize - slots.start];
            }
            scores.truncate(scored.len());
        } else {
            scored.extend(slots.map(|slot| slot as u32));
        }
        if let Some(extra) = target.extra {
            for (score, &slot) in scores.iter_mut().zip(&*scored) {
                let extra_of_key = target.bound.extra(node.squared_norms[slot as usize]);
                *score = target.bound.lifted_product(*score, extra, extra_of_key);
            }
        }
    }
}
