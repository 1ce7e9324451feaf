//! Measures on a few rows of each head how much of the estimate they can bear.
//!
//! A few micro-tiles are computed exactly and within limits on the estimated error that get smaller step by step, until
//! every row's true error is within the budget.

use iceformer_kernels::attention::{AttentionTile, MICRO_ROWS};

use super::Budgeted;
use super::calibration::{
    Calibration, DEMANDING, DEMANDING_OF_LATEST, LEAST_PLACES, MeasuredPlace, MeasuredRow, Measurement, PLACES,
    bearable_by_most, computed_share, costs_too_much, room, rows_of,
};
use super::descent::Descent;
use super::places::anywhere_in;
use super::tile::{Work, distance};
use crate::tiles::{self, Call, HeadKeys, Part, Task};

/// Rows that have a smaller share of the limit as their error do not tell how errors relate to estimates: the rounding of
/// the cache may be all that there is.
const TELLING: f32 = 0.3;
/// Share of what is allowed from which a row tells how much it could bear.
const BEARING: f32 = 0.45;
/// The largest limit, in budgets: errors are never much smaller than estimated.
const MOST: f32 = 0.5;
/// Limits that are tried, each smaller than the one before by half an octave: so many for a budget of [`USUAL_BUDGET`] or
/// less, and more for a larger, down to the same. What rows of a small output may miss does not grow with the budget.
const STEPS: usize = 12;
const USUAL_BUDGET: f32 = 0.05;
/// Steps from the limit that is known up to where a measurement begins …
const STEPS_UP: usize = 2;
/// … and down to where it ends: what a row bears that does not even bear a quarter makes no difference.
const STEPS_DOWN: usize = 4;
/// Largest error in relation to the output: where values average out, as under diffuse attention to unrelated values,
/// an error that is small beside a value can still be all of the output.
const MOST_OF_OUTPUT: f32 = 0.5;

/// Buffers of one thread.
#[derive(Default)]
pub(super) struct MeasurementScratch {
    descent: Descent,
    /// Rows of several tasks.
    exact: AttentionTile,
    /// The first of the task that is measured.
    first_exact_row: usize,
    /// `[value_dim]`
    output: Vec<f32>,
    /// `[value_dim]`
    exact_output: Vec<f32>,
    /// `[key_dim]`
    query: Vec<f32>,
}

/// The exact rows of decoded tokens that are measured: of one key/value head.
#[derive(Default)]
pub(super) struct Answer {
    pub part: Part,
    /// Whether these are the rows of the call.
    pub is_known: bool,
}

/// One query head at the places that are measured.
struct Trial {
    /// The step that each place begins with.
    first_step: usize,
    /// The first step that is not tried, and what rows bear, in budgets, that do not bear the one before.
    steps: usize,
    least: f32,
    /// Whether it is known from enough places that clusters pay, so that a few more do not say the contrary.
    is_known: bool,
    /// What the limit will be divided by when all places of a prompt are known; 1 where tokens are decoded, as the head is
    /// tried again soon.
    room: f32,
    measured: Measurement,
}

/// Steps down from the largest limit: the limit, in budgets.
fn limit_at(step: usize) -> f32 {
    MOST * (-0.5 * step as f32).exp2()
}

/// The step after `step`, at whose limit a share `rest` of the square of the limit was left to the estimate: the next at
/// which more is computed, since up to there rows miss the same.
fn next_step(step: usize, rest: f32) -> usize {
    // Each step halves the square.
    step + 1 + (-rest.max(f32::MIN_POSITIVE).log2()).max(0.0) as usize
}

impl Trial {
    /// Begins a little above what is known, or was where that `is_outdated`. Ends a little below, where the call has places
    /// `enough` that more of them can be measured if rows do not bear that.
    fn after(known: &Calibration, budget: f32, is_outdated: bool, enough: bool) -> Self {
        let more = (2.0 * (budget / USUAL_BUDGET).log2()).round().max(0.0) as usize;
        let all = STEPS + more;
        let step_of = |limit: f32| (2.0 * (MOST * budget / limit).log2()).round().max(0.0) as usize;
        // Not a little above the limit: rows that begin there do not tell how much more they bear.
        let first_step = match known.usual_limit() > 0.0 {
            true => step_of(known.usual_limit()).saturating_sub(STEPS_UP).min(all - 1),
            false => 0,
        };
        let steps = match known.limit() > 0.0 && !is_outdated && enough {
            true => (step_of(known.limit()) + STEPS_DOWN).min(all),
            false => all,
        };
        let least = if steps == all { 0.0 } else { 0.5 * limit_at(steps) };
        let is_known = known.places() >= LEAST_PLACES && !known.is_hopeless() && !is_outdated;
        let room = if enough { room(PLACES * MICRO_ROWS) } else { 1.0 };
        Self { first_step, steps, least, is_known, room, measured: Measurement::default() }
    }

    fn is_given_up(&self) -> bool {
        self.measured.is_hopeless
    }

    /// The place that is measured.
    fn place(&mut self) -> &mut MeasuredPlace {
        self.measured.places.last_mut().expect("a place that is measured")
    }

    /// Gives up where the places measured so far, and be it the first alone, show that clusters do not pay: measuring more
    /// costs where it is in vain. Where they are known to pay, those before count as well, and others decide.
    fn judge(&mut self) {
        if self.is_known || self.measured.places.is_empty() {
            return;
        }
        let limit_of = |demanding: f32| bearable_by_most(rows_of(&self.measured.places), demanding);
        let share = computed_share(&self.measured.places, limit_of(DEMANDING_OF_LATEST) / self.room);
        // Rows that bear nothing will be too many whatever the other places show.
        self.measured.is_hopeless |= limit_of(DEMANDING) == 0.0 || costs_too_much(share);
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

/// Measures the query heads of `kv_head` at `places` places of the call at most, one in each of as many stretches: the last
/// tokens among them, or `between` those that were measured of it before. Where that is all tokens of the call, as they are
/// decoded, the exact rows are left in `answer`.
pub(super) fn measure(
    budgeted: &Budgeted<'_>,
    kv_head: usize,
    places: usize,
    between: bool,
    answer: &mut Answer,
    scratch: &mut MeasurementScratch,
) -> Vec<Measurement> {
    let call = &budgeted.call;
    let (group, tokens) = (call.group(), call.tokens());
    let place_tokens = MICRO_ROWS.min(tokens);
    // Under a causal mask the first queries of a text see little from afar.
    let position = call.first_position;
    let earliest = match call.attention.mask.causal {
        true => ((position + tokens) / 4).saturating_sub(position).min(tokens - place_tokens),
        false => 0,
    };
    let budget = budgeted.settings.budget;
    let head = budgeted.index.head(kv_head);
    let is_outdated = head.is_outdated(budget);
    // Heads whose rows share micro-tiles are tried together: they share the clusters that are computed.
    let together = if place_tokens == MICRO_ROWS { 1 } else { group };
    let trial = |query_head| Trial::after(head.known(query_head, budget), budget, is_outdated, together == 1);
    let mut trials: Vec<_> = (0..group).map(trial).collect();
    for (query_head, trial) in trials.iter_mut().enumerate() {
        trial.measured.is_hopeless = head.is_given_up(query_head, budget);
    }
    let task = |place: usize| {
        let (span, stretch) = (tokens - earliest - place_tokens, 2 * (position + place) + usize::from(between));
        // The last tokens tell the most of those to come.
        let is_last = place == 0 && !between;
        let back = span * place / places + if is_last { 0 } else { anywhere_in(stretch, span / places) };
        let end = tokens - back;
        Task { kv_head, tokens: end - place_tokens..end, keys: 0..call.cache.len() }
    };
    // The first alone, as it shows which heads are hopeless. Then some are computed exactly together: a block of keys is
    // read, and expanded where it has to be, for all of them.
    let starts = [0, 1].into_iter().chain((LEAST_PLACES..places).step_by(LEAST_PLACES));
    'places: for first in starts.filter(|first| *first < places) {
        let end = if first == 0 { 1 } else { (first + 1).next_multiple_of(LEAST_PLACES) };
        let tasks = (first..places.min(end)).map(task);
        // Those with clusters to measure: a window may hold none.
        let tasks: Vec<_> =
            tasks.map(|task| (budgeted.far_regions(&task), task)).filter(|(regions, _)| !regions.is_empty()).collect();
        scratch.compute_exactly(call, &tasks, |head| together > 1 || !trials[head].is_given_up());
        if tokens < MICRO_ROWS && !tasks.is_empty() {
            answer.part.fill(&scratch.exact, group * tokens, call.cache.shape().value_dim);
            answer.is_known = true;
        }
        for (index, (regions, task)) in tasks.iter().enumerate() {
            let work = Work { budgeted, task, regions };
            scratch.begin(&work, index);
            for (index, trials) in trials.chunks_mut(together).enumerate() {
                if !trials.iter().any(Trial::is_given_up) {
                    scratch.measure(&work, index * together, trials);
                    trials.iter_mut().for_each(Trial::judge);
                }
                if trials.iter().any(Trial::is_given_up) {
                    // They fall back together where they are decoded. In a prompt those that are known to pay do not.
                    let others = trials.iter_mut().filter(|trial| !trial.is_known);
                    others.for_each(|trial| trial.measured.is_hopeless = true);
                }
            }
            if trials.iter().all(Trial::is_given_up) {
                break 'places;
            }
        }
    }
    trials.into_iter().map(|trial| trial.measured).collect()
}

impl MeasurementScratch {
    /// Computes the rows of `tasks`, of as many tokens each, exactly: those of the heads that `wanted` names, of which each
    /// fills whole micro-tiles unless all are wanted.
    fn compute_exactly(&mut self, call: &Call<'_>, tasks: &[(Vec<usize>, Task)], wanted: impl Fn(usize) -> bool) {
        let Some((_, Task { kv_head, tokens, .. })) = tasks.first() else { return };
        let (cache, group) = (call.cache, call.group());
        let (shape, kv_head, tokens) = (cache.shape(), *kv_head, tokens.len());
        let rows = group * tokens;
        let seen = tiles::begin_rows(&mut self.exact, call, tasks.len() * rows, 0..cache.len(), |row| {
            let (head, token) = tasks[row / rows].1.head_and_token(row % rows);
            (kv_head * group + head, token)
        });
        let head_of = |micro_tile: usize| micro_tile * MICRO_ROWS / tokens % group;
        let first = tiles::block_start(cache, seen.start);
        let keys = HeadKeys::of_tokens(call, kv_head, tasks.iter().map(|(_, task)| task.tokens.clone()));
        keys.accumulate(&mut self.exact, first..seen.end, |micro_tile| wanted(head_of(micro_tile)));
        self.output.resize(shape.value_dim, 0.0);
        self.exact_output.resize(shape.value_dim, 0.0);
    }

    /// Turns to `work`, the task with number `index` of those that were computed exactly.
    fn begin(&mut self, work: &Work<'_>, index: usize) {
        self.descent.begin(work);
        self.first_exact_row = index * work.rows();
    }

    /// Takes the heads of `work` from `first` on down the limits until each row bears one, or to the last.
    fn measure(&mut self, work: &Work<'_>, first: usize, trials: &mut [Trial]) {
        let rows_of_head = work.task.tokens.len();
        let heads = first..first + trials.len();
        let micro_tiles = first * rows_of_head / MICRO_ROWS..(heads.end * rows_of_head).div_ceil(MICRO_ROWS);
        let rows = work.rows_of(micro_tiles.start).start..work.rows_of(micro_tiles.end - 1).end;
        let clusters = micro_tiles.len() * work.clusters();
        let position = work.budgeted.call.first_position + work.task.tokens.start;
        for trial in trials.iter_mut() {
            let rows = Vec::with_capacity(rows_of_head);
            trial.measured.places.push(MeasuredPlace { position, rows, clusters, computed: Vec::new() });
        }
        let budget = work.budgeted.settings.budget;
        let mut steps: Vec<usize> = trials.iter().map(|trial| trial.first_step).collect();
        // Rows that bore no limit yet.
        let mut open: Vec<usize> = rows.collect();
        let mut limits = vec![0.0; work.budgeted.call.group()];
        while !open.is_empty() {
            for (limit, step) in limits[heads.clone()].iter_mut().zip(&steps) {
                *limit = limit_at(*step) * budget;
            }
            let (mut computed, mut rest) = (0, 0.0_f32);
            for micro_tile in micro_tiles.clone() {
                let tried = self.try_limits(work, micro_tile, &limits, &mut open, |head, row| {
                    trials[head - first].place().rows.push(row);
                });
                (computed, rest) = (computed + tried.computed, rest.max(tried.rest));
            }
            for (trial, limit) in trials.iter_mut().zip(&limits[heads.clone()]) {
                trial.place().computed.push((*limit, computed));
            }
            // Heads that share clusters go down one by one.
            let rest = if trials.len() > 1 { 1.0 } else { rest };
            for (index, (step, trial)) in steps.iter_mut().zip(trials.iter_mut()).enumerate() {
                let of_head = |row: &usize| work.task.head_and_token(*row).0 == first + index;
                if !open.iter().any(of_head) {
                    continue;
                }
                *step = next_step(*step, rest).min(trial.steps);
                if *step == trial.steps {
                    // The last limit is too large for the rows that are left.
                    let bearable = trial.least * budget;
                    for row in open.extract_if(.., |row| of_head(row)) {
                        let spread = work.spread_of(row, &mut self.query);
                        trial.place().rows.push(MeasuredRow { bearable, ratio: None, spread });
                    }
                    *step -= 1;
                }
            }
        }
        // One step farther, where room for rows to come may take the limit.
        limits[heads.clone()].iter_mut().for_each(|limit| *limit *= std::f32::consts::FRAC_1_SQRT_2);
        let most = work.most_computed();
        let count = |micro_tile| match self.descent.clusters_within(work, micro_tile, &limits) {
            Some(computed) if computed <= most => computed,
            _ => work.clusters(),
        };
        let computed = micro_tiles.map(count).sum();
        for (trial, limit) in trials.iter_mut().zip(&limits[heads]) {
            trial.place().computed.push((*limit, computed));
        }
    }

    /// Computes a micro-tile within `limits`; takes those of its rows out of `open`, and `note`s them with their heads, that
    /// miss no more than they may. Where nothing can be estimated rows bear nothing; what is no number tells nothing.
    fn try_limits(
        &mut self,
        work: &Work<'_>,
        micro_tile: usize,
        limits: &[f32],
        open: &mut Vec<usize>,
        mut note: impl FnMut(usize, MeasuredRow),
    ) -> Tried {
        let rows = work.rows_of(micro_tile);
        let Some(estimated) = self.descent.go_to(work, micro_tile, limits) else {
            for row in open.extract_if(.., |row| rows.contains(row)) {
                self.exact.finish_row(self.first_exact_row + row, &mut self.exact_output);
                if self.exact_output.iter().all(|value| value.is_finite()) {
                    let spread = work.spread_of(row, &mut self.query);
                    note(work.task.head_and_token(row).0, MeasuredRow { bearable: 0.0, ratio: None, spread });
                }
            }
            return Tried { computed: work.clusters(), rest: 1.0 };
        };
        let budget = work.budgeted.settings.budget;
        let value_scale = work.value_scale();
        let mut rest = 0.0;
        for (row, error) in rows.clone().zip(estimated.errors) {
            let (head, _) = work.task.head_and_token(row);
            rest += (error / limits[head]).powi(2) / rows.len() as f32;
            let Some(place) = open.iter().position(|open| *open == row) else { continue };
            self.descent.finish_row(row, &mut self.output);
            self.exact.finish_row(self.first_exact_row + row, &mut self.exact_output);
            let missed = distance(&self.output, &self.exact_output) / value_scale;
            let share = share_of_allowed(missed, &self.exact_output, budget, value_scale);
            if share > 1.0 {
                continue;
            }
            open.swap_remove(place);
            // What is left to the next larger step, which was too large.
            let mut bearable = (1.0 / share).min(std::f32::consts::SQRT_2) * limits[head];
            if share > BEARING {
                bearable = bearable.min(error / share);
            }
            let ratio = (error > TELLING * limits[head]).then(|| missed / error);
            note(head, MeasuredRow { bearable, ratio, spread: work.spread_of(row, &mut self.query) });
        }
        // Where it would fall back its rows are measured all the same: others much like them may not.
        let computed = if estimated.selected > work.most_computed() { work.clusters() } else { estimated.selected };
        Tried { computed, rest }
    }
}

/// What a micro-tile did within limits.
struct Tried {
    /// Clusters that it computed.
    computed: usize,
    /// Sum of the squared errors of the others, as estimated, in units of the square of the limit: the mean over its rows.
    rest: f32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_at_which_nothing_more_is_computed_are_passed_over() {
        for (rest, steps) in [(1.0, 1), (0.6, 1), (0.45, 2), (0.26, 2), (0.24, 3), (f32::NAN, 127), (0.0, 127)] {
            let step = next_step(0, rest);
            assert_eq!(step, steps, "{rest}");
            // More than the whole limit is left at the new one, and was not at the one before.
            let grown = |steps: usize| rest * (steps as f32).exp2();
            assert!(steps > STEPS || grown(steps) > 1.0 && grown(steps - 1) <= 1.0, "{rest}");
        }
    }

    #[test]
    fn the_smallest_limit_is_the_same_for_larger_budgets() {
        let smallest =
            |budget: f32| limit_at(Trial::after(&Calibration::default(), budget, true, true).steps - 1) * budget;
        for budget in [0.05, 0.1, 0.2, 0.4, 0.8] {
            assert!((smallest(budget) / smallest(0.05) - 1.0).abs() < 1e-3, "{budget}");
        }
        assert!((smallest(0.025) / smallest(0.05) - 0.5).abs() < 1e-3);
    }

    #[test]
    fn what_is_known_is_where_a_measurement_begins_and_ends() {
        let budget = 0.05;
        let mut known = Calibration::default();
        let measured = |bearable, count| {
            let rows = vec![MeasuredRow { bearable, ratio: None, spread: 1.0 }];
            let place = MeasuredPlace { position: 0, rows, clusters: 0, computed: Vec::new() };
            Measurement { places: vec![place; count], is_hopeless: false }
        };
        known.take(measured(MOST * budget / 8.0, 96), 8, budget);
        let trial = Trial::after(&known, budget, false, true);
        assert_eq!((trial.first_step, trial.steps), (6 - STEPS_UP, 6 + STEPS_DOWN));
        assert!(trial.least > 0.0 && trial.least < limit_at(trial.steps));
        let trial = Trial::after(&known, budget, true, true);
        assert_eq!((trial.first_step, trial.steps, trial.least), (6 - STEPS_UP, STEPS, 0.0), "it may be far less");
        let trial = Trial::after(&known, budget, false, false);
        assert_eq!(
            (trial.first_step, trial.steps, trial.least),
            (6 - STEPS_UP, STEPS, 0.0),
            "no more would be measured"
        );
        // A row that bears an eighth: the next may bear as much as those before.
        known.take(measured(MOST * budget / 64.0, 1), 8, budget);
        assert_eq!(Trial::after(&known, budget, false, true).first_step, 6 - STEPS_UP);
    }

    #[test]
    fn one_place_where_clusters_do_not_pay_is_enough_unless_they_were_known_to() {
        for (bearable, computed, is_known, gives_up) in [
            (0.02, [10, 15], false, false),
            (0.02, [10, 95], false, true),
            (0.02, [95, 100], false, true),
            (0.02, [100, 100], true, false),
            (0.0, [10, 15], false, true),
            (0.0, [10, 15], true, false),
        ] {
            let mut trial = Trial { is_known, ..Trial::after(&Calibration::default(), 0.05, true, true) };
            trial.judge();
            assert!(!trial.is_given_up(), "nothing was measured");
            let rows = vec![MeasuredRow { bearable, ratio: None, spread: 1.0 }; 2];
            let computed = vec![(0.02, computed[0]), (0.015, computed[1])];
            trial.measured.places.push(MeasuredPlace { position: 0, rows, clusters: 100, computed });
            trial.judge();
            assert_eq!(trial.is_given_up(), gives_up, "{:?}, known: {is_known}", trial.measured.places);
        }
    }
}
