//! Micro-tiles within one limit after another, each smaller than the one before: what was computed within a larger limit
//! is not computed again.

use iceformer_kernels::attention::{AttentionTile, MICRO_ROWS};

use super::estimate::Estimate;
use super::tile::Work;
use crate::tiles;

/// The micro-tiles of some rows on their way down, in buffers that are used again.
#[derive(Default)]
pub(super) struct Descent {
    /// What the rows see near them.
    near: AttentionTile,
    /// The clusters that were computed, and nothing else.
    clusters: AttentionTile,
    /// Their numbers, ascending, by micro-tile.
    computed: Vec<Vec<u32>>,
    /// What the limits that were tried last have left of the rows.
    within: AttentionTile,
    estimate: Estimate,
    /// The micro-tile that `estimate` holds.
    estimated: Option<usize>,
    /// Clusters that are computed next.
    missing: Vec<u32>,
}

/// What a micro-tile did within its limits.
pub(super) struct Estimated {
    /// Clusters that were computed.
    pub selected: usize,
    /// Root of the sum of squared errors of the others, as estimated, by row.
    pub errors: [f32; MICRO_ROWS],
}

impl Descent {
    /// Turns to the rows of `work`, of which nothing is computed yet.
    pub fn begin(&mut self, work: &Work<'_>) {
        let (budgeted, task) = (work.budgeted, work.task);
        for tile in [&mut self.clusters, &mut self.within] {
            tiles::begin(tile, &budgeted.call, task);
        }
        let seen = tiles::begin(&mut self.near, &budgeted.call, task);
        budgeted.accumulate_near(&mut self.near, task, work.regions, seen);
        self.computed.resize_with(self.computed.len().max(work.micro_tiles()), Vec::new);
        self.computed.iter_mut().for_each(Vec::clear);
        self.estimated = None;
    }

    /// Takes a micro-tile to `limits`, one for each query head: as few clusters as keep them are computed, the others
    /// estimated. `None` where nothing can be estimated.
    pub fn go_to(&mut self, work: &Work<'_>, micro_tile: usize, limits: &[f32]) -> Option<Estimated> {
        self.clusters_within(work, micro_tile, limits)?;
        let (rows, estimate) = (work.rows_of(micro_tile), &mut self.estimate);
        let (selected, computed) = (estimate.selected(), &mut self.computed[micro_tile]);
        // Of heads that go down one by one, what one wants may drop out for another's sake.
        if !computed.iter().all(|cluster| selected.binary_search(cluster).is_ok()) {
            self.clusters.clear_rows(rows.clone());
            computed.clear();
        }
        self.missing.clear();
        self.missing.extend(selected.iter().filter(|cluster| computed.binary_search(cluster).is_err()));
        work.compute(micro_tile, &self.missing, &mut self.clusters);
        computed.clear();
        computed.extend(selected);

        self.within.copy_rows(&self.near, rows.clone());
        let selected = selected.len();
        let errors = estimate.add_others(work, micro_tile, &mut self.within);
        estimate.put_back(work);
        self.within.merge_rows(&self.clusters, rows);
        Some(Estimated { selected, errors })
    }

    /// How many clusters would be computed within `limits`. `None` where nothing can be estimated.
    pub fn clusters_within(&mut self, work: &Work<'_>, micro_tile: usize, limits: &[f32]) -> Option<usize> {
        if self.estimated != Some(micro_tile) {
            self.estimated = None;
            if !self.estimate.begin(work, micro_tile, &mut self.near) {
                return None;
            }
            self.estimated = Some(micro_tile);
        }
        self.estimate.select(work, micro_tile, limits);
        Some(self.estimate.selected().len())
    }

    /// Writes the output of row `row` within the limits that its micro-tile was taken to last.
    pub fn finish_row(&self, row: usize, output: &mut [f32]) {
        self.within.finish_row(row, output);
    }
}

#[cfg(test)]
mod tests {
    use iceformer_testing::compare::assert_close;
    use iceformer_testing::random::Random;

    use super::*;
    use crate::KeyValueType;
    use crate::budgeted::tile::tests::{WIDTH, look_at_work};

    /// What a micro-tile is within `limits`, begun anew: the clusters that are computed, their errors, the outputs.
    fn at_once(work: &Work<'_>, micro_tile: usize, limits: &[f32]) -> (usize, [f32; MICRO_ROWS], Vec<f32>) {
        let (mut tile, mut estimate) = (AttentionTile::default(), Estimate::default());
        let seen = tiles::begin(&mut tile, &work.budgeted.call, work.task);
        work.budgeted.accumulate_near(&mut tile, work.task, work.regions, seen);
        let errors = estimate.add(work, micro_tile, limits, usize::MAX, &mut tile).expect("numbers");
        work.compute(micro_tile, estimate.selected(), &mut tile);
        let outputs = outputs(work, micro_tile, |row, output| tile.finish_row(row, output));
        (estimate.selected().len(), errors, outputs)
    }

    fn outputs(work: &Work<'_>, micro_tile: usize, finish: impl Fn(usize, &mut [f32])) -> Vec<f32> {
        let rows = work.rows_of(micro_tile);
        let mut outputs = vec![0.0; rows.len() * WIDTH];
        rows.zip(outputs.chunks_exact_mut(WIDTH)).for_each(|(row, output)| finish(row, output));
        outputs
    }

    #[test]
    fn limits_one_after_another_are_those_limits_at_once() {
        let mut random = Random::new(4);
        for kind in KeyValueType::ALL {
            // Rows of one head; of three heads that share micro-tiles, each with limits of its own; a lone row.
            for (heads, tokens) in [(2, 6), (3, 3), (1, 1)] {
                look_at_work(kind, (heads, tokens), 0, &mut random, |work| {
                    let mut descent = Descent::default();
                    let mut counts = Vec::new();
                    // Begun again, a descent knows nothing of the first.
                    for _ in 0..2 {
                        descent.begin(work);
                        let mut limits = vec![0.3; heads];
                        for step in 0..9 {
                            for micro_tile in 0..work.micro_tiles() {
                                let (selected, errors, expected) = at_once(work, micro_tile, &limits);
                                let within = descent.clusters_within(work, micro_tile, &limits);
                                let estimated = descent.go_to(work, micro_tile, &limits).expect("numbers");
                                assert_eq!((within, estimated.selected), (Some(selected), selected), "step {step}");
                                counts.push(selected);
                                for (error, expected) in estimated.errors.iter().zip(errors) {
                                    assert!((error - expected).abs() <= 1e-5 * expected, "{error} for {expected}");
                                }
                                let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
                                let found = outputs(work, micro_tile, |row, output| descent.finish_row(row, output));
                                // Weights are rounded in relation to another largest one.
                                let allowed = if kind == KeyValueType::F32 { 1e-5 } else { 3e-3 };
                                assert_close(&found, &expected, allowed, format!("{}, step {step}", kind.name()));
                            }
                            limits[step % heads] *= 0.3;
                        }
                    }
                    let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
                    assert!(*least == 0 && *most > work.clusters() / 2, "{least} to {most} clusters");
                });
            }
        }
    }
}
