//! What the rows of a tile have seen so far, the state of their online softmax: read, merged with that of another tile, and
//! added to without looking at keys.

use std::ops::Range;

use super::clusters::WeightedClusters;
use super::tile::{AttentionTile, NATS, NOTHING_SEEN};
use super::{MICRO_ROWS, PAGE_KEYS};

impl AttentionTile {
    /// Takes over what `other`, a tile of the same shape, has seen so far in `rows`.
    ///
    /// # Panics
    /// When the shapes differ.
    pub fn copy_rows(&mut self, other: &Self, rows: Range<usize>) {
        assert_eq!(self.shape, other.shape, "tiles of one shape");
        let value_dim = self.shape.value_dim;
        let of_width = |width: usize| rows.start * width..rows.end * width;
        self.maxima[rows.clone()].copy_from_slice(&other.maxima[rows.clone()]);
        self.sums[of_width(PAGE_KEYS)].copy_from_slice(&other.sums[of_width(PAGE_KEYS)]);
        self.output[of_width(value_dim)].copy_from_slice(&other.output[of_width(value_dim)]);
    }

    /// Adds what `other`, a tile of the same shape, has seen so far in `rows`.
    ///
    /// # Panics
    /// When the shapes differ.
    pub fn merge_rows(&mut self, other: &Self, rows: Range<usize>) {
        assert_eq!(self.shape, other.shape, "tiles of one shape");
        let value_dim = self.shape.value_dim;
        for row in rows {
            self.raise_maximum(row, other.maximum(row));
            let share = ((other.maxima[row] - self.maxima[row]) * NATS).exp();
            let add = |to: &mut [f32], from: &[f32]| to.iter_mut().zip(from).for_each(|(to, from)| *to += share * from);
            let (lanes, channels) = (row * PAGE_KEYS..(row + 1) * PAGE_KEYS, row * value_dim..(row + 1) * value_dim);
            add(&mut self.sums[lanes.clone()], &other.sums[lanes]);
            add(&mut self.output[channels.clone()], &other.output[channels]);
        }
    }

    /// Empties all rows, which keep their queries.
    pub fn clear(&mut self) {
        self.clear_rows(0..self.shape.rows);
    }

    /// Empties `rows`, which keep their queries.
    pub fn clear_rows(&mut self, rows: Range<usize>) {
        let value_dim = self.shape.value_dim;
        self.maxima[rows.clone()].fill(NOTHING_SEEN);
        self.sums[rows.start * PAGE_KEYS..rows.end * PAGE_KEYS].fill(0.0);
        self.output[rows.start * value_dim..rows.end * value_dim].fill(0.0);
    }

    /// Largest logit of row `row` so far, in nats; very low when it has seen none.
    pub fn maximum(&self, row: usize) -> f32 {
        self.maxima[row] * NATS
    }

    /// Softmax sum of row `row` so far, relative to `e^maximum`.
    pub fn sum(&self, row: usize) -> f32 {
        let lanes = &self.sums[row * PAGE_KEYS..(row + 1) * PAGE_KEYS];
        // Four sums side by side, so that they do not all wait for one another.
        let [a, b, c, d] = lanes
            .as_chunks::<4>()
            .0
            .iter()
            .fold([0.0; 4], |sums, lanes| std::array::from_fn(|lane| sums[lane] + lanes[lane]));
        (a + c) + (b + d)
    }

    /// Log-sum-exp of row `row` so far, in nats: −∞ for a row that saw no key.
    pub fn log_sum_exp(&self, row: usize) -> f32 {
        let sum = self.sum(row);
        if sum == 0.0 { f32::NEG_INFINITY } else { self.maxima[row] * NATS + sum.ln() }
    }

    /// Lets later masses of row `row` be given relative to `e^reference`, which becomes its largest logit unless a
    /// larger one was seen.
    pub fn raise_maximum(&mut self, row: usize, reference: f32) {
        let (before, after) = (self.maxima[row], reference / NATS);
        if after > before {
            let decay = ((before - after) * NATS).exp();
            self.maxima[row] = after;
            let value_dim = self.shape.value_dim;
            self.sums[row * PAGE_KEYS..(row + 1) * PAGE_KEYS].iter_mut().for_each(|sum| *sum *= decay);
            self.output[row * value_dim..(row + 1) * value_dim].iter_mut().for_each(|value| *value *= decay);
        }
    }

    /// Adds clusters to the `rows` rows from `first_row` on: row `r` of `masses` (rows of `stride`) holds the mass of
    /// each cluster relative to `e^maximum` of its row, `values` `[clusters / 2][value_dim][2]` their mean values as
    /// brain floats.
    ///
    /// # Panics
    /// When a slice is too short, or there are more than [`MICRO_ROWS`] rows.
    pub fn add_clusters(&mut self, first_row: usize, rows: usize, masses: &[f32], stride: usize, values: &[u16]) {
        let value_dim = self.shape.value_dim;
        let clusters = values.len() / value_dim;
        for row in 0..rows {
            let mut lanes = [0.0; PAGE_KEYS];
            let (chunks, rest) = masses[row * stride..][..clusters].as_chunks::<PAGE_KEYS>();
            for chunk in chunks.iter().map(<[f32; PAGE_KEYS]>::as_slice).chain([rest]) {
                lanes.iter_mut().zip(chunk).for_each(|(sum, mass)| *sum += mass);
            }
            // In the first lane, as kernels with shorter vectors look at no lanes behind theirs when the maximum rises.
            self.sums[(first_row + row) * PAGE_KEYS] += lanes.iter().sum::<f32>();
        }
        self.add_values(first_row, rows, masses, stride, values);
    }

    /// Adds to the weighted values of the `rows` rows from `first_row` on, and not to their softmax sums: row `r` of `weights`
    /// (rows of `stride`) holds the weight of each of `values` `[values / 2][value_dim][2]`, brain floats.
    ///
    /// # Panics
    /// When a slice is too short, or there are more than [`MICRO_ROWS`] rows.
    pub fn add_values(&mut self, first_row: usize, rows: usize, weights: &[f32], stride: usize, values: &[u16]) {
        assert!(rows <= MICRO_ROWS, "{rows} rows are more than a micro-tile has");
        let value_dim = self.shape.value_dim;
        let output = &mut self.output[first_row * value_dim..(first_row + rows) * value_dim];
        let level = self.instruction_set.expect("begin was called");
        WeightedClusters { masses: weights, stride, rows, values, value_dim, output }.run(level, &mut self.weights);
    }

    /// Writes the output of row `row` (`output` may be narrower than the padded width): zeros for a row that saw no key.
    pub fn finish_row(&self, row: usize, output: &mut [f32]) {
        let value_dim = self.shape.value_dim;
        let sum = self.sum(row);
        let sums = &self.output[row * value_dim..(row + 1) * value_dim];
        if sum == 0.0 {
            output.fill(0.0);
            return;
        }
        let inverse = 1.0 / sum;
        output.iter_mut().zip(sums).for_each(|(target, value)| *target = value * inverse);
    }
}
