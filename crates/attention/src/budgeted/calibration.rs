//! How much of the estimate each head can bear, as its latest measured rows show.
//!
//! The estimate of a cluster's error holds up to a factor that differs from head to head (how far keys in a cluster are
//! correlated, and their values with them) and from matter to matter. So some rows are measured all along the text
//! ([`super::measurement`]), and a head's limit is what all but the most demanding hundredth of them could bear, and all
//! but a twentieth of the latest.

use std::collections::VecDeque;

/// Places in the text that are measured of each head before it counts as known, a few tokens each.
pub(super) const PLACES: usize = 16;
/// Places without which nothing is left to an estimate. A head is given up after one, where its clusters do not pay there.
pub(super) const LEAST_PLACES: usize = 4;
/// Rows of a head that count: those of 64 places of a prompt, so that a hundredth of them is some rows.
const LATEST_ROWS: usize = 384;
/// Share of the rows that may miss more than the budget.
pub(super) const DEMANDING: f32 = 0.01;
/// The same of the rows that were measured last: few, but of the matter that the text is about now.
pub(super) const DEMANDING_OF_LATEST: f32 = 0.05;
/// Rows below which the most demanding may not be among them: what they bear is divided as there are fewer.
const ENOUGH_ROWS: usize = 48;
/// Room for rows to come, which see more keys than those that were measured: where all [`LATEST_ROWS`] are known, …
const SAFETY: f32 = 1.1;
/// … and what is added as there are fewer, whose most demanding says less of others.
const SAFETY_OF_FEW: f32 = 0.4;
/// Time that estimating clusters takes, as a share of computing their keys exactly.
const ESTIMATE_COST: f32 = 0.04;
/// Time that chosen clusters take, beside that of as many keys in their own order.
const COMPUTE_COST: f32 = 1.2;
/// Share of exact attention's time on far keys above which clusters are not worth it: making them takes time too.
const MOST_COST: f32 = 0.85;
/// Spread of a row that is computed exactly, beside the largest of a measured one.
const MOST_SPREAD: f32 = 2.0;
/// Share of what a head was known to bear below which its text has turned to another matter.
const TURNED: f32 = 0.75;
/// Share of the rows that miss less than reported of them, in relation to the error that was estimated for them.
const REPORTED: f32 = 0.8;

/// What was measured of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct MeasuredRow {
    /// Root of the sum of squared errors, as estimated, that clusters left to the estimate could have without taking the
    /// row past the budget.
    pub bearable: f32,
    /// Missed mass in units of the error that was estimated, where it tells.
    pub ratio: Option<f32>,
    /// Its [spread](super::tile::Work::spread_of).
    pub spread: f32,
}

/// What was measured of a query head at one place of the text.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct MeasuredPlace {
    /// Position of its first token.
    pub position: usize,
    /// Its rows, but those that are no numbers: these tell nothing.
    pub rows: Vec<MeasuredRow>,
    /// Clusters that there were.
    pub clusters: usize,
    /// Limits, each smaller than the one before, with the clusters computed within them: those that were tried, and the
    /// one after them.
    pub computed: Vec<(f32, usize)>,
}

/// What some places show of a query head.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Measurement {
    pub places: Vec<MeasuredPlace>,
    /// Whether clusters were found not to pay.
    pub is_hopeless: bool,
}

/// What is known of a query head.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Calibration {
    /// The latest that were measured, in the order in which they were.
    places: VecDeque<MeasuredPlace>,
    /// How many of them were measured last, together.
    latest: usize,
    /// Keys of the text when it was found that clusters do not pay.
    given_up_at: Option<usize>,
    /// What the rows bear, all but the most demanding, in the unit of [`MeasuredRow::bearable`]; 0: too little for clusters
    /// to pay.
    usual_limit: f32,
    /// The same, and no more than those measured last bear; 0: nothing may be left to clusters for now.
    limit: f32,
    /// The same, with room for rows to come.
    safe_limit: f32,
    /// Missed mass of a row in the unit of its estimated error: of most rows.
    pub error_factor: f32,
    /// The largest spread of a row that bears the limit: of the others nothing was learnt but that they want more.
    spread: f32,
}

/// Of a head that was not measured yet.
pub(super) static UNKNOWN: Calibration = Calibration {
    places: VecDeque::new(),
    latest: 0,
    given_up_at: None,
    usual_limit: 0.0,
    limit: 0.0,
    safe_limit: 0.0,
    error_factor: 0.0,
    spread: 0.0,
};

impl MeasuredPlace {
    /// Clusters computed within `limit`: as at the smallest limit known that is not smaller by more than rounding to a
    /// step.
    fn computed_within(&self, limit: f32) -> usize {
        let border = limit * (-0.25_f32).exp2();
        let tried = self.computed.iter().rev().find(|(tried, _)| *tried >= border).or(self.computed.first());
        tried.map_or(self.clusters, |(_, computed)| *computed)
    }
}

/// Share of the clusters that `places` compute within `limit`.
pub(super) fn computed_share<'a>(places: impl IntoIterator<Item = &'a MeasuredPlace>, limit: f32) -> f32 {
    let (mut computed, mut clusters) = (0, 0);
    for place in places {
        computed += place.computed_within(limit);
        clusters += place.clusters;
    }
    computed as f32 / clusters.max(1) as f32
}

/// Whether clusters are not worth it where a `share` of them is computed.
pub(super) fn costs_too_much(share: f32) -> bool {
    ESTIMATE_COST + COMPUTE_COST * share > MOST_COST
}

/// What the limit that so many `rows` bear is divided by.
pub(super) fn room(rows: usize) -> f32 {
    let rows = rows as f32;
    let of_few = SAFETY + SAFETY_OF_FEW * (1.0 - rows / LATEST_ROWS as f32);
    of_few.max(SAFETY * ENOUGH_ROWS as f32 / rows.max(1.0))
}

/// The rows of all `places`.
pub(super) fn rows_of<'a>(
    places: impl IntoIterator<Item = &'a MeasuredPlace>,
) -> impl Iterator<Item = &'a MeasuredRow> {
    places.into_iter().flat_map(|place| &place.rows)
}

impl Calibration {
    /// Places that were measured, as far as they count.
    pub fn places(&self) -> usize {
        self.places.len()
    }

    fn rows(&self) -> impl Iterator<Item = &MeasuredRow> {
        rows_of(&self.places)
    }

    /// The error, as estimated, that may be left to clusters: what rows bear, with room for those to come.
    pub fn safe_limit(&self) -> f32 {
        self.safe_limit
    }

    /// What most rows bear, whatever those measured last do.
    pub fn usual_limit(&self) -> f32 {
        self.usual_limit
    }

    /// What rows bear, as measured.
    pub fn limit(&self) -> f32 {
        self.limit
    }

    /// Whether a row of this spread is unlike those that were measured: sharp queries see single keys where others see
    /// clusters, and what was learnt from these does not hold for them.
    pub fn is_unlike(&self, spread: f32) -> bool {
        spread > MOST_SPREAD * self.spread
    }

    /// Whether it was found that clusters do not pay.
    pub fn is_hopeless(&self) -> bool {
        self.given_up_at.is_some()
    }

    /// Whether that was found, and of a text of `keys` keys is still taken to be so. It is tried again when there are
    /// `retry` times as many as then: the more keys, the tighter their clusters.
    pub fn is_given_up(&self, keys: usize, retry: f32) -> bool {
        self.given_up_at.is_some_and(|then| (keys as f32) < retry * then as f32)
    }

    /// Whether clusters pay, as far as is known.
    pub fn pays(&self) -> bool {
        self.places() >= LEAST_PLACES && self.limit > 0.0
    }

    /// Takes in what was measured after all before, in a text of `keys` keys. Returns whether the head bears much less
    /// than it was known to: its text has turned to another matter.
    pub fn take(&mut self, measured: Measurement, keys: usize, budget: f32) -> bool {
        if measured.places.is_empty() {
            return false;
        }
        let before = self.limit;
        self.latest = measured.places.len();
        self.places.extend(measured.places);
        // A place without rows counts as one, or there would be more and more.
        let count = |place: &MeasuredPlace| place.rows.len().max(1);
        let mut rows: usize = self.places.iter().map(count).sum();
        while rows > LATEST_ROWS {
            rows -= self.places.pop_front().map_or(rows, |place| count(&place));
        }
        self.learn(budget);
        let is_given_up = measured.is_hopeless
            || self.usual_limit == 0.0
            || self.places() >= LEAST_PLACES && costs_too_much(computed_share(&self.places, self.usual_limit));
        self.given_up_at = is_given_up.then_some(keys);
        if is_given_up {
            // When it is tried again it is as if for the first time.
            self.places.clear();
            self.learn(budget);
        }
        !is_given_up && self.limit < TURNED * before
    }

    /// Forgets what was measured at `position` or after it. What was given up in a longer text than of `keys` keys counts
    /// as given up in this: another may follow, of which it is tried as soon as of one that was so short before.
    pub fn forget_from(&mut self, position: usize, keys: usize, budget: f32) {
        self.given_up_at = self.given_up_at.map(|then| then.min(keys));
        let places = self.places();
        let is_kept = |place: &MeasuredPlace| place.position < position;
        self.latest = self.places.iter().rev().take(self.latest).filter(|place| is_kept(place)).count();
        self.places.retain(is_kept);
        if self.places() < places {
            self.learn(budget);
        }
    }

    /// Learns from all rows. A few tokens that are decoded one after another are much alike, and tell little.
    fn learn(&mut self, budget: f32) {
        self.usual_limit = bearable_by_most(self.rows(), DEMANDING);
        // Where those measured last are forgotten, the ones before are the latest.
        let latest = self.places.iter().rev().take(self.latest.max(1));
        let latest: Vec<_> = rows_of(latest).collect();
        self.limit = match latest.is_empty() {
            true => self.usual_limit,
            false => self.usual_limit.min(bearable_by_most(latest, DEMANDING_OF_LATEST)),
        };
        self.safe_limit = self.limit / room(self.rows().count());
        let bearing = self.rows().filter(|row| row.bearable >= self.limit);
        self.spread = bearing.map(|row| row.spread).fold(0.0, f32::max);
        let mut ratios: Vec<f32> = self.rows().filter_map(|row| row.ratio).collect();
        // A row at the limit misses no more than the budget.
        let most = if self.limit > 0.0 { budget / self.safe_limit } else { 1.0 };
        self.error_factor = quantile(&mut ratios, REPORTED).unwrap_or(1.0).min(most);
    }

    pub fn bytes(&self) -> usize {
        let of_place =
            |place: &MeasuredPlace| size_of_val(place) + size_of_val(&*place.rows) + size_of_val(&*place.computed);
        size_of_val(self) + self.places.iter().map(of_place).sum::<usize>()
    }
}

/// What all of `rows` bear but a share of `demanding`; 0 of none.
pub(super) fn bearable_by_most<'a>(rows: impl IntoIterator<Item = &'a MeasuredRow>, demanding: f32) -> f32 {
    let mut bearable: Vec<f32> = rows.into_iter().map(|row| row.bearable).collect();
    quantile(&mut bearable, demanding).unwrap_or(0.0)
}

/// The value that a share of `values` lies below, between two of them where it falls there; `None` of none.
fn quantile(values: &mut [f32], share: f32) -> Option<f32> {
    let last = values.len().checked_sub(1)?;
    values.sort_unstable_by(f32::total_cmp);
    let place = share * last as f32;
    let (lower, upper) = (values[place as usize], values[(place as usize + 1).min(last)]);
    Some(lower + place.fract() * (upper - lower))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(bearable: f32) -> MeasuredRow {
        MeasuredRow { bearable, ratio: Some(1.0 / bearable), spread: 1.0 }
    }

    fn place(position: usize, rows: impl IntoIterator<Item = f32>) -> MeasuredPlace {
        let rows = rows.into_iter().map(row).collect();
        MeasuredPlace { position, rows, clusters: 100, computed: vec![(0.1, 20)] }
    }

    /// Places of six rows.
    fn measured(bearable: impl IntoIterator<Item = f32>) -> Measurement {
        let rows: Vec<_> = bearable.into_iter().collect();
        let places = rows.chunks(6).enumerate().map(|(index, rows)| place(512 * index, rows.iter().copied())).collect();
        Measurement { places, is_hopeless: false }
    }

    #[test]
    fn values_between_others() {
        assert_eq!(quantile(&mut [], 0.5), None);
        assert_eq!(quantile(&mut [3.0], 0.01), Some(3.0));
        assert_eq!(quantile(&mut [5.0, 1.0, 3.0], 0.5), Some(3.0));
        assert_eq!(quantile(&mut [5.0, 1.0, 3.0], 0.25), Some(2.0));
        assert_eq!(quantile(&mut [5.0, 1.0, 3.0], 1.0), Some(5.0));
    }

    #[test]
    fn one_row_in_a_hundred_may_miss_more() {
        let mut calibration = Calibration::default();
        calibration.take(measured((0..96).map(|index| if index == 40 { 0.001 } else { 0.02 })), 7, 0.05);
        assert!((calibration.limit() / 0.02 - 0.95).abs() < 0.01, "{}", calibration.limit());
        assert!(calibration.pays() && !calibration.is_hopeless());
        let room = SAFETY + 0.75 * SAFETY_OF_FEW;
        assert!((calibration.safe_limit() * room / calibration.limit() - 1.0).abs() < 1e-6);
        // Three are more than one.
        calibration.take(measured((0..48).map(|index| if index < 2 { 0.001 } else { 0.02 })), 7, 0.05);
        assert!(calibration.limit() < 0.002, "{}", calibration.limit());
    }

    #[test]
    fn the_latest_rows_count() {
        let mut calibration = Calibration::default();
        calibration.take(measured([0.001; 96]), 7, 0.05);
        calibration.take(measured([0.01; LATEST_ROWS]), 7, 0.05);
        assert_eq!((calibration.limit(), calibration.places()), (0.01, LATEST_ROWS / 6));
        assert_eq!(calibration.rows().count(), LATEST_ROWS);
    }

    #[test]
    fn another_matter_counts_at_once() {
        let mut calibration = Calibration::default();
        calibration.take(measured([0.02; LATEST_ROWS]), 7, 0.05);
        calibration.take(measured([0.01; 6]), 7, 0.05);
        assert_eq!(calibration.limit(), 0.01);
        calibration.take(measured([0.02; 6]), 7, 0.05);
        assert!(calibration.limit() < 0.011, "it may come up again");
        (0..LATEST_ROWS / 6 - 1).for_each(|_| {
            calibration.take(measured([0.02; 6]), 7, 0.05);
        });
        assert_eq!(calibration.limit(), 0.02);
    }

    #[test]
    fn one_row_gives_no_head_up() {
        let mut calibration = Calibration::default();
        calibration.take(measured([0.02; 96]), 7, 0.05);
        calibration.take(measured([0.0]), 7, 0.05);
        assert!(!calibration.pays() && !calibration.is_hopeless(), "nothing is left to clusters for now");
        assert!(calibration.usual_limit() > 0.015);
        calibration.take(measured([0.02]), 7, 0.05);
        assert!(calibration.pays());
        // Rows that are no numbers.
        calibration.take(Measurement { places: vec![place(0, [])], is_hopeless: false }, 7, 0.05);
        assert!(calibration.pays());
        // Some rows more are no exception.
        calibration.take(measured([0.0; 6]), 7, 0.05);
        assert!(calibration.is_hopeless());
    }

    #[test]
    fn rows_that_are_passed_over_do_not_tell_what_is_alike() {
        let sharp = |bearable| {
            let rows = vec![MeasuredRow { spread: 50.0, ..row(bearable) }];
            Measurement { places: vec![MeasuredPlace { rows, ..place(0, []) }], is_hopeless: false }
        };
        let mut calibration = Calibration::default();
        calibration.take(measured([0.02; LATEST_ROWS]), 7, 0.05);
        calibration.take(sharp(0.001), 7, 0.05);
        assert!(!calibration.is_unlike(90.0), "the limit is what it bears");
        calibration.take(measured([0.02]), 7, 0.05);
        assert!(calibration.is_unlike(3.0) && !calibration.is_unlike(2.0), "the limit is what others bear");
        calibration.take(sharp(0.02), 7, 0.05);
        assert!(!calibration.is_unlike(90.0));
    }

    #[test]
    fn few_rows_leave_room() {
        let mut calibration = Calibration::default();
        calibration.take(measured([0.01; 12]), 7, 0.05);
        assert!((calibration.safe_limit() - 0.01 / SAFETY / 4.0).abs() < 1e-6);
        assert!(!calibration.pays(), "two places are too few");
        assert!(!calibration.is_unlike(2.0) && calibration.is_unlike(2.1));
    }

    #[test]
    fn no_row_is_said_to_miss_more_than_the_budget() {
        let mut calibration = Calibration::default();
        calibration.take(measured([0.001; 48]), 7, 0.05);
        // Ratios of a thousand, at a limit of a thousandth.
        assert!((calibration.error_factor * calibration.safe_limit() - 0.05).abs() < 1e-6);
    }

    #[test]
    fn a_head_that_clusters_do_not_help_is_hopeless_until_there_are_more_keys() {
        let mut calibration = Calibration::default();
        calibration.take(Measurement::default(), 8, 0.05);
        assert!(!calibration.is_hopeless(), "nothing was measured");
        calibration.take(Measurement { is_hopeless: true, ..measured([0.01; 6]) }, 8, 0.05);
        assert!(calibration.is_hopeless() && !calibration.pays());
        let is_given_up = |calibration: &Calibration, keys, retry| calibration.is_given_up(keys, retry);
        assert!(is_given_up(&calibration, 4, 1.25) && is_given_up(&calibration, 9, 1.25));
        assert!(!is_given_up(&calibration, 10, 1.25) && is_given_up(&calibration, 15, 2.0));
        assert!(!is_given_up(&calibration, 16, 2.0));
        calibration.forget_from(0, 4, 0.05);
        assert!(is_given_up(&calibration, 4, 1.25) && !is_given_up(&calibration, 5, 1.25));
        // Nothing but rows that are no numbers, at more places than count.
        let mut calibration = Calibration::default();
        let places = vec![place(0, []); LATEST_ROWS + 8];
        calibration.take(Measurement { places, is_hopeless: false }, 8, 0.05);
        assert!(calibration.is_hopeless());
        calibration.take(measured([0.01; 96]), 16, 0.05);
        let nothing = vec![place(0, []); LATEST_ROWS - 48];
        calibration.take(Measurement { places: nothing, is_hopeless: false }, 16, 0.05);
        assert_eq!(calibration.places(), 8 + LATEST_ROWS - 48);
    }

    #[test]
    fn a_head_that_was_given_up_comes_back() {
        let mut calibration = Calibration::default();
        calibration.take(measured([0.02; 96]), 8, 0.05);
        // Most of few rows bear nothing.
        assert!(!calibration.take(measured([0.0; 24]), 8, 0.05), "that is no other matter");
        assert!(calibration.is_hopeless() && !calibration.pays());
        calibration.forget_from(3 * 512, 8, 0.05);
        assert!(calibration.is_hopeless() && !calibration.pays());
        calibration.take(measured([0.02; 24]), 16, 0.05);
        assert!(!calibration.is_hopeless() && calibration.pays());
    }

    #[test]
    fn what_a_place_computes_within_a_limit() {
        let place = MeasuredPlace { computed: vec![(0.4, 3), (0.2, 7), (0.1, 20)], ..place(0, []) };
        for (limit, computed) in [(1.0, 3), (0.4, 3), (0.3, 3), (0.2, 7), (0.15, 7), (0.11, 20), (0.01, 20)] {
            assert_eq!(place.computed_within(limit), computed, "{limit}");
        }
    }

    #[test]
    fn all_places_that_count_tell_whether_clusters_pay() {
        let costly = |position| MeasuredPlace { computed: vec![(0.1, 80)], ..place(position, [0.02]) };
        let costly = |places: usize| Measurement { places: (0..places).map(costly).collect(), is_hopeless: false };
        let mut calibration = Calibration::default();
        for place in 1..LEAST_PLACES {
            calibration.take(costly(1), 8, 0.05);
            assert!(!calibration.is_hopeless(), "{place}");
        }
        calibration.take(costly(1), 8, 0.05);
        assert!(calibration.is_hopeless());
        // A few are no reason to give up what many show to pay.
        let mut calibration = Calibration::default();
        calibration.take(measured([0.02; 96]), 8, 0.05);
        calibration.take(costly(LEAST_PLACES), 8, 0.05);
        assert!(!calibration.is_hopeless());
        calibration.take(costly(5 * PLACES), 8, 0.05);
        assert!(calibration.is_hopeless());
    }

    #[test]
    fn a_turn_is_seen() {
        let mut calibration = Calibration::default();
        assert!(!calibration.take(measured([0.02; 96]), 8, 0.05), "nothing was known");
        assert!(!calibration.take(measured([0.016; 6]), 8, 0.05));
        assert!(calibration.take(measured([0.01; 6]), 8, 0.05));
    }

    #[test]
    fn what_was_measured_on_dropped_tokens_is_forgotten() {
        let mut calibration = Calibration::default();
        calibration.take(measured((0..96).map(|index| if index < 48 { 0.02 } else { 0.002 })), 8, 0.05);
        assert!((calibration.limit() - 0.002).abs() < 1e-6);
        calibration.forget_from(8 * 512, 4, 0.05);
        assert!((calibration.limit() - 0.02).abs() < 1e-6);
        assert_eq!(calibration.places(), 8);
        calibration.forget_from(3 * 512, 4, 0.05);
        assert!(!calibration.pays() && !calibration.is_hopeless(), "too little is left");
        // Of the places that were measured last one is dropped: what the others bear counts as before.
        let mut calibration = Calibration::default();
        calibration.take(measured([0.02; LATEST_ROWS - 24]), 8, 0.05);
        let latest = (0..4).map(|index| place(64 * 512 + index, [if index == 0 { 0.004 } else { 0.01 }; 6])).collect();
        calibration.take(Measurement { places: latest, is_hopeless: false }, 8, 0.05);
        assert!((calibration.limit() - 0.004).abs() < 1e-6);
        calibration.forget_from(64 * 512 + 3, 4, 0.05);
        assert!((calibration.limit() - 0.004).abs() < 1e-6);
        calibration.forget_from(64 * 512 + 1, 4, 0.05);
        assert!((calibration.limit() - 0.004).abs() < 1e-6);
        calibration.forget_from(64 * 512, 4, 0.05);
        assert!((calibration.limit() - 0.02).abs() < 1e-6);
    }
}
