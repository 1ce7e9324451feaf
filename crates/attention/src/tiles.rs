//! Tiles of queries: how a call is cut into tasks, how a task walks over keys, and how the parts come together.
//!
//! A task is one key/value head, a tile of consecutive query tokens (with all query heads that read the head, one head's
//! rows behind another's), and a range of keys. Prompts have tasks enough without cutting the keys; a decode step cuts them (flash decoding), and
//! the parts are merged by their log-sum-exp. The cut depends on the shapes alone, never on the number of threads, so
//! the result does not either.

use std::ops::Range;

use iceformer_kernels::InstructionSet;
use iceformer_kernels::attention::{AttentionTile, MAX_BLOCK_KEYS, MICRO_ROWS, PAGE_KEYS, TileShape};

use crate::method::{Attention, Queries};
use crate::segment::SEGMENT_KEYS;
use crate::{KeyValueCache, KeyValueType, ThreadTeam};

/// Query rows of a tile: enough that expanding a block of int8 values is a small part of the work on it, few enough
/// that queries and output stay in the second-level cache.
const TILE_ROWS: usize = 192;
/// Keys are cut into ranges until there are this many tasks …
const WANTED_TASKS: usize = 32;
/// … but no shorter than this.
const RANGE_KEYS: usize = 1024;
/// Bytes of a block's keys and values. They come from the second-level cache for every micro-tile, which the products
/// outweigh; what a longer block saves is the start and the end of the loops over it.
const BLOCK_BYTES: usize = 64 * 1024;

/// What a task leaves: output and log-sum-exp of its rows over its range of keys.
#[derive(Default)]
pub(crate) struct Part {
    /// `[rows][value_dim]`
    pub output: Vec<f32>,
    /// `[rows]`
    pub log_sum_exp: Vec<f32>,
}

/// One call: its arguments.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub attention: &'a Attention,
    pub queries: Queries<'a>,
    pub cache: &'a KeyValueCache,
    /// What logits are soft-capped to, by method `exact` only.
    pub soft_cap: Option<f32>,
}

impl Call<'_> {
    pub fn tokens(&self) -> usize {
        self.queries.data.len() / (self.queries.query_heads * self.cache.shape().key_dim)
    }

    pub fn query(&self, head: usize, token: usize) -> &[f32] {
        let key_dim = self.cache.shape().key_dim;
        &self.queries.data[(token * self.queries.query_heads + head) * key_dim..][..key_dim]
    }

    /// Keys that query `token` sees.
    pub fn seen(&self, token: usize) -> Range<usize> {
        self.attention.mask.visible(self.queries.first_position + token, self.cache.len())
    }

    /// Query heads that read one key/value head.
    pub fn group(&self) -> usize {
        self.queries.query_heads / self.cache.shape().kv_heads
    }
}

/// How a call is cut into tasks.
pub(crate) struct Plan {
    group: usize,
    kv_heads: usize,
    tokens: usize,
    tile_tokens: usize,
    tiles: usize,
    ranges: usize,
    range_keys: usize,
}

/// One task.
pub(crate) struct Task {
    pub kv_head: usize,
    pub tokens: Range<usize>,
    pub keys: Range<usize>,
}

impl Task {
    /// Query head of the group and token of row `row`: all tokens of one head, then those of the next, so that a
    /// micro-tile holds rows that attend to much the same keys.
    pub fn head_and_token(&self, row: usize) -> (usize, usize) {
        let tokens = self.tokens.len();
        (row / tokens, self.tokens.start + row % tokens)
    }

    /// Row of `token` of query head `head` of the group.
    pub fn row(&self, head: usize, token: usize) -> usize {
        head * self.tokens.len() + token - self.tokens.start
    }
}

impl Plan {
    /// The cut of `call`.
    pub fn new(call: &Call<'_>) -> Self {
        let (tokens, group, kv_heads, keys) =
            (call.tokens(), call.group(), call.cache.shape().kv_heads, call.cache.len());
        // A whole number of micro-tiles.
        let tile_tokens = (TILE_ROWS / group / MICRO_ROWS * MICRO_ROWS).max(MICRO_ROWS).min(tokens.max(1));
        let tiles = tokens.div_ceil(tile_tokens);
        let wanted = WANTED_TASKS.div_ceil((tiles * kv_heads).max(1));
        let range_keys = keys.div_ceil(wanted).max(RANGE_KEYS).next_multiple_of(SEGMENT_KEYS);
        let ranges = keys.div_ceil(range_keys).max(1);
        Self { group, kv_heads, tokens, tile_tokens, tiles, ranges, range_keys }
    }

    pub fn tasks(&self) -> usize {
        self.tiles * self.kv_heads * self.ranges
    }

    /// Task `index`. Tiles run backwards: under a causal mask the last are the longest, and the longest go first.
    pub fn task(&self, index: usize, keys: usize) -> Task {
        let range = index % self.ranges;
        let first_token = (self.tiles - 1 - index / self.ranges / self.kv_heads) * self.tile_tokens;
        Task {
            kv_head: index / self.ranges % self.kv_heads,
            tokens: first_token..self.tokens.min(first_token + self.tile_tokens),
            keys: range * self.range_keys..keys.min((range + 1) * self.range_keys),
        }
    }

    /// The parts that hold `token` of `head`, and its row in them.
    fn parts_of<'p>(&self, parts: &'p [Part], token: usize, head: usize) -> (&'p [Part], usize) {
        let (tile, token) = (token / self.tile_tokens, token % self.tile_tokens);
        let tile_tokens = self.tile_tokens.min(self.tokens - tile * self.tile_tokens);
        let row = head % self.group * tile_tokens + token;
        let first = ((self.tiles - 1 - tile) * self.kv_heads + head / self.group) * self.ranges;
        (&parts[first..first + self.ranges], row)
    }

    /// Brings the parts together in the order of `output` and `log_sum_exp`.
    pub fn collect(
        &self,
        call: &Call<'_>,
        parts: &[Part],
        output: &mut [f32],
        log_sum_exp: Option<&mut [f32]>,
        team: &ThreadTeam,
    ) {
        let (heads, shape) = (call.queries.query_heads, call.cache.shape());
        let value_dim = shape.value_dim;
        let gather_token = |token: usize, output: &mut [f32]| {
            for (head, output) in output.chunks_exact_mut(value_dim).enumerate() {
                let (parts, row) = self.parts_of(parts, token, head);
                merge(parts, row, output);
            }
        };
        if self.tokens < 16 {
            output
                .chunks_exact_mut(heads * value_dim)
                .enumerate()
                .for_each(|(token, output)| gather_token(token, output));
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
                let (parts, row) = self.parts_of(parts, token, head);
                let mean = call.cache.key_mean(head / self.group);
                let centre: f32 = call.query(head, token).iter().zip(mean).map(|(query, mean)| query * mean).sum();
                *target = total(parts, row) + call.attention.scale * centre;
            }
        }
    }
}

impl Part {
    /// Takes the rows of `tile`.
    pub fn fill(&mut self, tile: &AttentionTile, rows: usize, value_dim: usize) {
        self.output.resize(rows * value_dim, 0.0);
        self.log_sum_exp.resize(rows, 0.0);
        for (row, output) in self.output.chunks_exact_mut(value_dim).take(rows).enumerate() {
            self.log_sum_exp[row] = tile.finish_row(row, output);
        }
    }
}

/// Starts `tile` with the rows of `task`. Returns the keys that some row sees; empty when none does.
pub(crate) fn begin(tile: &mut AttentionTile, call: &Call<'_>, task: &Task) -> Range<usize> {
    let shape = call.cache.shape();
    let (group, tokens) = (call.group(), task.tokens.len());
    let tile_shape =
        TileShape { rows: group * tokens, key_dim: shape.padded_key_dim(), value_dim: shape.padded_value_dim() };
    tile.begin_capped(InstructionSet::current(), tile_shape, call.cache.kind().empty_block(), call.soft_cap);
    let (mut low, mut high) = (usize::MAX, 0);
    for row in 0..group * tokens {
        let (head, token) = task.head_and_token(row);
        let seen = call.seen(token);
        let (start, end) = (seen.start.max(task.keys.start), seen.end.min(task.keys.end));
        if start < end {
            (low, high) = (low.min(start), high.max(end));
        }
        let query = call.query(task.kv_head * group + head, token);
        tile.set_row(row, query, call.attention.scale, (start, end));
    }
    low.min(high)..high
}

/// Adds the keys of `range` to the micro-tiles of `tile` that `wanted` names. The range starts at a page.
pub(crate) fn accumulate(
    tile: &mut AttentionTile,
    cache: &KeyValueCache,
    kv_head: usize,
    range: Range<usize>,
    wanted: impl Fn(usize) -> bool,
) {
    let block_keys = block_keys(cache);
    // Blocks end where all would that start at a multiple of their size.
    let end_of = |first: usize| range.end.min((first / block_keys + 1) * block_keys);
    let block = |first: usize| cache.block(kv_head, first, (end_of(first) - first).next_multiple_of(PAGE_KEYS));
    let mut first = range.start;
    while first < range.end {
        let next = end_of(first);
        tile.accumulate_in(first, block(first), (next < range.end).then(|| block(next)), &wanted);
        first = next;
    }
}

/// Where a walk over keys that starts with `first` starts: at a block's first key.
pub(crate) fn block_start(cache: &KeyValueCache, first: usize) -> usize {
    first / block_keys(cache) * block_keys(cache)
}

/// Keys of one block: a divisor of a segment. A line of f32 holds half the keys that one of bf16 does and takes twice
/// the time, so that its blocks may have twice the bytes.
fn block_keys(cache: &KeyValueCache) -> usize {
    let shape = cache.shape();
    let width = shape.padded_key_dim() + shape.padded_value_dim();
    let bytes = match cache.kind() {
        KeyValueType::F32 | KeyValueType::Bf16 => 2 * width,
        KeyValueType::Int8 => width,
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
