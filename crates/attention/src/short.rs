//! Exact attention of short inputs: a head fits one tile, and one thread packs its keys and values and attends to them at
//! once, while they are in its caches.
//!
//! Elsewhere all heads are packed before the first is attended to. That costs little beside the products of a long
//! input; of 128 tokens it is a tenth of the time.

use std::sync::{Mutex, PoisonError};

use iceformer_kernels::attention::AttentionTile;

use crate::arrays::KEPT_BYTES;
use crate::output::{Output, OutputRows};
use crate::strided::FromF32;
use crate::tiles::{self, Call, Plan};
use crate::{Arrays, Attention, CacheShape, HeadReport, KeyValueCache, KeyValueType, Report, ThreadTeam};

/// Buffers of one thread, reused from call to call.
#[derive(Default)]
pub(crate) struct ShortScratch {
    /// Of one head.
    cache: Option<KeyValueCache>,
    tile: AttentionTile,
    /// `[value_dim]`
    output: Vec<f32>,
    query: Vec<f32>,
}

/// Whether a head of `arrays` is one task of exact attention.
pub(crate) fn fits(arrays: &Arrays<'_>) -> bool {
    let [_, heads, tokens, _] = arrays.queries.shape();
    let [_, kv_heads, keys, _] = arrays.keys.shape();
    Plan::of_heads(1, heads / kv_heads, tokens, keys).tasks() == 1
}

/// Writes `output`. `kind` is the type that keys and values are packed in.
pub(crate) fn run<T: FromF32>(
    attention: &Attention,
    arrays: &Arrays<'_>,
    kind: KeyValueType,
    output: Output<'_, T>,
    team: &ThreadTeam,
    scratch: &mut Vec<Mutex<ShortScratch>>,
) -> Report {
    let [batch, heads, tokens, key_dim] = arrays.queries.shape();
    let [_, kv_heads, keys, value_dim] = arrays.values.shape();
    let group = heads / kv_heads;
    let mut rows_of_heads: Vec<Vec<OutputRows<'_, T>>> = Vec::new();
    rows_of_heads.resize_with(batch * kv_heads, || Vec::with_capacity(tokens));
    output.into_rows(group).for_each(|rows| rows_of_heads[rows.kv_head].push(rows));
    scratch.resize_with(team.threads(), Mutex::default);
    let scratch = &*scratch;
    team.run_chunks(&mut rows_of_heads, 1, |kv_head, rows, worker| {
        let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        let ShortScratch { cache: kept, tile, output, query } = &mut *scratch;
        let shape = CacheShape { kv_heads: 1, key_dim, value_dim };
        let mut cache = KeyValueCache::reusing(kept.take(), shape, kind);
        // Within a task a team runs everything on this thread.
        cache.append_view(arrays.keys.row_heads_of(kv_head, 1), arrays.values.row_heads_of(kv_head, 1), team);
        let call = Call {
            attention,
            queries: arrays.queries.row_heads_of(kv_head * group, group),
            first_position: arrays.first_position,
            cache: &cache,
            soft_cap: arrays.soft_cap,
        };
        let task = Plan::new(&call).task(0, keys);
        tiles::attend_to_all(tile, &call, &task);
        output.resize(value_dim, 0.0);
        for rows in &mut rows[0] {
            let token = rows.token;
            for head in 0..group {
                let row = task.row(head, token);
                tile.finish_row(row, output);
                rows.write(head, output, || tile.log_sum_exp(row) + call.centre(head, token, query));
            }
        }
        *kept = (cache.bytes() <= KEPT_BYTES / team.threads()).then_some(cache);
    });
    let allowed =
        (0..tokens).map(|token| attention.mask.visible(arrays.first_position + token, keys).len() as u64).sum();
    Report::of_heads(batch * heads, &HeadReport::exact(tokens, allowed))
}
