//! The clusters of a cache: which of its older keys lie in which region, and what is known of each head.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use iceformer_kernels::attention::MICRO_ROWS;

use super::calibration::{Calibration, LEAST_PLACES, Measurement, PLACES, UNKNOWN};
use super::cross_covariance::CrossCovariance;
use super::merging::{MERGED_UNITS, Merging, keys_of, units_of};
use super::metric::QueryMetric;
use super::region::{REGION_KEYS, Region, RegionScratch, SortedKeys};
use crate::ThreadTeam;
use crate::tiles::Call;

/// Regions that a head is tried on.
const FIRST_REGIONS: usize = 2;

/// Tokens of a long call from one place that is measured to the next, …
const PLACE_TOKENS: usize = 256;
/// … of a call of fewer tokens than this, which is often a text of its own, …
const LONG_CALL: usize = 512;
const SHORT_CALL_PLACE_TOKENS: usize = 64;
/// … tokens from which such a call is measured whatever was before, as are calls that have so many together, …
const ENOUGH_TOKENS: usize = 128;
/// … and decoded tokens from one that is measured to the next.
const DECODED_TOKENS: usize = 64;
/// Tokens of a call from one place that is measured to the next where its text was found to turn to another matter.
const TURNED_TOKENS: usize = 4 * MICRO_ROWS;
/// What was measured on a part of the keys is forgotten when there are so many times as many, …
const OUTDATED: usize = 2;
/// … and so many where tokens are decoded: to measure all anew takes as long as some thirty steps of exact attention then, and
/// the tokens that are measured on the way tell of the keys that have come.
const OUTDATED_OF_DECODED: usize = 8;

/// The clusters of all heads of a cache.
#[derive(Default)]
pub(crate) struct ClusterIndex {
    heads: Vec<HeadClusters>,
    /// Once the latest call is over, queries to come see so many keys whole and from afar.
    passed: usize,
    /// Whether the queries of some call did not see all keys before them: at the edge of a window or of padding, keys are
    /// wanted in their own order. Then all stays a copy.
    has_edges: bool,
}

/// The clusters of one key/value head.
#[derive(Default)]
pub(super) struct HeadClusters {
    /// In the order of their keys, without gaps from [`FIRST_KEYS`](super::region::FIRST_KEYS) on.
    pub regions: Vec<Region>,
    /// What queries look at in keys.
    pub metric: QueryMetric,
    /// How values go with keys within clusters.
    pub cross_covariance: CrossCovariance,
    /// Up to which size regions are merged.
    pub merging: Merging,
    /// One for each query head that reads the head, empty before the first measurement.
    calibrations: Vec<Calibration>,
    /// Budget of the measurements, and clustered units at the first of them.
    calibrated: (f32, usize),
    /// Tokens whose queries were seen since the last.
    since: usize,
    /// Tokens decoded since then, or since the latest prompt.
    decoded: usize,
    /// Of these, how many must pass before a head that was given up is tried again; 0: as few as ever.
    pause: usize,
    /// Whether the latest call decodes.
    decodes: bool,
    /// Whether the metric has learnt from the queries of this call.
    has_learnt: bool,
    /// Query heads that read the head, and units ([`keys_of`]) of keys that there were, clustered or not, at the last call.
    group: usize,
    units: usize,
}

/// A query head whose clusters do not pay is tried again when there are so many times as many keys as when that was found,
/// where they pay for another, …
const RETRY: f32 = 1.25;
/// … and where they pay for none: then only half of the keys are clustered for it.
const RETRY_OF_NONE: f32 = 2.0;
/// Where tokens are decoded it is tried again after so many too, as a single token gives it up and the text will not double.
/// Until clusters pay for all heads of the group, each time that one is given up the next try comes after twice as many, …
const RETRY_TOKENS: usize = 64;
/// … up to so many.
const MOST_RETRY_TOKENS: usize = 4096;

impl ClusterIndex {
    pub(super) fn head(&self, head: usize) -> &HeadClusters {
        &self.heads[head]
    }

    pub(super) fn heads_mut(&mut self) -> &mut [HeadClusters] {
        &mut self.heads
    }

    /// Notes that queries after this call see the first `passed` keys whole and from afar, unless their mask `has_edges`.
    pub(super) fn note_call(&mut self, passed: usize, has_edges: bool) {
        self.passed = passed;
        self.has_edges |= has_edges;
    }

    /// For each head, what belongs in the cache: the keys of regions that every query to come sees whole.
    pub fn take_sorted_keys(&mut self) -> impl Iterator<Item = Vec<SortedKeys>> {
        let passed = if self.has_edges { 0 } else { self.passed };
        self.heads.iter_mut().map(move |head| head.take_sorted_keys(passed))
    }

    /// Whether there are clusters of any head.
    pub fn is_empty(&self) -> bool {
        self.heads.iter().all(|head| head.regions.is_empty())
    }

    /// Clusters the first `len` keys of the cache of `call`, as far as they are not, for queries like its own: of each head
    /// a few regions first, the others when measurements have shown that they pay. Those of the first `settled` keys, which
    /// every query to come sees whole, are merged where that makes their clusters tighter, into ones of at most `most` units.
    pub(super) fn extend(
        &mut self,
        call: &Call<'_>,
        len: usize,
        settled: usize,
        most: usize,
        team: &ThreadTeam,
        scratch: &[Mutex<RegionScratch>],
    ) {
        self.heads.resize_with(call.cache.shape().kv_heads, HeadClusters::default);
        let (total, settled) = (units_of(len), units_of(settled));
        let mut missing = Vec::new();
        for (index, head) in self.heads.iter_mut().enumerate() {
            (head.group, head.units) = (call.group(), total);
            missing.extend((head.clustered_units()..head.wanted(total)).map(|unit| (index, keys_of(unit, 1))));
        }
        let build = |heads: &mut [HeadClusters], wanted| build(heads, wanted, call, team, scratch);
        for (head, region) in build(&mut self.heads, missing) {
            self.heads[head].put(region);
        }
        for size in MERGED_UNITS.into_iter().filter(|size| *size <= most) {
            // One of each head first, where it is not known whether that makes clusters tighter.
            let heads = self.heads.iter().enumerate();
            let tried = heads.filter_map(|(index, head)| Some((index, head.tried(size, settled)?))).collect();
            for (head, region) in build(&mut self.heads, tried) {
                self.heads[head].try_merged(size, region);
            }
            let heads = self.heads.iter().enumerate();
            let merged = heads.flat_map(|(index, head)| head.mergeable(size, settled).map(move |keys| (index, keys)));
            let merged = merged.collect();
            for (head, region) in build(&mut self.heads, merged) {
                self.heads[head].put(region);
            }
        }
        if !call.attention.mask.causal {
            self.heads.iter_mut().for_each(|head| head.cross_covariance.put_to_use());
        }
    }

    /// Forgets the regions of head `head` that hold keys from `len` on. Returns the first key of the first of them.
    pub fn truncate(&mut self, head: usize, len: usize) -> Option<usize> {
        let head = self.heads.get_mut(head)?;
        head.units = head.units.min(units_of(len));
        let (units, budget) = (head.units, head.calibrated.0);
        head.calibrations.iter_mut().for_each(|known| known.forget_from(len, units, budget));
        let kept = head.regions.iter().take_while(|region| region.keys().end <= len).count();
        let first = head.regions.get(kept)?.keys().start;
        head.regions.truncate(kept);
        head.merging.truncate(head.units);
        head.cross_covariance.truncate(head.clustered_units() * REGION_KEYS);
        // What was measured on a little more holds for what is left.
        head.calibrated.1 = head.calibrated.1.min(head.clustered_units());
        if head.regions.is_empty() {
            *head = HeadClusters::default();
        }
        self.passed = self.passed.min(first);
        if self.is_empty() {
            (self.passed, self.has_edges) = (0, false);
        }
        Some(first)
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.heads.iter().map(HeadClusters::bytes).sum()
    }
}

/// Clusters the keys of each of `wanted`, of the head beside them.
fn build(
    heads: &mut [HeadClusters],
    wanted: Vec<(usize, Range<usize>)>,
    call: &Call<'_>,
    team: &ThreadTeam,
    scratch: &[Mutex<RegionScratch>],
) -> Vec<(usize, Region)> {
    // Most decode steps: no thread need wake.
    if wanted.is_empty() {
        return Vec::new();
    }
    team.run_chunks(heads, 1, |index, head, _| {
        if !head[0].has_learnt && wanted.iter().any(|(head, _)| *head == index) {
            head[0].metric.learn(call, index);
            head[0].has_learnt = true;
        }
    });
    let seen = &call.attention.mask.keys;
    let mut built: Vec<_> = wanted.into_iter().map(|(head, keys)| (head, keys, None)).collect();
    team.run_chunks(&mut built, 1, |_, region, worker| {
        let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        let (head, keys, region) = &mut region[0];
        let mut built = Region::new(call.cache, *head, keys.clone(), &heads[*head].metric, &mut scratch);
        if seen.as_ref().is_some_and(|seen| keys.start < seen.start || keys.end > seen.end) {
            // Padding may hold any values.
            built.take_cross_moments();
        }
        *region = Some(built);
    });
    built.into_iter().filter_map(|(head, _, region)| Some((head, region?))).collect()
}

impl HeadClusters {
    /// Units ([`keys_of`]) of keys in regions.
    pub fn clustered_units(&self) -> usize {
        self.regions.last().map_or(0, |region| units_of(region.keys().end))
    }

    fn bytes(&self) -> usize {
        let regions = self.regions.iter().map(Region::bytes).sum::<usize>();
        regions
            + self.metric.bytes()
            + self.cross_covariance.bytes()
            + self.calibrations.iter().map(Calibration::bytes).sum::<usize>()
    }

    fn take_sorted_keys(&mut self, passed: usize) -> Vec<SortedKeys> {
        let regions = self.regions.iter_mut().take_while(|region| region.keys().end <= passed);
        regions.filter_map(Region::take_sorted).collect()
    }

    /// Units ([`keys_of`]) of keys that should be in regions, of `total` that there are.
    fn wanted(&self, total: usize) -> usize {
        if self.calibrations.is_empty() {
            total.min(FIRST_REGIONS)
        } else if self.may_pay() {
            total
        } else if self.calibrations.iter().all(|known| known.is_given_up(total, RETRY_OF_NONE)) {
            0
        } else {
            total / 2
        }
    }

    /// What is known of query head `head` of the group.
    pub fn calibration(&self, head: usize) -> &Calibration {
        self.calibrations.get(head).unwrap_or(&UNKNOWN)
    }

    /// What is known of query head `head` of the group at `budget`: nothing where it was measured at another.
    pub fn known(&self, head: usize, budget: f32) -> &Calibration {
        if self.calibrated.0 == budget { self.calibration(head) } else { &UNKNOWN }
    }

    /// Whether query head `head` of the group was found not to be worth it, not long ago.
    pub fn is_given_up(&self, head: usize, budget: f32) -> bool {
        let is_due = self.decodes && self.decoded >= self.pause.max(RETRY_TOKENS);
        !is_due && !self.is_outdated(budget) && self.calibration(head).is_given_up(self.units, self.retry())
    }

    fn retry(&self) -> f32 {
        if self.may_pay() { RETRY } else { RETRY_OF_NONE }
    }

    /// Whether clusters may pay for some query head, as far as is known.
    fn may_pay(&self) -> bool {
        self.calibrations.is_empty() || self.calibrations.iter().any(|calibration| !calibration.is_hopeless())
    }

    /// Notes that the queries of `tokens` tokens are about to be answered.
    pub fn note_tokens(&mut self, tokens: usize) {
        self.since = self.since.saturating_add(tokens);
        self.decodes = tokens < MICRO_ROWS;
        self.decoded = if self.decodes { self.decoded.saturating_add(tokens) } else { 0 };
        self.has_learnt = false;
        self.cross_covariance.put_to_use();
    }

    /// At how many places of a call of `tokens` tokens queries should be measured. Where they `resemble` those that were just
    /// measured, the least number is enough to begin with.
    pub fn places_wanted(&self, budget: f32, tokens: usize, resemble: bool) -> usize {
        if self.regions.is_empty() {
            return 0;
        }
        let most = PLACES.min((tokens / MICRO_ROWS).max(1));
        // Heads that are decoded together fall back together: where one is given up, the others are measured in vain.
        let is_given_up = |head| self.is_given_up(head, budget);
        if tokens < MICRO_ROWS && (0..self.calibrations.len()).any(is_given_up) {
            return 0;
        }
        let enough = if resemble { LEAST_PLACES } else { PLACES };
        let is_unknown = |calibration: &Calibration| calibration.places() < enough && !calibration.is_hopeless();
        if self.is_outdated(budget) {
            return most;
        }
        // The queries of this call were measured, on these keys.
        if self.since == 0 {
            return 0;
        }
        if self.calibrations.iter().any(is_unknown) {
            return most;
        }
        let regular = match tokens {
            _ if !self.may_pay() => 0,
            LONG_CALL.. => tokens.div_ceil(PLACE_TOKENS),
            ENOUGH_TOKENS.. => (tokens / SHORT_CALL_PLACE_TOKENS).min(LEAST_PLACES),
            MICRO_ROWS.. => usize::from(self.since >= ENOUGH_TOKENS),
            _ => usize::from(self.since >= DECODED_TOKENS),
        };
        let is_tried_again = |head: usize| self.calibrations[head].is_hopeless() && !is_given_up(head);
        let any_again = (0..self.calibrations.len()).any(is_tried_again);
        most.min(if any_again { regular.max(LEAST_PLACES) } else { regular })
    }

    /// At how many places of a call of `tokens` tokens queries should be measured once it was seen that they have turned to
    /// another matter.
    pub fn places_of_turned(tokens: usize) -> usize {
        PLACES.min(tokens / TURNED_TOKENS)
    }

    /// Whether the last measurement tells nothing of now.
    pub fn is_outdated(&self, budget: f32) -> bool {
        let (calibrated_budget, units) = self.calibrated;
        let times = if self.decodes { OUTDATED_OF_DECODED } else { OUTDATED };
        let is_grown = self.clustered_units() >= times * units;
        self.calibrations.len() != self.group || calibrated_budget != budget || is_grown
    }

    /// Takes what was measured of every query head of the group, now and at `budget`. Returns whether the text has turned to
    /// another matter for one of them.
    pub fn take(&mut self, budget: f32, measured: Vec<Measurement>) -> bool {
        if self.is_outdated(budget) {
            self.calibrations = vec![UNKNOWN.clone(); measured.len()];
            self.calibrated = (budget, self.clustered_units());
            self.pause = 0;
        }
        self.since = 0;
        let is_measured = measured.iter().any(|measured| !measured.places.is_empty());
        let units = self.units;
        let pairs = self.calibrations.iter_mut().zip(measured);
        let turned =
            pairs.map(|(known, measured)| known.take(measured, units, budget)).fold(false, |any, turned| any | turned);
        if self.decodes && is_measured {
            self.decoded = 0;
            if self.calibrations.iter().any(Calibration::is_hopeless) {
                self.pause = (2 * self.pause).clamp(RETRY_TOKENS, MOST_RETRY_TOKENS);
            } else if self.calibrations.iter().all(Calibration::pays) {
                self.pause = 0;
            }
        }
        turned
    }

    /// Root mean square distance of the values in `regions` from their mean.
    pub fn value_spread(&self, regions: &[usize]) -> f32 {
        let regions = || regions.iter().map(|region| &self.regions[*region]);
        let Some(width) = regions().next().map(|region| region.value_sum.len()) else { return 0.0 };
        let count = regions().map(|region| region.keys().len()).sum::<usize>() as f64;
        let squares: f64 = regions().map(|region| region.value_squares).sum();
        let mean_square: f64 = (0..width)
            .map(|channel| (regions().map(|region| region.value_sum[channel]).sum::<f64>() / count).powi(2))
            .sum();
        (squares / count - mean_square).max(0.0).sqrt() as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budgeted::calibration::{MeasuredPlace, MeasuredRow};
    use crate::budgeted::region::FIRST_KEYS;
    use crate::{CacheShape, KeyValueCache, KeyValueType};

    fn row() -> MeasuredRow {
        MeasuredRow { bearable: 0.01, ratio: None, spread: 1.0 }
    }

    fn measured(places: usize) -> Measurement {
        let rows = vec![row(); MICRO_ROWS];
        let place = MeasuredPlace { position: FIRST_KEYS, rows, clusters: 100, computed: vec![(0.1, 20)] };
        Measurement { places: vec![place; places], is_hopeless: false }
    }

    fn hopeless() -> Measurement {
        Measurement { is_hopeless: true, ..measured(1) }
    }

    /// The first `count` regions, of keys that are all the same.
    fn regions(count: usize) -> impl Iterator<Item = Region> {
        let mut cache = KeyValueCache::new(CacheShape { kv_heads: 1, key_dim: 16, value_dim: 16 }, KeyValueType::F32);
        let numbers = vec![0.5; (FIRST_KEYS + count * REGION_KEYS) * 16];
        cache.append(&numbers, &numbers, &ThreadTeam::new(1));
        let mut scratch = RegionScratch::default();
        (0..count).map(move |unit| Region::new(&cache, 0, keys_of(unit, 1), &QueryMetric::default(), &mut scratch))
    }

    #[test]
    fn a_hopeless_head_is_tried_again_at_twice_the_keys() {
        let mut head = HeadClusters { group: 1, units: 7, ..HeadClusters::default() };
        assert_eq!(head.wanted(7), FIRST_REGIONS);
        head.take(0.05, vec![hopeless()]);
        assert_eq!([8, 13, 14, 20].map(|total| head.wanted(total)), [0, 0, 7, 10]);
        head.units = 14;
        head.take(0.05, vec![hopeless()]);
        assert_eq!([20, 27, 28].map(|total| head.wanted(total)), [0, 0, 14]);
        head.take(0.02, vec![measured(4)]);
        assert_eq!(head.wanted(15), 15, "it pays");
    }

    #[test]
    fn a_hopeless_head_is_tried_again_after_another_text() {
        let mut index = ClusterIndex::default();
        index.heads.push(HeadClusters { group: 1, units: 97, ..HeadClusters::default() });
        index.heads[0].take(0.05, vec![hopeless()]);
        // Its regions lie before what is dropped.
        assert_eq!(index.truncate(0, FIRST_KEYS + 8 * REGION_KEYS), None);
        assert_eq!([15, 16].map(|total| index.heads[0].wanted(total)), [0, 8]);
    }

    #[test]
    fn what_was_measured_on_dropped_tokens_is_forgotten() {
        let mut index = ClusterIndex::default();
        index.heads.push(HeadClusters { group: 1, units: 9, ..HeadClusters::default() });
        index.heads[0].take(0.05, vec![measured(PLACES)]);
        index.truncate(0, FIRST_KEYS + 1);
        assert!(index.heads[0].calibration(0).pays());
        index.truncate(0, FIRST_KEYS);
        assert_eq!(index.heads[0].calibration(0).places(), 0);
    }

    #[test]
    fn a_text_that_has_doubled_is_measured_anew_in_a_prompt_and_not_while_it_is_decoded() {
        let mut regions = regions(16);
        let mut head = HeadClusters { group: 1, ..HeadClusters::default() };
        head.regions.extend(regions.by_ref().take(2));
        head.take(0.05, vec![measured(PLACES)]);
        for (units, tokens, wanted) in [(2, 1, 0), (4, 1, 0), (4, 60, 10), (15, 1, 0), (16, 1, 1)] {
            head.regions.extend(regions.by_ref().take(units - head.regions.len()));
            head.note_tokens(tokens);
            head.since = 1;
            assert_eq!(head.places_wanted(0.05, tokens, true), wanted, "{units} units, {tokens} tokens");
        }
    }

    #[test]
    fn nothing_is_measured_beside_a_head_that_is_given_up_where_they_are_decoded_together() {
        let mut regions = regions(5);
        let mut head =
            HeadClusters { regions: regions.by_ref().take(4).collect(), group: 2, units: 4, ..HeadClusters::default() };
        head.take(0.05, vec![hopeless(), measured(2)]);
        assert_eq!(head.places_wanted(0.05, 60, false), 0, "of the same call");
        head.note_tokens(1);
        for resemble in [true, false] {
            assert_eq!([1, 5, 6, 60].map(|tokens| head.places_wanted(0.05, tokens, resemble)), [0, 0, 1, 10]);
        }
        assert_eq!(head.places_wanted(0.1, 1, true), 1, "another budget");
        head.regions.extend(regions.next());
        head.units = 4;
        assert_eq!(head.places_wanted(0.05, 1, true), 0, "as many keys");
        head.units = 5;
        assert_eq!(head.places_wanted(0.05, 1, true), 1, "more keys");
    }

    #[test]
    fn what_one_decoded_token_has_given_up_is_tried_again_more_and_more_rarely() {
        let new = || HeadClusters { regions: regions(4).collect(), group: 2, units: 4, ..HeadClusters::default() };
        let mut head = new();
        let wanted_after = |head: &mut HeadClusters, tokens: usize| {
            head.decoded = tokens - 1;
            head.note_tokens(1);
            head.places_wanted(0.05, 1, true)
        };
        let given_up = || vec![measured(1), hopeless()];
        assert_eq!(wanted_after(&mut head, 1), 1, "nothing is known");
        for pause in [1, 2, 4, 8, 16, 32, 64, 64, 64].map(|times| times * RETRY_TOKENS) {
            head.take(0.05, given_up());
            assert_eq!([1, pause - 1, pause].map(|tokens| wanted_after(&mut head, tokens)), [0, 0, 1], "{pause}");
            // The head is looked at afresh.
            assert!(!head.is_given_up(1, 0.05));
        }
        // One good place is not enough to begin anew.
        head.take(0.05, vec![measured(1), measured(1)]);
        assert_eq!(wanted_after(&mut head, 1), 1, "it is measured as what is not known yet");
        head.take(0.05, given_up());
        assert_eq!([64, MOST_RETRY_TOKENS - 1].map(|tokens| wanted_after(&mut head, tokens)), [0, 0]);
        wanted_after(&mut head, MOST_RETRY_TOKENS);
        (0..LEAST_PLACES).for_each(|_| {
            head.take(0.05, vec![measured(1), measured(1)]);
        });
        head.take(0.05, given_up());
        assert_eq!([RETRY_TOKENS - 1, RETRY_TOKENS].map(|tokens| wanted_after(&mut head, tokens)), [0, 1]);
        // Another budget knows nothing of that.
        head.take(0.1, given_up());
        head.take(0.1, given_up());
        head.take(0.05, given_up());
        assert_eq!([RETRY_TOKENS - 1, RETRY_TOKENS].map(|tokens| wanted_after(&mut head, tokens)), [0, 1]);
        // Tokens of a prompt are not decoded.
        let mut head = new();
        head.note_tokens(512);
        head.take(0.05, given_up());
        head.note_tokens(5000);
        head.note_tokens(1);
        assert_eq!(head.places_wanted(0.05, 1, true), 0);
        assert_eq!([RETRY_TOKENS - 1, RETRY_TOKENS].map(|tokens| wanted_after(&mut head, tokens)), [0, 1]);
        // Where no cluster is seen nothing was tried.
        head.take(0.05, vec![Measurement::default(), Measurement::default()]);
        head.note_tokens(1);
        assert_eq!(head.places_wanted(0.05, 1, true), 1);
    }
}
