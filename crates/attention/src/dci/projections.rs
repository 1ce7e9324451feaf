//! Prioritized DCI over the keys of one node ([Li and Malik 2017](https://arxiv.org/abs/1703.00440)).
//!
//! A simple index orders points by their projection on one random direction; a composite index joins *m* of them. Its
//! priority queue pops, over all its simple indices, the point whose projection is nearest to the query's, and a point
//! becomes a candidate once all *m* have popped it. Pops therefore come in the order of `|u_j·p − u_j·q|`, and
//! candidates in the order of `max_j |u_j·p − u_j·q|`. With the shares of a node that are asked for here (up to .8) and
//! nodes of some hundred keys it is far cheaper to compute that maximum for every key, sixteen at a time, and to select
//! than to walk sorted lists. The candidates are the same, and an append sorts nothing.

use std::ops::Range;

use iceformer_kernels::AlignedBuffer;
use iceformer_kernels::panels::{Panels, Visit, dot_panels};
use iceformer_kernels::rows::{ROW_MULTIPLE, Rows, dot_rows};

use super::lift::Bound;
use super::random::normal;
use super::rank::pack;

/// The random directions of all composite indices, in the lifted space.
pub(crate) struct Directions {
    simple_indices: usize,
    composite_indices: usize,
    /// `[composite][simple][row width]`, zero behind the key width.
    directions: AlignedBuffer<f32>,
    /// `[composite][simple]`: the last coordinate.
    extras: Vec<f32>,
}

impl Directions {
    /// Unit vectors of `key_dim + 1` numbers.
    pub(crate) fn new(simple_indices: usize, composite_indices: usize, key_dim: usize, seed: u64) -> Self {
        let count = simple_indices * composite_indices;
        let width = key_dim.next_multiple_of(ROW_MULTIPLE);
        let mut directions = AlignedBuffer::zeroed(count * width);
        let mut extras = Vec::with_capacity(count);
        for (index, row) in directions.chunks_exact_mut(width).enumerate() {
            let number = |coordinate: usize| normal(!seed, (index * (key_dim + 1) + coordinate) as u64);
            let norm = (0..=key_dim).map(|coordinate| number(coordinate).powi(2)).sum::<f64>().sqrt();
            let unit = |coordinate: usize| (number(coordinate) / norm) as f32;
            row[..key_dim].iter_mut().enumerate().for_each(|(coordinate, value)| *value = unit(coordinate));
            extras.push(unit(key_dim));
        }
        Self { simple_indices, composite_indices, directions, extras }
    }

    /// Width of a row.
    pub(crate) fn width(&self) -> usize {
        self.directions.len() / self.count()
    }

    fn count(&self) -> usize {
        self.extras.len()
    }

    /// Projections of `point`, whose last coordinate is `extra`, onto every direction.
    pub(crate) fn project(&self, point: &[f32], factor: f32, extra: f32, output: &mut Vec<f32>) {
        output.resize(self.count(), 0.0);
        dot_rows(point, Rows::F32(&self.directions), output);
        for (projection, direction) in output.iter_mut().zip(&self.extras) {
            *projection = *projection * factor + direction * extra;
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.directions.bytes() + 4 * self.extras.capacity()
    }
}

/// Projections of the keys of one node, not lifted: what they are in the lifted space follows from the norms.
#[derive(Default)]
pub(crate) struct Projections {
    /// `[composite · simple][keys]`
    of_direction: Vec<Vec<f32>>,
}

/// Buffers of a retrieval.
#[derive(Default)]
pub(crate) struct RetrievalScratch {
    extras: Vec<f32>,
    largest: Vec<f32>,
    selection: Vec<u64>,
    retrieved: Vec<bool>,
}

/// What a retrieval asks for.
#[derive(Clone, Copy)]
pub(crate) struct Retrieval<'a> {
    /// From [`Directions::project`].
    pub projected: &'a [f32],
    pub bound: Bound,
    /// Candidates of each composite index.
    pub candidates: usize,
}

impl Projections {
    /// Projects those of the first `keys` keys that are not yet.
    pub(crate) fn extend(&mut self, directions: &Directions, panels: Panels<'_>, keys: usize) {
        self.of_direction.resize_with(directions.count(), Vec::new);
        let width = directions.width();
        for (direction, projections) in directions.directions.chunks_exact(width).zip(&mut self.of_direction) {
            let known = projections.len();
            projections.resize(keys, 0.0);
            let visit = Visit { vector: 0, first_row: known as u32, rows: (keys - known) as u32, place: 0 };
            dot_panels(direction, width, panels, &[visit], &mut projections[known..]);
        }
    }

    /// Drops all keys from `keys` on.
    pub(crate) fn truncate(&mut self, keys: usize) {
        self.of_direction.iter_mut().for_each(|projections| projections.truncate(keys));
    }

    pub(crate) fn bytes(&self) -> usize {
        self.of_direction.iter().map(|projections| 4 * projections.capacity()).sum()
    }

    /// Writes to `chosen`, in order, the keys among `keys` that some composite index makes a candidate.
    pub(crate) fn retrieve(
        &self,
        directions: &Directions,
        squared_norms: &[f32],
        keys: Range<usize>,
        retrieval: Retrieval<'_>,
        scratch: &mut RetrievalScratch,
        chosen: &mut Vec<u32>,
    ) {
        let Retrieval { projected, bound, candidates } = retrieval;
        let RetrievalScratch { extras, largest, selection, retrieved } = scratch;
        extras.clear();
        extras.extend(squared_norms[keys.clone()].iter().map(|&squared_norm| bound.extra(squared_norm)));
        retrieved.clear();
        retrieved.resize(keys.len(), false);
        for composite in 0..directions.composite_indices {
            largest.clear();
            largest.resize(keys.len(), 0.0);
            let simple = composite * directions.simple_indices..(composite + 1) * directions.simple_indices;
            let targets = projected[simple.clone()].iter().zip(&directions.extras[simple.clone()]);
            for ((target, extra_factor), projections) in targets.zip(&self.of_direction[simple]) {
                let projections = &projections[keys.clone()];
                for ((largest, projection), extra) in largest.iter_mut().zip(projections).zip(extras.iter()) {
                    let distance = (projection * bound.inverse() + extra_factor * extra - target).abs();
                    *largest = if distance > *largest { distance } else { *largest };
                }
            }
            // Negated, so that the nearest are the largest and of equals the earlier key comes first.
            selection.clear();
            selection.extend(largest.iter().enumerate().map(|(index, &distance)| pack(-distance, index as u32)));
            if candidates < selection.len() {
                selection.select_nth_unstable_by(candidates - 1, |a, b| b.cmp(a));
                selection.truncate(candidates);
            }
            selection.iter().for_each(|&packed| retrieved[super::rank::unpack(packed).1 as usize] = true);
        }
        chosen.clear();
        chosen.extend(keys.zip(retrieved).filter(|(_, retrieved)| **retrieved).map(|(index, _)| index as u32));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use iceformer_testing::random::Random;

    use super::super::node::PanelBuffer;
    use super::*;

    /// The priority queues of the paper (algorithm 2), literally: sorted lists walked outwards from the query.
    fn queues(
        points: &[Vec<f64>],
        query: &[f64],
        simple_indices: usize,
        composite_indices: usize,
        candidates: usize,
    ) -> BTreeSet<usize> {
        let mut found = BTreeSet::new();
        for composite in 0..composite_indices {
            let range = composite * simple_indices..(composite + 1) * simple_indices;
            let lists: Vec<Vec<(f64, usize)>> = range
                .map(|direction| {
                    let mut list: Vec<(f64, usize)> = points
                        .iter()
                        .enumerate()
                        .map(|(id, p)| ((p[direction] - query[direction]).abs(), id))
                        .collect();
                    list.sort_by(|a, b| a.0.total_cmp(&b.0));
                    list
                })
                .collect();
            let mut heads = vec![0; simple_indices];
            let mut visits = vec![0; points.len()];
            let mut retrieved = 0;
            while retrieved < candidates.min(points.len()) {
                let nearest = (0..simple_indices)
                    .filter(|&list| heads[list] < points.len())
                    .min_by(|&a, &b| lists[a][heads[a]].0.total_cmp(&lists[b][heads[b]].0))
                    .expect("a list with points left");
                let point = lists[nearest][heads[nearest]].1;
                heads[nearest] += 1;
                visits[point] += 1;
                if visits[point] == simple_indices {
                    found.insert(point);
                    retrieved += 1;
                }
            }
        }
        found
    }

    #[test]
    fn candidates_are_those_of_the_priority_queues() {
        let mut random = Random::new(5);
        for (simple, composite, keys, dim) in [(4, 2, 200, 24), (1, 1, 150, 16), (3, 4, 77, 7_usize)] {
            let width = dim.next_multiple_of(ROW_MULTIPLE);
            let directions = Directions::new(simple, composite, dim, 9);
            let mut rows = vec![0.0; keys * width];
            rows.chunks_exact_mut(width).for_each(|row| row[..dim].copy_from_slice(&random.normals(dim, 1.0)));
            let squared_norms: Vec<f32> =
                rows.chunks_exact(width).map(|row| row.iter().map(|value| value * value).sum()).collect();
            let bound = Bound::new(squared_norms.iter().copied().fold(0.0, f32::max));
            let mut projections = Projections::default();
            let mut panels = PanelBuffer::new(true);
            rows.chunks_exact(width).enumerate().for_each(|(key, row)| panels.push(key, row));
            projections.extend(&directions, panels.panels(), keys / 2);
            projections.extend(&directions, panels.panels(), keys);
            let mut projected = Vec::new();
            let query: Vec<f32> = random.normals(width, 0.1);
            directions.project(&query, 1.0, 0.0, &mut projected);
            let lifted = |key: usize| -> Vec<f64> {
                let mut all = Vec::new();
                let row = &rows[key * width..][..width];
                directions.project(row, bound.inverse(), bound.extra(squared_norms[key]), &mut all);
                all.into_iter().map(f64::from).collect()
            };
            for (candidates, range) in [(1, 0..keys), (keys / 3, 5..keys - 9), (keys * 4 / 5, 0..keys), (keys, 0..keys)]
            {
                let points: Vec<Vec<f64>> = range.clone().map(lifted).collect();
                let target: Vec<f64> = projected.iter().copied().map(f64::from).collect();
                let expected = queues(&points, &target, simple, composite, candidates);
                let mut chosen = Vec::new();
                let retrieval = Retrieval { projected: &projected, bound, candidates };
                let scratch = &mut RetrievalScratch::default();
                projections.retrieve(&directions, &squared_norms, range.clone(), retrieval, scratch, &mut chosen);
                let chosen: BTreeSet<usize> = chosen.iter().map(|&index| index as usize - range.start).collect();
                assert_eq!(chosen, expected, "{candidates} of {range:?}, {simple} × {composite}");
            }
        }
    }

    #[test]
    fn directions_are_unit_vectors() {
        let directions = Directions::new(4, 2, 33, 1);
        for (row, extra) in directions.directions.chunks_exact(48).zip(&directions.extras) {
            let norm: f32 = row.iter().map(|value| value * value).sum::<f32>() + extra * extra;
            assert!((norm - 1.0).abs() < 1e-5 && row[33..].iter().all(|&value| value == 0.0));
        }
    }
}
