//! Exact attention: every key the mask allows, tiled, with an online softmax.
//!
//! A task is one key/value head, a tile of consecutive query tokens (with all query heads that read the head), and a
//! range of keys. Prompts have tasks enough without cutting the keys; a decode step cuts them (flash decoding), and
//! the parts are merged by their log-sum-exp. The cut depends on the shapes alone, never on the number of threads, so
//! the result does not either.

use std::sync::Mutex;

use iceformer_kernels::InstructionSet;
use iceformer_kernels::attention::{AttentionTile, MAX_BLOCK_KEYS, PAGE_KEYS, TileShape};

use crate::cache::SEGMENT_KEYS;
use crate::dci::DciScratch;
use crate::method::{Attention, Queries};
use crate::{HeadReport, KeyValueCache, Report, ThreadTeam};

/// Query rows of a tile: enough that expanding a block of int8 values is a small part of the work on it, few enough
/// that queries and output stay in the second-level cache.
const TILE_ROWS: usize = 192;
/// Keys are cut into ranges until there are this many tasks …
const WANTED_TASKS: usize = 32;
/// … but no shorter than this.
const RANGE_KEYS: usize = 1024;
/// Bytes of a block's keys and values: with the scores they fill the first-level cache of 32 to 48 KiB.
const BLOCK_BYTES: usize = 32 * 1024;

/// Buffers reused from call to call.
#[derive(Default)]
pub struct AttentionScratch {
    /// One per thread.
    tiles: Vec<Mutex<AttentionTile>>,
    /// One per task.
    parts: Vec<Part>,
    pub(crate) dci: DciScratch,
}

/// What a task leaves: output and log-sum-exp of its rows over its range of keys.
#[derive(Default)]
struct Part {
    /// `[rows][value_dim]`
    output: Vec<f32>,
    /// `[rows]`
    log_sum_exp: Vec<f32>,
}

/// How a call is cut into tasks.
struct Plan {
    group: usize,
    tile_tokens: usize,
    tiles: usize,
    ranges: usize,
    range_keys: usize,
}

impl Plan {
    fn new(tokens: usize, group: usize, kv_heads: usize, keys: usize) -> Self {
        // Whole micro-tiles of six rows within one head keep the rows of a micro-tile close together.
        let tile_tokens = (TILE_ROWS / group / 6 * 6).max(6).min(tokens.max(1));
        let tiles = tokens.div_ceil(tile_tokens);
        let wanted = WANTED_TASKS.div_ceil((tiles * kv_heads).max(1));
        let range_keys = keys.div_ceil(wanted).max(RANGE_KEYS).next_multiple_of(SEGMENT_KEYS);
        Self { group, tile_tokens, tiles, ranges: keys.div_ceil(range_keys).max(1), range_keys }
    }

    /// Index of the part that holds `tile` of `kv_head` over range `range`. Tiles run backwards: under a causal mask
    /// the last are the longest, and the longest go first.
    fn part(&self, kv_head: usize, kv_heads: usize, tile: usize, range: usize) -> usize {
        ((self.tiles - 1 - tile) * kv_heads + kv_head) * self.ranges + range
    }
}

/// Runs `attention` over all keys its mask allows. Shapes were checked by the caller.
pub(crate) fn run(
    attention: &Attention,
    queries: Queries<'_>,
    cache: &KeyValueCache,
    output: &mut [f32],
    log_sum_exp: Option<&mut [f32]>,
    team: &ThreadTeam,
    scratch: &mut AttentionScratch,
) -> Report {
    run_capped(attention, None, queries, cache, output, log_sum_exp, team, scratch)
}

/// As [`run`], with logits soft-capped. A cache of int8 has no use for it: its keys are centred, and a capped logit
/// minds a shift.
#[expect(clippy::too_many_arguments, reason = "the arguments of `Attention::run`")]
pub(crate) fn run_capped(
    attention: &Attention,
    soft_cap: Option<f32>,
    queries: Queries<'_>,
    cache: &KeyValueCache,
    output: &mut [f32],
    log_sum_exp: Option<&mut [f32]>,
    team: &ThreadTeam,
    scratch: &mut AttentionScratch,
) -> Report {
    assert!(soft_cap.is_none() || cache.kind() != crate::KeyValueType::Int8, "soft-capping over a cache of int8");
    let shape = cache.shape();
    let (heads, kv_heads) = (queries.query_heads, shape.kv_heads);
    let tokens = queries.data.len() / (heads * shape.key_dim);
    let plan = Plan::new(tokens, heads / kv_heads, kv_heads, cache.len());
    let block_keys = block_keys(cache);
    let value_dim = shape.value_dim;

    let tasks = plan.tiles * kv_heads * plan.ranges;
    scratch.tiles.resize_with(team.threads(), Mutex::default);
    if scratch.parts.len() < tasks {
        scratch.parts.resize_with(tasks, Part::default);
    }
    let tiles = &scratch.tiles;
    team.run_chunks(&mut scratch.parts[..tasks], 1, |task, part, worker| {
        let part = &mut part[0];
        let range = task % plan.ranges;
        let kv_head = task / plan.ranges % kv_heads;
        let first_token = (plan.tiles - 1 - task / plan.ranges / kv_heads) * plan.tile_tokens;
        let tile_tokens = plan.tile_tokens.min(tokens - first_token);
        let rows = plan.group * tile_tokens;
        let keys = range * plan.range_keys..cache.len().min((range + 1) * plan.range_keys);

        let mut tile = tiles[worker].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let tile_shape = TileShape { rows, key_dim: shape.padded_key_dim(), value_dim: shape.padded_value_dim() };
        tile.begin_capped(InstructionSet::current(), tile_shape, cache.kind().empty_block(), soft_cap);
        let (mut low, mut high) = (usize::MAX, 0);
        for row in 0..rows {
            let (head, token) = (kv_head * plan.group + row / tile_tokens, first_token + row % tile_tokens);
            let query = &queries.data[(token * heads + head) * shape.key_dim..][..shape.key_dim];
            let seen = attention.mask.visible(queries.first_position + token, cache.len());
            let (start, end) = (seen.start.max(keys.start), seen.end.min(keys.end));
            if start < end {
                (low, high) = (low.min(start), high.max(end));
            }
            tile.set_row(row, query, attention.scale, (start, end));
        }
        let block = |first: usize| {
            let count = block_keys.min(high - first).next_multiple_of(PAGE_KEYS);
            cache.block(kv_head, first, count)
        };
        for first in (low.min(high) / block_keys * block_keys..high).step_by(block_keys) {
            let next = first + block_keys;
            tile.accumulate(first, block(first), (next < high).then(|| block(next)));
        }
        part.output.resize(rows * value_dim, 0.0);
        part.log_sum_exp.resize(rows, 0.0);
        for (row, output) in part.output.chunks_exact_mut(value_dim).take(rows).enumerate() {
            part.log_sum_exp[row] = tile.finish_row(row, output);
        }
    });

    let parts = &scratch.parts;
    let token_parts = |token: usize, head: usize| {
        let (tile, token) = (token / plan.tile_tokens, token % plan.tile_tokens);
        let tile_tokens = plan.tile_tokens.min(tokens - tile * plan.tile_tokens);
        let row = head % plan.group * tile_tokens + token;
        let first = plan.part(head / plan.group, kv_heads, tile, 0);
        (&parts[first..first + plan.ranges], row)
    };
    let gather_token = |token: usize, output: &mut [f32]| {
        for (head, output) in output.chunks_exact_mut(value_dim).enumerate() {
            let (parts, row) = token_parts(token, head);
            merge(parts, row, output);
        }
    };
    if tokens < 16 {
        output.chunks_exact_mut(heads * value_dim).enumerate().for_each(|(token, output)| gather_token(token, output));
    } else {
        team.run_chunks(output, 16 * heads * value_dim, |index, chunk, _| {
            for (offset, output) in chunk.chunks_exact_mut(heads * value_dim).enumerate() {
                gather_token(index * 16 + offset, output);
            }
        });
    }
    if let Some(log_sum_exp) = log_sum_exp {
        for (index, target) in log_sum_exp.iter_mut().enumerate() {
            let (token, head) = (index / heads, index % heads);
            let (parts, row) = token_parts(token, head);
            let mean = cache.key_mean(head / plan.group);
            let query = &queries.data[index * shape.key_dim..][..shape.key_dim];
            let centre: f32 = query.iter().zip(mean).map(|(query, mean)| query * mean).sum();
            *target = total(parts, row) + attention.scale * centre;
        }
    }
    let seen = |token| attention.mask.visible(queries.first_position + token, cache.len()).len() as u64;
    let allowed = (0..tokens).map(seen).sum();
    let each = HeadReport {
        rows: tokens as u64,
        allowed_keys: allowed,
        evaluated_keys: allowed,
        kept_keys: allowed,
        ..HeadReport::default()
    };
    Report::of_heads(heads, &each)
}

/// Keys of one block: a divisor of a segment whose keys and values fill the first-level cache.
fn block_keys(cache: &KeyValueCache) -> usize {
    let shape = cache.shape();
    let bytes = match cache.kind() {
        crate::KeyValueType::F32 => 4 * (shape.padded_key_dim() + shape.padded_value_dim()),
        crate::KeyValueType::Bf16 => 2 * (shape.padded_key_dim() + shape.padded_value_dim()),
        crate::KeyValueType::Int8 => shape.padded_key_dim() + shape.padded_value_dim(),
    };
    let fitting = (BLOCK_BYTES / bytes).clamp(64, MAX_BLOCK_KEYS);
    1 << fitting.ilog2()
}

/// Log-sum-exp of a row over all ranges of keys.
fn total(parts: &[Part], row: usize) -> f32 {
    if let [part] = parts {
        return part.log_sum_exp[row];
    }
    let largest = parts.iter().map(|part| part.log_sum_exp[row]).fold(f32::NEG_INFINITY, f32::max);
    if largest == f32::NEG_INFINITY {
        return largest;
    }
    largest + parts.iter().map(|part| (part.log_sum_exp[row] - largest).exp()).sum::<f32>().ln()
}

/// Output of a row over all ranges of keys: the parts' outputs weighted by their share of the softmax sum.
fn merge(parts: &[Part], row: usize, output: &mut [f32]) {
    let row_range = row * output.len()..(row + 1) * output.len();
    if let [part] = parts {
        output.copy_from_slice(&part.output[row_range]);
        return;
    }
    let total = total(parts, row);
    output.fill(0.0);
    if total == f32::NEG_INFINITY {
        return;
    }
    for part in parts {
        let share = (part.log_sum_exp[row] - total).exp();
        if share != 0.0 {
            let source = &part.output[row_range.clone()];
            output.iter_mut().zip(source).for_each(|(target, value)| *target += share * value);
        }
    }
}
