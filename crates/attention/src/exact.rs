//! Exact attention: every key the mask allows, tiled, with an online softmax.

use std::sync::{Mutex, PoisonError};

use iceformer_kernels::attention::AttentionTile;

use crate::budgeted::BudgetScratch;
use crate::dci::DciScratch;
use crate::output::Output;
use crate::strided::FromF32;
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
pub(crate) fn run<T: FromF32>(
    call: &Call<'_>,
    output: Output<'_, T>,
    team: &ThreadTeam,
    scratch: &mut AttentionScratch,
) -> Report {
    let cache = call.cache;
    // Its keys are centred, and a capped logit minds a shift.
    assert!(call.soft_cap.is_none() || cache.kind() != KeyValueType::Int8, "soft-capping over a cache of int8");
    let plan = Plan::new(call);
    scratch.tiles.resize_with(team.threads(), Mutex::default);
    let AttentionScratch { tiles, parts, .. } = scratch;
    let tiles = &*tiles;
    plan.run(call, output, parts, &mut vec![(); plan.tasks()], team, |task, _, worker, store| {
        let mut tile = tiles[worker].lock().unwrap_or_else(PoisonError::into_inner);
        tiles::attend_to_all(&mut tile, call, task);
        store(&tile);
    });

    let allowed = (0..call.tokens()).map(|token| call.seen(token).len() as u64).sum();
    Report::of_heads(call.query_heads(), &HeadReport::exact(call.tokens(), allowed))
}
