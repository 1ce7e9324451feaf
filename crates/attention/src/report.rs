//! What an attention call did, head by head.

use std::ops::AddAssign;

/// What a call did; reports of several calls add up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// One for each query head; empty before the first call.
    pub heads: Vec<HeadReport>,
}

/// What was done for the queries of one head. A *row* is one query of one head.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadReport {
    /// Queries.
    pub rows: u64,
    /// Rows that a method other than `exact` computed exactly because nothing else kept the budget or paid.
    pub fallback_rows: u64,
    /// Rows that read keys and values in a narrower type than the caller's, which takes a part of the budget.
    pub rounded_rows: u64,
    /// (query, key) pairs the mask allows.
    pub allowed_keys: u64,
    /// (query, key) pairs whose logit was computed, those of keys that only lead a search included. What is computed beside
    /// them to measure and to audit rows does not count.
    pub evaluated_keys: u64,
    /// (query, key) pairs whose own value entered the output.
    pub kept_keys: u64,
    /// Missed mass as the method estimates it, of the rows that left something to an estimate. The others miss nothing, or
    /// what the rounding of the cache takes.
    pub estimated_missed_mass: MassHistogram,
    /// Missed mass of the rows that were also computed exactly, to audit the others.
    pub audited_missed_mass: MassHistogram,
}

impl Report {
    /// The same for every one of `heads` heads.
    pub(crate) fn of_heads(heads: usize, each: &HeadReport) -> Self {
        Self { heads: vec![each.clone(); heads] }
    }

    /// Adds up the entries of a batch that ran as heads of one call: head `h` of each becomes head `h`.
    pub(crate) fn fold_batch(&mut self, batch: usize) {
        let others = self.heads.split_off(self.heads.len() / batch);
        for (index, other) in others.iter().enumerate() {
            let head = index % self.heads.len();
            self.heads[head] += other;
        }
    }

    /// All heads together.
    pub fn total(&self) -> HeadReport {
        let mut total = HeadReport::default();
        self.heads.iter().for_each(|head| total += head);
        total
    }
}

impl AddAssign<&Self> for Report {
    fn add_assign(&mut self, other: &Self) {
        if self.heads.len() < other.heads.len() {
            self.heads.resize_with(other.heads.len(), HeadReport::default);
        }
        self.heads.iter_mut().zip(&other.heads).for_each(|(head, other)| *head += other);
    }
}

impl HeadReport {
    /// Of `rows` queries that were computed exactly, which see `allowed_keys` keys together.
    pub(crate) fn exact(rows: usize, allowed_keys: u64) -> Self {
        let (evaluated_keys, kept_keys) = (allowed_keys, allowed_keys);
        Self { rows: rows as u64, allowed_keys, evaluated_keys, kept_keys, ..Self::default() }
    }

    /// Share of the allowed pairs whose own value entered the output; 1 where nothing was allowed.
    pub fn kept_share(&self) -> f64 {
        if self.allowed_keys == 0 { 1.0 } else { self.kept_keys as f64 / self.allowed_keys as f64 }
    }

    /// Share of the rows that fell back to exact attention; 0 where there are none.
    pub fn fallback_share(&self) -> f64 {
        if self.rows == 0 { 0.0 } else { self.fallback_rows as f64 / self.rows as f64 }
    }
}

impl AddAssign<&Self> for HeadReport {
    fn add_assign(&mut self, other: &Self) {
        self.rows += other.rows;
        self.fallback_rows += other.fallback_rows;
        self.rounded_rows += other.rounded_rows;
        self.allowed_keys += other.allowed_keys;
        self.evaluated_keys += other.evaluated_keys;
        self.kept_keys += other.kept_keys;
        self.estimated_missed_mass += &other.estimated_missed_mass;
        self.audited_missed_mass += &other.audited_missed_mass;
    }
}

/// How often a missed mass came up: bins of a quarter octave between 2⁻²⁰ and 1.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MassHistogram {
    /// Empty, or [`BINS`] counts, the first of all that is smaller than its upper edge.
    counts: Vec<u64>,
}

/// Bins of a histogram: a quarter octave each.
const BINS: usize = 81;
/// Bins of one octave.
const OCTAVE: f32 = 4.0;

impl MassHistogram {
    /// Counts `mass` once; what is above 1 or no number counts as 1.
    pub fn add(&mut self, mass: f32) {
        self.add_times(mass, 1);
    }

    /// Counts `mass` `times` times.
    pub fn add_times(&mut self, mass: f32, times: u64) {
        if self.counts.is_empty() {
            self.counts = vec![0; BINS];
        }
        let last = (BINS - 1) as f32;
        // NaN fails every comparison, and must not pass for a small mass.
        let bin = if mass < 1.0 { (mass.log2() * OCTAVE + last).floor().clamp(0.0, last) } else { last };
        self.counts[bin as usize] += times;
    }

    /// Masses counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The upper edge of the bin below which `share` of the counts lie, from 0 to 1 (what is beyond counts as the end that
    /// it is beyond); `None` when nothing was counted.
    pub fn quantile(&self, share: f64) -> Option<f32> {
        let count = self.count();
        let wanted = ((count as f64 * share).ceil() as u64).min(count).max(1);
        let mut below = 0;
        for (bin, count) in self.counts.iter().enumerate() {
            below += count;
            if below >= wanted {
                let edge = (bin + 1).min(BINS - 1) as f32;
                return Some(((edge - (BINS - 1) as f32) / OCTAVE).exp2());
            }
        }
        None
    }
}

impl AddAssign<&Self> for MassHistogram {
    fn add_assign(&mut self, other: &Self) {
        if self.counts.is_empty() {
            self.counts.clone_from(&other.counts);
        } else {
            self.counts.iter_mut().zip(&other.counts).for_each(|(count, other)| *count += other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_within_a_quarter_octave_above() {
        let mut histogram = MassHistogram::default();
        assert_eq!(histogram.quantile(0.5), None);
        (1..=1000).for_each(|step| histogram.add(step as f32 * 1e-3));
        for share in [0.01, 0.05, 0.5, 0.95, 0.99, 1.0] {
            let quantile = histogram.quantile(share).unwrap();
            let ratio = f64::from(quantile) / share;
            assert!((0.999..=1.2).contains(&ratio), "{share}: {quantile}");
        }
        let mut both = MassHistogram::default();
        both += &histogram;
        both += &histogram;
        assert_eq!(
            [-1.0, 1.5].map(|share| histogram.quantile(share)),
            [0.0, 1.0].map(|share| histogram.quantile(share))
        );
        assert_eq!((both.count(), both.quantile(0.5)), (2000, histogram.quantile(0.5)));
    }

    #[test]
    fn what_is_no_share_counts_as_everything() {
        for mass in [f32::NAN, f32::INFINITY, 7.0, 1.0] {
            let mut histogram = MassHistogram::default();
            histogram.add(mass);
            assert_eq!(histogram.quantile(1.0), Some(1.0), "{mass}");
        }
        let mut histogram = MassHistogram::default();
        [0.0, -1.0, 1e-30].into_iter().for_each(|mass| histogram.add(mass));
        assert!(histogram.quantile(1.0).unwrap() < 2e-6);
    }
}
