//! Budgeted attention: the keys that matter one by one, all others by what is known of their clusters, within an error
//! that the user sets.
//!
//! Older keys are grouped into clusters of 64 that lie close together ([`index`], [`clustering`]), a thousand keys at a
//! time, or more where that makes clusters tighter ([`merging`]). For six neighbouring rows at a time, the mass of every
//! cluster is estimated from its mean and its channel variances, and with it the error that taking all its values as one
//! would make; these errors are independent from cluster to cluster, so their squares add up. The clusters with the largest are computed exactly, as few as keep the sum within the budget
//! ([`selection`]); the others enter the softmax with their estimated mass, their mean value and what queries add to it
//! by weighing keys ([`cross_covariance`], [`tile`]). How large
//! the sum may be is measured for each head on a few of its queries, all along the text ([`measurement`],
//! [`calibration`]). The first keys, recent ones and those not clustered yet are always exact. Where clusters would save
//! little, exact attention takes over. What a call of few tiles has chosen is cut into [`pieces`], so that threads share it.
//!
//! *Missed mass* of a row is the share of softmax mass that would have to move from one typical value to another,
//! independent one to make the row's error: `‖ô − o‖ / (√2 · σ)`, with the exact output `o`, the method's `ô`, and the
//! root mean square distance σ of the values from their mean.

mod calibration;
mod chosen;
mod clustering;
mod cross_covariance;
mod descent;
mod estimate;
mod index;
mod measurement;
mod merging;
mod metric;
mod pieces;
mod places;
mod region;
mod selection;
mod settings;
mod summaries;
mod tile;

use std::sync::{Mutex, PoisonError, RwLockWriteGuard};

use iceformer_kernels::attention::MICRO_ROWS;

pub(crate) use index::ClusterIndex;
pub(crate) use measurement::share_of_allowed;
pub(crate) use places::anywhere_in;
pub(crate) use region::SortedKeys;
pub use settings::{BudgetError, BudgetSettings};
pub(crate) use tile::distance;

use crate::exact::{self, AttentionScratch};
use crate::output::Output;
use crate::strided::FromF32;
use crate::tiles::{Call, Plan};
use crate::{HeadReport, Mask, Report, ThreadTeam};
use calibration::Measurement;
use index::HeadClusters;
use measurement::{Answer, MeasurementScratch};
use merging::FEWEST_MERGED_UNITS;
use pieces::PieceScratch;
use region::RegionScratch;
use tile::{AUDITED_CALL, Budgeted, NEAR_KEYS, TileScratch};

/// Keys from which clusters are made: where they are tried in vain on fewer, that takes more than a tenth of the time.
const LEAST_KEYS: usize = 4 * 1024;
/// Windows in which they are: of a narrower one, too much is near or seen in part.
const LEAST_WINDOW: usize = 5 * 1024;
/// Queries from which a call makes large regions: their clusters take as long to make as exact attention of so many queries
/// to their keys, and a decode step must not wait for them.
const MANY_TOKENS: usize = 256;
/// Positions between two changes of the regions: a long call is cut there.
const STEP_TOKENS: usize = 4096;
/// Decoded tokens from one that is measured to the next, once the least number was.
const DECODED_BETWEEN: usize = 8;

/// Buffers reused from call to call.
#[derive(Default)]
pub(crate) struct BudgetScratch {
    /// One per thread.
    index: Vec<Mutex<RegionScratch>>,
    /// One per thread.
    measurement: Vec<Mutex<MeasurementScratch>>,
    /// One per key/value head.
    answers: Vec<Answer>,
    /// One per thread.
    tiles: Vec<Mutex<TileScratch>>,
    /// One per task: reports of its query heads.
    reports: Vec<Vec<HeadReport>>,
    pieces: PieceScratch,
}

/// Whether there are keys enough for clusters, within the window where there is one; else every key is computed.
pub(crate) fn makes_clusters(mask: &Mask, keys: usize) -> bool {
    keys >= LEAST_KEYS && mask.window.is_none_or(|window| window >= LEAST_WINDOW)
}

/// Runs `call` within a budget. Shapes and settings were checked by the caller.
pub(crate) fn run<T: FromF32>(
    call: &Call<'_>,
    settings: &BudgetSettings,
    mut output: Output<'_, T>,
    team: &ThreadTeam,
    scratch: &mut AttentionScratch,
) -> Report {
    if call.tokens() == 0 || !makes_clusters(&call.attention.mask, call.cache.len()) {
        return exact::run(call, output, team, scratch);
    }
    let is_audited = call.tokens() >= AUDITED_CALL;
    if !call.attention.mask.causal {
        return run_step(call, settings, is_audited, output, team, scratch);
    }
    // In steps, so that the regions grow with what the queries see, as they do for a text that is read in chunks.
    let mut report = Report::default();
    let mut first = 0;
    while first < call.tokens() {
        let position = call.first_position + first;
        let count = (STEP_TOKENS - position % STEP_TOKENS).min(call.tokens() - first);
        let tokens = first..first + count;
        let audits_last = is_audited && tokens.end == call.tokens();
        report += &run_step(&call.part(tokens.clone()), settings, audits_last, output.part(tokens), team, scratch);
        first += count;
    }
    report
}

/// Runs `call` with one set of clusters; `audits_last` is whether its last tile is audited.
fn run_step<T: FromF32>(
    call: &Call<'_>,
    settings: &BudgetSettings,
    audits_last: bool,
    output: Output<'_, T>,
    team: &ThreadTeam,
    scratch: &mut AttentionScratch,
) -> Report {
    let cache = call.cache;
    scratch.budgeted.index.resize_with(team.threads(), Mutex::default);
    let _turn = team.take_turn();
    let mut guard = cache.clusters().write().unwrap_or_else(PoisonError::into_inner);
    // The keys that some query sees, and those of them that all queries to come will see from afar.
    let first = call.first_position;
    let (len, settled) = match call.attention.mask.causal {
        true => (cache.len().min(first + call.tokens()), first.saturating_sub(NEAR_KEYS)),
        false => (cache.len(), cache.len()),
    };
    // A region that a window sees in part is computed: there they stay small.
    let mask = &call.attention.mask;
    let merged_units = match mask.window {
        Some(_) => 1,
        None if call.tokens() < MANY_TOKENS => FEWEST_MERGED_UNITS,
        None => usize::MAX,
    };
    let passed = if mask.causal { len.saturating_sub(NEAR_KEYS) } else { len };
    let is_padded = mask.keys.as_ref().is_some_and(|keys| keys.start > 0 || keys.end < len);
    guard.note_call(passed, mask.window.is_some() || is_padded);
    // What is decoded goes on with one matter for a while: tokens some way apart tell more.
    let resemble = call.tokens() < MICRO_ROWS && !first.is_multiple_of(DECODED_BETWEEN);
    guard.heads_mut().iter_mut().for_each(|head| head.note_tokens(call.tokens()));
    // The second round adds what the first has shown to pay, and measures more of queries that the first found to be of
    // another matter.
    let mut turned = vec![false; cache.shape().kv_heads];
    scratch.budgeted.answers.resize_with(cache.shape().kv_heads, Answer::default);
    scratch.budgeted.answers.iter_mut().for_each(|answer| answer.is_known = false);
    for _ in 0..2 {
        guard.extend(call, len, settled, merged_units, team, &scratch.budgeted.index);
        let wanted = |(head, has_turned): (&mut HeadClusters, &bool)| match has_turned {
            true => HeadClusters::places_of_turned(call.tokens()),
            false => head.places_wanted(settings.budget, call.tokens(), resemble),
        };
        let places: Vec<usize> = guard.heads_mut().iter_mut().zip(&turned).map(wanted).collect();
        // Most decode steps: nothing to measure, and so nothing to add either.
        if places.iter().all(|places| *places == 0) {
            break;
        }
        let budgeted = Budgeted { call: *call, settings: *settings, index: &guard, audits_last };
        let measured = measure(&budgeted, &places, &turned, team, &mut scratch.budgeted);
        for ((head, has_turned), measured) in guard.heads_mut().iter_mut().zip(&mut turned).zip(measured) {
            if !measured.is_empty() {
                *has_turned = head.take(settings.budget, measured);
            }
        }
    }
    // Other calls may use the clusters from here on, but none may add some.
    let index = RwLockWriteGuard::downgrade(guard);

    let budgeted = Budgeted { call: *call, settings: *settings, index: &index, audits_last };
    let plan = Plan::new(call);
    let AttentionScratch { tiles, parts, budgeted: own, .. } = scratch;
    tiles.resize_with(team.threads(), Mutex::default);
    if plan.cuts_keys() {
        own.tiles.resize_with(team.threads(), Mutex::default);
        return pieces::run(&budgeted, &plan, output, team, (tiles, &own.tiles), &own.answers, &mut own.pieces);
    }
    let BudgetScratch { tiles: own, reports, .. } = own;
    own.resize_with(team.threads(), Mutex::default);
    reports.resize_with(reports.len().max(plan.tasks()), Vec::new);
    let (tiles, own, reports) = (&*tiles, &*own, &mut reports[..plan.tasks()]);
    plan.run(call, output, parts, reports, team, |task, reports, worker, store| {
        let mut tile = tiles[worker].lock().unwrap_or_else(PoisonError::into_inner);
        let mut own = own[worker].lock().unwrap_or_else(PoisonError::into_inner);
        budgeted.run(task, &mut tile, &mut own, reports);
        store(&tile);
    });

    sum_up(call, &plan, reports.iter().map(Vec::as_slice))
}

/// The report of a call, of the `reports` of its tiles.
fn sum_up<'a>(call: &Call<'_>, plan: &Plan, reports: impl Iterator<Item = &'a [HeadReport]>) -> Report {
    let mut report = Report::of_heads(call.query_heads(), &HeadReport::default());
    for (tile, reports) in reports.enumerate() {
        let first = plan.tile(tile, call.cache.len()).kv_head * call.group();
        report.heads[first..].iter_mut().zip(reports).for_each(|(head, part)| *head += part);
    }
    report
}

/// Measures the query heads of each key/value head at so many `places`, between those that were measured before where their
/// text has `turned`; nothing where none are wanted. Leaves the answers to decoded tokens that are measured in `scratch`.
fn measure(
    budgeted: &Budgeted<'_>,
    places: &[usize],
    turned: &[bool],
    team: &ThreadTeam,
    scratch: &mut BudgetScratch,
) -> Vec<Vec<Measurement>> {
    scratch.measurement.resize_with(team.threads(), Mutex::default);
    let BudgetScratch { measurement, answers, .. } = scratch;
    let mut measured: Vec<_> = answers.iter_mut().map(|answer| (Vec::new(), answer)).collect();
    team.run_chunks(&mut measured, 1, |kv_head, measured, worker| {
        if places[kv_head] > 0 {
            let (measured, answer) = &mut measured[0];
            let mut scratch = measurement[worker].lock().unwrap_or_else(PoisonError::into_inner);
            let between = turned[kv_head];
            *measured = measurement::measure(budgeted, kv_head, places[kv_head], between, answer, &mut scratch);
        }
    });
    measured.into_iter().map(|(measured, _)| measured).collect()
}
