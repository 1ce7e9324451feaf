//! How much of the estimate each head can bear, measured on a few of its queries.
//!
//! The estimate of a cluster's error holds up to a factor that differs from head to head (how far keys in a cluster are
//! correlated, and their values with them). A few micro-tiles are computed exactly and within limits on the estimated
//! error that get smaller step by step, until every row's true error is within the budget.

use iceformer_kernels::attention::{AttentionTile, MICRO_ROWS};

use super::Budgeted;
use super::tile::{TileScratch, Work, distance};
use crate::tiles::{self, Call, HeadKeys, Task};

/// Places in the text that are measured for each head, a few tokens each.
pub(super) const SAMPLES: usize = 16;
/// The limit that is kept is the largest that every measured row could bear, less this factor: the most demanding of
/// twice [`ENOUGH_ROWS`] rows, as a prompt has them, stands for the 99th percentile. It grows as fewer than
/// [`ENOUGH_ROWS`] were measured.
const SAFETY: f32 = 1.2;
const ENOUGH_ROWS: usize = 3 * SAMPLES;
/// Rows that miss a smaller share of what is allowed, or have a smaller share of the limit as their error, do not tell
/// how errors relate to estimates: the rounding of the cache may be all that there is.
const TELLING: f32 = 0.3;
/// Share of what is allowed from which a row tells how much it could bear.
const BEARING: f32 = 0.45;
/// The largest limit, in budgets: errors are never much smaller than estimated.
const MOST: f32 = 0.5;
/// Limits that are tried, each smaller than the one before by half an octave: so many for a budget of [`USUAL_BUDGET`] or
/// less, and more for a larger, down to the same. What rows of a small output may miss does not grow with the budget.
const STEPS: usize = 12;
const USUAL_BUDGET: f32 = 0.05;
/// Spread of a row that is computed exactly, beside the largest of a measured one.
const MOST_SPREAD: f32 = 2.0;
/// Largest error in relation to the output: where values average out, as under diffuse attention to unrelated values,
/// an error that is small beside a value can still be all of the output.
const MOST_OF_OUTPUT: f32 = 0.5;

/// What was measured of a query head.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Calibration {
    /// Places measured.
    pub samples: usize,
    /// Rows of the head there.
    pub rows: usize,
    /// Root of the sum of squared errors, as estimated, that clusters left to the estimate could have without taking a
    /// measured row past the budget; 0: too little for clusters to pay.
    pub limit: f32,
    /// Missed mass of a row in that unit, as seen at the limit: of most rows, not of the worst.
    pub error_factor: f32,
    /// The largest [spread](super::index::HeadClusters::logit_spread) of a measured row.
    pub spread: f32,
}

impl Calibration {
    /// The limit with room for rows more demanding than those measured. A few tokens that are decoded one after another
    /// are much alike, and tell little of those to come.
    pub fn safe_limit(self) -> f32 {
        let measured = (self.rows as f32 / ENOUGH_ROWS as f32).min(1.0);
        self.limit * measured / SAFETY
    }

    /// Whether a row of this spread is unlike those that were measured: sharp queries see single keys where others see
    /// clusters, and what was learnt from these does not hold for them.
    pub fn is_unlike(self, spread: f32) -> bool {
        spread > MOST_SPREAD * self.spread
    }

    /// Whether it was found that clusters do not pay.
    pub fn is_hopeless(self) -> bool {
        self.samples > 0 && self.limit == 0.0
    }

    /// Both measurements together.
    pub fn merge(self, other: Self) -> Self {
        match (self.samples, other.samples) {
            (0, _) => other,
            (_, 0) => self,
            _ => Self {
                samples: self.samples + other.samples,
                rows: self.rows + other.rows,
                limit: self.limit.min(other.limit),
                error_factor: self.error_factor.max(other.error_factor),
                spread: self.spread.max(other.spread),
            },
        }
    }
}

/// Buffers of one thread.
#[derive(Default)]
pub(super) struct CalibrationScratch {
    near: AttentionTile,
    /// Rows of several tasks.
    exact: AttentionTile,
    /// The first of the task that is measured.
    first_exact_row: usize,
    trial: AttentionTile,
    tile: TileScratch,
    /// `[value_dim]`
    output: Vec<f32>,
    /// `[value_dim]`
    exact_output: Vec<f32>,
    /// `[key_dim]`
    query: Vec<f32>,
}

/// Time that estimating clusters takes, as a share of computing their keys exactly.
const ESTIMATE_COST: f32 = 0.04;
/// Time that chosen clusters take, beside that of as many keys in their own order.
const COMPUTE_COST: f32 = 1.2;
/// Share of exact attention's time on far keys above which clusters are not worth it: making them takes time too.
const MOST_COST: f32 = 0.85;
/// Samples without which nothing is left to an estimate, and after which a head is given up whose clusters do not pay so
/// far; one is enough where no cluster is spared at all. So many are computed exactly together: a block of keys is read,
/// and expanded where it has to be, for all of them.
pub(super) const LEAST_SAMPLES: usize = 4;
/// Steps from the limit of an earlier measurement up to where the next begins.
const STEPS_UP: usize = 2;

/// One query head on its way down the limits.
#[derive(Clone)]
struct Trial {
    /// Steps down from the largest limit.
    step: usize,
    /// The first step that is not tried any more.
    steps: usize,
    samples: usize,
    rows: usize,
    /// Clusters that micro-tiles would have computed, of so many.
    computed: usize,
    clusters: usize,
    /// The largest spread of a row.
    spread: f32,
    /// What all rows measured at the current step show.
    finding: Finding,
}

/// What rows of a head show at one limit.
#[derive(Clone)]
struct Finding {
    /// Largest missed mass, in relation to what is allowed.
    worst: f32,
    /// Least error, as estimated, with which a row would miss what is allowed, if it missed in proportion. Infinite where
    /// none missed enough to tell.
    bearable: f32,
    /// True over estimated error of the rows that have an error to speak of.
    ratios: Vec<f32>,
}

/// What a micro-tile did within limits.
struct Tried {
    /// Clusters that it computed.
    computed: usize,
    /// Sum of the squared errors of the others, as estimated, in units of the square of the limit.
    rest: f32,
}

impl Default for Finding {
    fn default() -> Self {
        Self { worst: 0.0, bearable: f32::INFINITY, ratios: Vec::new() }
    }
}

impl Finding {
    fn merge(&mut self, other: Self) {
        self.worst = self.worst.max(other.worst);
        self.bearable = self.bearable.min(other.bearable);
        self.ratios.extend(other.ratios);
    }
}

impl Trial {
    /// Begins a little above what was measured before, as keys become more.
    fn after(before: Calibration, budget: f32) -> Self {
        let step = match before.limit > 0.0 {
            true => (2.0 * (MOST * budget / before.limit).log2()).round().max(0.0) as usize,
            false => 0,
        };
        let step = step.saturating_sub(STEPS_UP);
        let more = (2.0 * (budget / USUAL_BUDGET).log2()).round().max(0.0) as usize;
        Self {
            step,
            steps: STEPS + more,
            samples: 0,
            rows: 0,
            spread: 0.0,
            computed: 0,
            clusters: 0,
            finding: Finding::default(),
        }
    }

    /// Whether no limit is small enough, or none that is would pay.
    fn is_given_up(&self) -> bool {
        self.step >= self.steps
    }

    fn give_up(&mut self) {
        self.step = self.steps;
    }

    /// Whether clusters cost more than they save, as far as measured.
    fn is_too_costly(&self) -> bool {
        self.samples > 0
            && ESTIMATE_COST + COMPUTE_COST * self.computed as f32 / self.clusters.max(1) as f32 > MOST_COST
    }

    /// The limit at this step, in budgets.
    fn limit(&self) -> f32 {
        MOST * (-0.5 * self.step as f32).exp2()
    }

    /// Forgets the rows that were measured at a limit that was too large. `rest` is what was left to the estimate there, as
    /// a share of the square of the limit: goes on to the next limit at which more is computed, since up to there rows
    /// miss the same.
    fn step_down(&mut self, rest: f32) {
        // Each step halves the square.
        let same = (-rest.max(f32::MIN_POSITIVE).log2()).max(0.0) as usize;
        self.step = (self.step + 1 + same).min(self.steps);
        self.finding = Finding::default();
    }

    fn judge(&self, budget: f32) -> Calibration {
        if self.samples == 0 || self.is_given_up() {
            let Self { samples, rows, spread, .. } = *self;
            return Calibration { samples, rows, spread, ..Calibration::default() };
        }
        // What is left to the next larger step, which was too large.
        let room = (1.0 / self.finding.worst).min(std::f32::consts::SQRT_2);
        let limit = (room * self.limit() * budget).min(self.finding.bearable);
        // Between the mean of a few rows and the worst of them lies about the 90th percentile of all.
        let worst = self.finding.ratios.iter().copied().reduce(f32::max).unwrap_or(1.0);
        let mean = self.finding.ratios.iter().sum::<f32>() / self.finding.ratios.len().max(1) as f32;
        let error_factor = if self.finding.ratios.is_empty() { 1.0 } else { 0.5 * (mean + worst) };
        // A row at the limit misses no more than the budget.
        let error_factor = error_factor.min(budget / (SAFETY * limit));
        Calibration { samples: self.samples, rows: self.rows, limit, error_factor, spread: self.spread }
    }
}

/// What a row misses as a share of what it may: of `budget`, or of half its exact output, in units of `value_scale`.
/// Infinite where it misses more.
pub(crate) fn share_of_allowed(missed: f32, exact_output: &[f32], budget: f32, value_scale: f32) -> f32 {
    let size = exact_output.iter().map(|value| value * value).sum::<f32>().sqrt();
    let allowed = budget.min(MOST_OF_OUTPUT * size / value_scale);
    // A NaN is within nothing.
    if missed <= allowed { missed / allowed.max(f32::MIN_POSITIVE) } else { f32::INFINITY }
}

/// Measures the query heads of `kv_head`.
pub(super) fn calibrate(budgeted: &Budgeted<'_>, kv_head: usize, scratch: &mut CalibrationScratch) -> Vec<Calibration> {
    let call = &budgeted.call;
    let (group, tokens) = (call.group(), call.tokens());
    let sample_tokens = MICRO_ROWS.min(tokens);
    let samples = SAMPLES.min(tokens / sample_tokens);
    // Under a causal mask the first queries of a text see little from afar.
    let position = call.first_position;
    let earliest = match call.attention.mask.causal {
        true => ((position + tokens) / 4).saturating_sub(position).min(tokens - sample_tokens),
        false => 0,
    };
    let budget = budgeted.settings.budget;
    let head = budgeted.index.head(kv_head);
    let mut trials: Vec<_> = (0..group).map(|query_head| Trial::after(head.calibration(query_head), budget)).collect();
    for (query_head, trial) in trials.iter_mut().enumerate() {
        if head.is_given_up(query_head, budget) {
            trial.give_up();
        }
    }
    // Heads whose rows share micro-tiles are tried together: they share the clusters that are computed.
    let together = if sample_tokens == MICRO_ROWS { 1 } else { group };
    let task = |sample: usize| {
        let end = tokens - (tokens - earliest - sample_tokens) * sample / samples;
        Task { kv_head, tokens: end - sample_tokens..end, keys: 0..call.cache.len() }
    };
    // The first alone: it shows which heads are hopeless.
    let starts = [0, 1].into_iter().chain((LEAST_SAMPLES..samples).step_by(LEAST_SAMPLES));
    'samples: for first in starts.filter(|first| *first < samples) {
        let end = if first == 0 { 1 } else { (first + 1).next_multiple_of(LEAST_SAMPLES) };
        let places = (first..samples.min(end)).map(|sample| (sample, task(sample)));
        // Those with clusters to measure: a window may hold none.
        let places: Vec<_> = places
            .map(|(sample, task)| (sample, budgeted.far_regions(&task), task))
            .filter(|(_, regions, _)| !regions.is_empty())
            .collect();
        scratch.compute_exactly(call, &places, |head| together > 1 || !trials[head].is_given_up());
        for (index, (sample, regions, task)) in places.iter().enumerate() {
            let work = Work { budgeted, task, regions };
            scratch.begin(&work, index);
            let is_last = sample + 1 == samples;
            for (index, trials) in trials.chunks_mut(together).enumerate() {
                let is_enough =
                    |trial: &Trial| is_last || trial.samples >= LEAST_SAMPLES || trial.computed == trial.clusters;
                if !trials.iter().any(Trial::is_given_up) {
                    scratch.measure(&work, index * together, trials);
                }
                if trials.iter().any(|trial| trial.is_given_up() || is_enough(trial) && trial.is_too_costly()) {
                    trials.iter_mut().for_each(Trial::give_up);
                }
            }
            if trials.iter().all(Trial::is_given_up) {
                break 'samples;
            }
        }
    }
    trials.iter().map(|trial| trial.judge(budget)).collect()
}

impl CalibrationScratch {
    /// Computes the rows of the tasks of `places`, of as many tokens each, exactly: those of the heads that `wanted` names,
    /// of which each fills whole micro-tiles unless all are wanted.
    fn compute_exactly(
        &mut self,
        call: &Call<'_>,
        places: &[(usize, Vec<usize>, Task)],
        wanted: impl Fn(usize) -> bool,
    ) {
        let Some((_, _, Task { kv_head, tokens, .. })) = places.first() else { return };
        let (cache, group) = (call.cache, call.group());
        let (shape, kv_head, tokens) = (cache.shape(), *kv_head, tokens.len());
        let rows = group * tokens;
        let seen = tiles::begin_rows(&mut self.exact, call, places.len() * rows, 0..cache.len(), |row| {
            let (head, token) = places[row / rows].2.head_and_token(row % rows);
            (kv_head * group + head, token)
        });
        let head_of = |micro_tile: usize| micro_tile * MICRO_ROWS / tokens % group;
        let first = tiles::block_start(cache, seen.start);
        let keys = HeadKeys::of_tokens(call, kv_head, places.iter().map(|(_, _, task)| task.tokens.clone()));
        keys.accumulate(&mut self.exact, first..seen.end, |micro_tile| wanted(head_of(micro_tile)));
        self.output.resize(shape.value_dim, 0.0);
        self.exact_output.resize(shape.value_dim, 0.0);
    }

    /// Turns to `work`, the task with number `sample` of those that were computed exactly.
    fn begin(&mut self, work: &Work<'_>, sample: usize) {
        let (budgeted, task) = (work.budgeted, work.task);
        let seen = tiles::begin(&mut self.near, &budgeted.call, task);
        budgeted.accumulate_near(&mut self.near, task, work.regions, seen);
        self.first_exact_row = sample * budgeted.call.group() * task.tokens.len();
    }

    /// Takes the heads of `work` from `first` on down to limits that their rows can bear, or to the last.
    fn measure(&mut self, work: &Work<'_>, first: usize, trials: &mut [Trial]) {
        let rows_of_head = work.task.tokens.len();
        let heads = first..first + trials.len();
        let micro_tiles = first * rows_of_head / MICRO_ROWS..(heads.end * rows_of_head).div_ceil(MICRO_ROWS);
        let clusters = micro_tiles.len() * work.clusters();
        for trial in trials.iter_mut() {
            trial.samples += 1;
            trial.rows += rows_of_head;
            trial.clusters += clusters;
        }
        for row in micro_tiles.clone().flat_map(|micro_tile| work.rows_of(micro_tile)) {
            let spread = work.spread_of(row, &mut self.query);
            let trial = &mut trials[work.task.head_and_token(row).0 - first];
            trial.spread = trial.spread.max(spread);
        }
        let budget = work.budgeted.settings.budget;
        let mut limits = vec![0.0; work.budgeted.call.group()];
        while !trials.iter().any(Trial::is_given_up) {
            for (limit, trial) in limits[heads.clone()].iter_mut().zip(&*trials) {
                *limit = trial.limit() * budget;
            }
            self.trial.clone_from(&self.near);
            let mut findings = vec![Finding::default(); trials.len()];
            let (mut computed, mut rest) = (0, 0.0_f32);
            for micro_tile in micro_tiles.clone() {
                let tried = self.try_limits(work, micro_tile, &limits, first, &mut findings);
                (computed, rest) = (computed + tried.computed, rest.max(tried.rest));
            }
            if findings.iter().all(|finding| finding.worst <= 1.0) {
                for (trial, finding) in trials.iter_mut().zip(findings) {
                    trial.computed += computed;
                    trial.finding.merge(finding);
                }
                return;
            }
            for (trial, _) in trials.iter_mut().zip(findings).filter(|(_, finding)| finding.worst > 1.0) {
                trial.step_down(rest);
            }
        }
    }

    /// Computes a micro-tile within `limits` and adds to the findings of its heads, from `first` on, how far off it is.
    fn try_limits(
        &mut self,
        work: &Work<'_>,
        micro_tile: usize,
        limits: &[f32],
        first: usize,
        findings: &mut [Finding],
    ) -> Tried {
        let Some(estimated) = work.micro_tile(micro_tile, limits, &mut self.trial, &mut self.tile) else {
            // What is no number is computed exactly.
            return Tried { computed: work.clusters(), rest: 1.0 };
        };
        let budget = work.budgeted.settings.budget;
        let value_scale = work.value_scale();
        let (rows, mut rest) = (work.rows_of(micro_tile).len() as f32, 0.0);
        for (row, error) in work.rows_of(micro_tile).zip(estimated.errors) {
            let (head, _) = work.task.head_and_token(row);
            let finding = &mut findings[head - first];
            rest += (error / limits[head]).powi(2) / rows;
            self.trial.finish_row(row, &mut self.output);
            self.exact.finish_row(self.first_exact_row + row, &mut self.exact_output);
            let missed = distance(&self.output, &self.exact_output) / value_scale;
            let share = share_of_allowed(missed, &self.exact_output, budget, value_scale);
            finding.worst = finding.worst.max(share);
            if share > BEARING {
                finding.bearable = finding.bearable.min(error / share);
            }
            if error > TELLING * limits[head] {
                finding.ratios.push(missed / error);
            }
        }
        // Where it would fall back its rows are measured all the same: others much like them may not.
        let computed = if estimated.selected > work.most_computed() { work.clusters() } else { estimated.selected };
        // Heads that share clusters go down one by one.
        Tried { computed, rest: if findings.len() > 1 { 1.0 } else { rest } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_leaves_room_for_rows_that_were_not_measured() {
        let mut trial = Trial::after(Calibration::default(), 0.1);
        (trial.samples, trial.finding.worst, trial.finding.ratios) = (3, 1.0, vec![1.0, 3.0, 2.0]);
        let measured = trial.judge(0.1);
        assert_eq!((measured.samples, measured.limit, measured.error_factor), (3, 0.1 * MOST, 2.0 / SAFETY));
        trial.step_down(1.0);
        trial.step_down(1.0);
        assert_eq!(trial.judge(0.1).error_factor, 1.0, "nothing was measured at this step");
        trial.finding.worst = 1.0 / 1.1;
        assert!((trial.judge(0.1).limit - 0.055 * MOST).abs() < 1e-6);
        trial.finding.bearable = 0.01;
        assert_eq!(trial.judge(0.1).limit, 0.01);
        (trial.finding.worst, trial.finding.bearable) = (0.1, f32::INFINITY);
        assert!((trial.judge(0.1).limit - 0.05 * MOST * std::f32::consts::SQRT_2).abs() < 1e-6);
        trial.give_up();
        assert_eq!(trial.judge(0.1).limit, 0.0);
    }

    #[test]
    fn the_smallest_limit_is_the_same_for_larger_budgets() {
        let smallest = |budget: f32| {
            let mut trial = Trial::after(Calibration::default(), budget);
            trial.step = trial.steps - 1;
            trial.limit() * budget
        };
        for budget in [0.05, 0.1, 0.2, 0.4, 0.8] {
            assert!((smallest(budget) / smallest(0.05) - 1.0).abs() < 1e-3, "{budget}");
        }
        assert!((smallest(0.025) / smallest(0.05) - 0.5).abs() < 1e-3);
    }

    #[test]
    fn limits_at_which_nothing_more_is_computed_are_passed_over() {
        for (rest, steps) in [(1.0, 1), (0.6, 1), (0.45, 2), (0.26, 2), (0.24, 3), (0.0, STEPS), (f32::NAN, STEPS)] {
            let mut trial = Trial::after(Calibration::default(), USUAL_BUDGET);
            trial.step_down(rest);
            assert_eq!(trial.step, steps, "{rest}");
            // More than the whole limit is left at the new one, and was not at the one before.
            let grown = |steps: usize| rest * (steps as f32).exp2();
            assert!(steps == STEPS || grown(steps) > 1.0 && grown(steps - 1) <= 1.0, "{rest}");
        }
    }

    #[test]
    fn measurements_add_up() {
        let (a, b) = (
            Calibration { samples: 2, rows: 6, limit: 0.1, error_factor: 3.0, spread: 1.0 },
            Calibration { samples: 1, rows: 3, limit: 0.05, error_factor: 2.0, spread: 2.0 },
        );
        let both = Calibration { samples: 3, rows: 9, limit: 0.05, error_factor: 3.0, spread: 2.0 };
        assert_eq!(a.merge(b), both);
        assert!(!both.is_unlike(4.0) && both.is_unlike(4.1));
        assert_eq!(Calibration::default().merge(a), a);
        assert_eq!(a.merge(Calibration::default()), a);
    }
}
