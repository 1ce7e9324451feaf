//! Tiles of queries: how a call is cut into tasks, how a task walks over keys, and how the parts come together.
//!
//! A task is one key/value head, a tile of consecutive query tokens (with all query heads that read the head, one head's
//! rows behind another's), and a range of keys. Prompts have tasks enough without cutting the keys; a decode step cuts them (flash decoding), and
//! the parts are merged by their log-sum-exp. The cut depends on the shapes alone, never on the number of threads, so
//! the result does not either.

use std::ops::Range;

use iceformer_kernels::InstructionSet;
use iceformer_kernels::attention::{AttentionTile, MICRO_ROWS, PAGE_KEYS, TileShape};

use crate::method::Attention;
use crate::output::{Output, OutputRows};
use crate::segment::SEGMENT_KEYS;
use crate::strided::{FromF32, StridedView};
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
/// Most keys of such a block.
const MOST_BLOCK_KEYS: usize = 256;
/// Micro-tiles (a decode step's of a group of heads) that wait for memory rather than for products, so that blocks are
/// whole segments: the longer the run of lines read in order, the more of them the processor fetches ahead.
const FEW_MICRO_TILES: usize = 2;

/// Rows that a thread brings together at a time; fewer are not worth waking the team.
const MERGED_TOKENS: usize = 16;

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
    /// `[batch, query heads, tokens, key_dim]`; each entry of the batch reads as many of the heads of `cache`, which divide
    /// its own.
    pub queries: StridedView<'a>,
    /// Position of the first query among the keys.
    pub first_position: usize,
    pub cache: &'a KeyValueCache,
    /// What logits are soft-capped to, by method `exact` only.
    pub soft_cap: Option<f32>,
}

impl<'a> Call<'a> {
    pub fn tokens(&self) -> usize {
        self.queries.shape()[2]
    }

    pub fn query_heads(&self) -> usize {
        self.queries.row_heads()
    }

    /// The query of `token` of row head `head`, in `buffer` unless it can be read where it lies.
    pub fn query<'b>(&self, head: usize, token: usize, buffer: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        self.queries.row(head, token, buffer)
    }

    /// The queries of `tokens` alone.
    pub fn part(&self, tokens: Range<usize>) -> Self {
        Self { first_position: self.first_position + tokens.start, queries: self.queries.tokens(tokens), ..*self }
    }

    /// What the logits of a query lack because the cache has centred its keys.
    pub fn centre(&self, head: usize, token: usize, buffer: &mut Vec<f32>) -> f32 {
        let mean = self.cache.key_mean(head / self.group());
        let query = self.query(head, token, buffer);
        self.attention.scale * query.iter().zip(mean).map(|(query, mean)| query * mean).sum::<f32>()
    }

    /// Keys that query `token` sees.
    pub fn seen(&self, token: usize) -> Range<usize> {
        self.attention.mask.visible(self.first_position + token, self.cache.len())
    }

    /// Whether no query of `tokens` sees some of the keys of `kv_head` that lie in one another's places, but not all.
    pub fn sees_moved_together(&self, kv_head: usize, mut tokens: Range<usize>) -> bool {
        let moved = self.cache.moved(kv_head);
        moved.is_empty()
            || tokens.all(|token| {
                let seen = self.seen(token);
                let all = seen.start <= moved.start && moved.end <= seen.end;
                all || seen.end <= moved.start || moved.end <= seen.start
            })
    }

    /// Query heads that read one key/value head.
    pub fn group(&self) -> usize {
        self.query_heads() / self.cache.shape().kv_heads
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
        Self::of_heads(call.cache.shape().kv_heads, call.group(), call.tokens(), call.cache.len())
    }

    /// The cut of `tokens` queries of `group` heads for each of `kv_heads` over `keys`.
    pub fn of_heads(kv_heads: usize, group: usize, tokens: usize, keys: usize) -> Self {
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

    /// Tiles of all key/value heads: tasks, but for the cut of the keys.
    pub fn tiles(&self) -> usize {
        self.tiles * self.kv_heads
    }

    /// Tile `index` with all keys, of which there are `keys`.
    pub fn tile(&self, index: usize, keys: usize) -> Task {
        Task { keys: 0..keys, ..self.task(index * self.ranges, keys) }
    }

    /// Whether there are too few tiles for many threads, so that keys are cut.
    pub fn cuts_keys(&self) -> bool {
        self.ranges > 1
    }

    /// Keys of a range, whole segments.
    pub fn range_keys(&self) -> usize {
        self.range_keys
    }

    /// The tile whose rows hold `token` of `kv_head`.
    fn tile_of(&self, token: usize, kv_head: usize) -> usize {
        (self.tiles - 1 - token / self.tile_tokens) * self.kv_heads + kv_head
    }

    /// Row of `token` of query head `head` of the group in its task.
    fn row_of(&self, head: usize, token: usize) -> usize {
        let (tile, offset) = (token / self.tile_tokens, token % self.tile_tokens);
        head * self.tile_tokens.min(self.tokens - tile * self.tile_tokens) + offset
    }

    /// Runs `body(task, its entry of `extras`, worker, store)` for every task, which calls `store` with the tile that it
    /// has filled, and writes `output`: at once, or by way of `parts` where keys are cut into ranges.
    pub fn run<T: FromF32, E: Send>(
        &self,
        call: &Call<'_>,
        output: Output<'_, T>,
        parts: &mut Vec<Part>,
        extras: &mut [E],
        team: &ThreadTeam,
        body: impl Fn(&Task, &mut E, usize, &mut dyn FnMut(&AttentionTile)) + Sync,
    ) {
        assert_eq!(extras.len(), self.tasks(), "one for each task");
        let (keys, value_dim) = (call.cache.len(), call.cache.shape().value_dim);
        if self.ranges == 1 {
            let rows = output.into_rows(self.group);
            let mut targets: Vec<_> =
                extras.iter_mut().map(|extra| (Vec::with_capacity(self.tile_tokens), extra)).collect();
            for rows in rows {
                targets[self.tile_of(rows.token, rows.kv_head)].0.push(rows);
            }
            team.run_chunks(&mut targets, 1, |task, target, worker| {
                let (rows, extra) = &mut target[0];
                let mut store = |tile: &AttentionTile| {
                    self.write(call, rows, |_, row, output| {
                        tile.finish_row(row, output);
                        move || tile.log_sum_exp(row)
                    });
                };
                body(&self.task(task, keys), extra, worker, &mut store);
            });
            return;
        }
        if parts.len() < self.tasks() {
            parts.resize_with(self.tasks(), Part::default);
        }
        let mut targets: Vec<_> = parts.iter_mut().zip(extras).collect();
        team.run_chunks(&mut targets, 1, |task, target, worker| {
            let (part, extra) = &mut target[0];
            let task = self.task(task, keys);
            let mut store = |tile: &AttentionTile| part.fill(tile, self.group * task.tokens.len(), value_dim);
            body(&task, extra, worker, &mut store);
        });
        let parts = &*parts;
        self.write_merged(call, output, team, |tile| parts[tile * self.ranges..][..self.ranges].iter());
    }

    /// Writes `output`, of which `parts_of` gives the parts of a tile.
    pub fn write_merged<'p, T: FromF32, P: Iterator<Item = &'p Part> + Clone>(
        &self,
        call: &Call<'_>,
        output: Output<'_, T>,
        team: &ThreadTeam,
        parts_of: impl Fn(usize) -> P + Sync,
    ) {
        let merge_rows = |rows: &mut [OutputRows<'_, T>]| {
            self.write(call, rows, |tile, row, output| {
                let log_sum_exp = merge(parts_of(tile), row, output);
                move || log_sum_exp
            });
        };
        let mut rows: Vec<_> = output.into_rows(self.group).collect();
        if self.tokens < MERGED_TOKENS {
            merge_rows(&mut rows);
        } else {
            team.run_chunks(&mut rows, MERGED_TOKENS, |_, rows, _| merge_rows(rows));
        }
    }

    /// Writes `rows`: `finish` is given the tile that holds a row, its number there and a place for its output, and returns
    /// what gives its log-sum-exp where that is wanted.
    fn write<T: FromF32, L: FnOnce() -> f32>(
        &self,
        call: &Call<'_>,
        rows: &mut [OutputRows<'_, T>],
        finish: impl Fn(usize, usize, &mut [f32]) -> L,
    ) {
        let (mut output, mut query) = (vec![0.0; call.cache.shape().value_dim], Vec::new());
        for rows in rows {
            let (tile, token) = (self.tile_of(rows.token, rows.kv_head), rows.token);
            let first_head = rows.kv_head * self.group;
            for head in 0..self.group {
                let log_sum_exp = finish(tile, self.row_of(head, token), &mut output);
                rows.write(head, &mut output, || log_sum_exp() + call.centre(first_head + head, token, &mut query));
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
            tile.finish_row(row, output);
            self.log_sum_exp[row] = tile.log_sum_exp(row);
        }
    }
}

/// Starts `tile` with the rows of `task`. Returns the keys that some row sees; empty when none does.
pub(crate) fn begin(tile: &mut AttentionTile, call: &Call<'_>, task: &Task) -> Range<usize> {
    let group = call.group();
    begin_rows(tile, call, group * task.tokens.len(), task.keys.clone(), |row| {
        let (head, token) = task.head_and_token(row);
        (task.kv_head * group + head, token)
    })
}

/// Fills `tile` with the rows of `task` and all keys of it that they see.
pub(crate) fn attend_to_all(tile: &mut AttentionTile, call: &Call<'_>, task: &Task) {
    let seen = begin(tile, call, task);
    if !seen.is_empty() {
        let first = block_start(call.cache, seen.start);
        HeadKeys::of(call, task).accumulate(tile, first..seen.end, |_| true);
    }
}

/// Queries are asked for so many rows before they are read: those of a head lie apart from one another, and a processor does
/// not foresee them.
const QUERIES_AHEAD: usize = 16;

/// As [`begin`], with `rows` rows, of which `query_of` gives the query head and the token, over those of `keys` that they
/// see.
pub(crate) fn begin_rows(
    tile: &mut AttentionTile,
    call: &Call<'_>,
    rows: usize,
    keys: Range<usize>,
    query_of: impl Fn(usize) -> (usize, usize),
) -> Range<usize> {
    let shape = call.cache.shape();
    let tile_shape = TileShape { rows, key_dim: shape.padded_key_dim(), value_dim: shape.padded_value_dim() };
    tile.begin_capped(InstructionSet::current(), tile_shape, call.cache.kind().empty_block(), call.soft_cap);
    let (mut low, mut high) = (usize::MAX, 0);
    let mut buffer = Vec::new();
    for row in 0..rows {
        if row + QUERIES_AHEAD < rows {
            let (head, token) = query_of(row + QUERIES_AHEAD);
            call.queries.fetch_row(head, token);
        }
        let (head, token) = query_of(row);
        let seen = call.seen(token);
        let (start, end) = (seen.start.max(keys.start), seen.end.min(keys.end));
        if start < end {
            (low, high) = (low.min(start), high.max(end));
        }
        tile.set_row(row, call.query(head, token, &mut buffer), call.attention.scale, (start, end));
    }
    low.min(high)..high
}

/// The keys of a head, to be walked over.
#[derive(Clone, Copy)]
pub(crate) struct HeadKeys<'a> {
    cache: &'a KeyValueCache,
    kv_head: usize,
    /// Whether keys must come at their own positions, as some query sees part of those that do not lie there.
    in_order: bool,
}

impl<'a> HeadKeys<'a> {
    /// Those of `task`.
    pub fn of(call: &Call<'a>, task: &Task) -> Self {
        Self::of_tokens(call, task.kv_head, std::iter::once(task.tokens.clone()))
    }

    /// Those of `kv_head`, for queries of any of `tokens`.
    pub fn of_tokens(call: &Call<'a>, kv_head: usize, tokens: impl IntoIterator<Item = Range<usize>>) -> Self {
        let together = tokens.into_iter().all(|tokens| call.sees_moved_together(kv_head, tokens));
        Self { cache: call.cache, kv_head, in_order: !together }
    }

    /// Adds the keys of `range` to the micro-tiles of `tile` that `wanted` names. The range starts at a page.
    pub fn accumulate(self, tile: &mut AttentionTile, range: Range<usize>, wanted: impl Fn(usize) -> bool) {
        let Self { cache, kv_head, .. } = self;
        let is_small = tile.micro_tiles().len() <= FEW_MICRO_TILES;
        let block_keys = if is_small { SEGMENT_KEYS } else { block_keys(cache) };
        // Blocks end where all would that start at a multiple of their size.
        let end_of = |first: usize| range.end.min((first / block_keys + 1) * block_keys);
        let keys_of = |first: usize| (end_of(first) - first).next_multiple_of(PAGE_KEYS);
        let moved = if self.in_order { cache.moved(kv_head) } else { 0..0 };
        let is_moved = |first: usize| first < moved.end && moved.start < end_of(first);
        let (mut first, mut buffer) = (range.start, None);
        while first < range.end {
            let next = end_of(first);
            if is_moved(first) {
                let block = cache.block_in_order(kv_head, first, keys_of(first), &mut buffer);
                tile.accumulate_in(first, block, None, tile.micro_tiles(), &wanted);
            } else {
                let block = |first: usize| cache.block(kv_head, first, keys_of(first));
                let next_block = (next < range.end).then(|| block(next));
                cache.fetch_segment(kv_head, next + SEGMENT_KEYS);
                tile.accumulate_in(first, block(first), next_block, tile.micro_tiles(), &wanted);
            }
            first = next;
        }
    }
}

/// Where a walk over keys that starts with `first` starts: at a block's first key.
pub(crate) fn block_start(cache: &KeyValueCache, first: usize) -> usize {
    first / block_keys(cache) * block_keys(cache)
}

/// Keys of a block for a prompt's rows: a divisor of a segment. A line of f32 holds half the keys that one of bf16 does and
/// takes twice the time, so that its blocks may have twice the bytes.
fn block_keys(cache: &KeyValueCache) -> usize {
    let shape = cache.shape();
    let width = shape.padded_key_dim() + shape.padded_value_dim();
    let bytes = match cache.kind() {
        KeyValueType::F32 | KeyValueType::Bf16 => 2 * width,
        KeyValueType::Int8 => width,
    };
    let fitting = (BLOCK_BYTES / bytes).clamp(64, MOST_BLOCK_KEYS);
    1 << fitting.ilog2()
}

/// Output of a row over all ranges of keys: the parts' outputs weighted by their share of the softmax sum. Returns the
/// row's log-sum-exp.
pub(crate) fn merge<'a>(parts: impl Iterator<Item = &'a Part> + Clone, row: usize, output: &mut [f32]) -> f32 {
    let range = row * output.len()..(row + 1) * output.len();
    // What is no number in one part is none in the whole.
    let larger = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
    let largest = parts.clone().map(|part| part.log_sum_exp[row]).fold(f32::NEG_INFINITY, larger);
    output.fill(0.0);
    if largest == f32::NEG_INFINITY {
        return largest;
    }
    // Shares of the sum itself: those of its logarithm would not add up to one where that is a large number.
    let weight = |part: &Part| (part.log_sum_exp[row] - largest).exp();
    let sum: f32 = parts.clone().map(weight).sum();
    for part in parts {
        let share = weight(part) / sum;
        if share != 0.0 {
            output.iter_mut().zip(&part.output[range.clone()]).for_each(|(target, value)| *target += share * value);
        }
    }
    largest + sum.ln()
}
