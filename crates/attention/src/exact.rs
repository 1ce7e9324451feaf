//! Exact attention: every key the mask allows, tiled, with an online softmax.

use std::sync::{Mutex, PoisonError};

use iceformer_kernels::attention::AttentionTile;

use crate::budgeted::BudgetScratch;
use crate::dci::DciScratch;
use crate::tiles::{self, Call, Part, Plan};
use crate::{HeadReport, KeyValueType, Report, ThreadTeam};

/// Buffers reused from call to call.
#[derive(Default)]
pub struct AttentionScratch {
    /// One per thread.
    pub(crate) tiles: Vec<Mutex<AttentionTile>>,
    /// One per task.
    pub(crate) parts: Vec<Part>,
    pub(crate) budgeted: BudgetScratch,
    pub(crate) dci: DciScratch,
}

/// Runs `call` over all keys its mask allows. Shapes were checked by the caller.
pub(crate) fn run(
    call: &Call<'_>,
    output: &mut [f32],
    log_sum_exp: Option<&mut [f32]>,
    team: &ThreadTeam,
    scratch: &mut AttentionScratch,
) -> Report {
    let cache = call.cache;
    // Its keys are centred, and a capped logit minds a shift.
    assert!(call.soft_cap.is_none() || cache.kind() != KeyValueType::Int8, "soft-capping over a cache of int8");
    let plan = Plan::new(call);
    scratch.tiles.resize_with(team.threads(), Mutex::default);
    if scratch.parts.len() < plan.tasks() {
        scratch.parts.resize_with(plan.tasks(), Part::default);
    }
    let tiles = &scratch.tiles;
    let parts = &mut scratch.parts[..plan.tasks()];
    team.run_chunks(parts, 1, |index, part, worker| {
        let task = plan.task(index, cache.len());
        let mut tile = tiles[worker].lock().unwrap_or_else(PoisonError::into_inner);
        let seen = tiles::begin(&mut tile, call, &task);
        if !seen.is_empty() {
            let first = tiles::block_start(cache, seen.start);
            tiles::accumulate(&mut tile, cache, task.kv_head, first..seen.end, |_| true);
        }
        part[0].fill(&tile, call.group() * task.tokens.len(), cache.shape().value_dim);
    });
    plan.collect(call, parts, output, log_sum_exp, team);

    let allowed = (0..call.tokens()).map(|token| call.seen(token).len() as u64).sum();
    let each = HeadReport {
        rows: call.tokens() as u64,
        allowed_keys: allowed,
        evaluated_keys: allowed,
        kept_keys: allowed,
        ..HeadReport::default()
    };
    Report::of_heads(call.queries.query_heads, &each)
}
