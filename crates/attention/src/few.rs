//! Exact attention of a few queries on a caller's rows, where they lie.
//!
//! A decode step reads every key and value once, which takes as long as the memory does; packing them first would
//! read and write them once more. The rows are used in place: f32 and bf16 as they are, f16 widened block by block.

use std::ops::Range;
use std::sync::Mutex;

use iceformer_kernels::half::f16;
use iceformer_kernels::half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use iceformer_kernels::rows::{self, ROW_MULTIPLE, add_weighted_rows, dot_rows};
use iceformer_kernels::softmax::{soft_cap_in_place, softmax_in_place};

use crate::output::Output;
use crate::strided::FromF32;
use crate::tiles::Part;
use crate::{Arrays, Attention, Elements, HeadReport, Report, ThreadTeam};

/// Most query rows of a key/value head: above, packing pays, because the tiled kernel reads each key for six rows.
const MOST_ROWS: usize = 16;
/// Most query tokens.
const MOST_TOKENS: usize = 4;
/// Keys that one task reads at least, where heads alone do not make tasks enough.
const RANGE_KEYS: usize = 1024;
/// Tasks wanted.
const WANTED_TASKS: usize = 32;
/// Bytes of the keys of a block, which stay in the first-level cache for all query rows.
const BLOCK_BYTES: usize = 16 * 1024;

/// Arrays that can be read in place.
pub(crate) struct Rows<'a> {
    arrays: Arrays<'a>,
}

impl<'a> Rows<'a> {
    /// The arrays, when there are few queries and every head's keys and values lie row behind row. A type to pack in is
    /// passed over: nothing is packed, and nothing rounded.
    pub(crate) fn new(arrays: &Arrays<'a>) -> Option<Self> {
        let [_, heads, tokens, key_dim] = arrays.queries.shape();
        let [_, kv_heads, _, value_dim] = arrays.values.shape();
        let few = tokens <= MOST_TOKENS && tokens * (heads / kv_heads) <= MOST_ROWS;
        let whole_vectors = key_dim.is_multiple_of(ROW_MULTIPLE) && value_dim.is_multiple_of(ROW_MULTIPLE);
        let in_place = arrays.keys.head_rows(0).is_some() && arrays.values.head_rows(0).is_some();
        (few && whole_vectors && in_place).then_some(Self { arrays: *arrays })
    }
}

/// Buffers reused from call to call.
#[derive(Default)]
pub(crate) struct FewScratch {
    /// One per thread.
    tasks: Vec<Mutex<TaskScratch>>,
    /// One per task.
    parts: Vec<Part>,
}

#[derive(Default)]
struct TaskScratch {
    /// Query rows times the scale, `[rows][key_dim]`.
    queries: Vec<f32>,
    /// f16 only: a block of keys or values, widened.
    widened: Vec<f32>,
    weights: Vec<f32>,
    /// `[value_dim]`
    sum: Vec<f32>,
    /// What each row sees of the task's range.
    seen: Vec<Range<usize>>,
    /// Weights of a block of all rows, `[rows][block]`.
    rows: Vec<f32>,
}

impl Part {
    /// Takes in `sum`, the output of row `row` over more keys, whose log-sum-exp is `more`.
    fn merge(&mut self, row: usize, sum: &[f32], more: f32) {
        if more == f32::NEG_INFINITY {
            return;
        }
        let before = self.log_sum_exp[row];
        let output = &mut self.output[row * sum.len()..(row + 1) * sum.len()];
        if before == f32::NEG_INFINITY {
            self.log_sum_exp[row] = more;
            output.copy_from_slice(sum);
            return;
        }
        let largest = if more > before { more } else { before };
        let (old, new) = ((before - largest).exp(), (more - largest).exp());
        // Shares of the sum itself: those of its logarithm would not add up to one where that is a large number.
        let sum_of_both = old + new;
        let (old, new) = (old / sum_of_both, new / sum_of_both);
        output.iter_mut().zip(sum).for_each(|(output, value)| *output = *output * old + value * new);
        self.log_sum_exp[row] = largest + sum_of_both.ln();
    }
}

/// Writes `output`.
pub(crate) fn run<T: FromF32>(
    attention: &Attention,
    rows: &Rows<'_>,
    output: Output<'_, T>,
    team: &ThreadTeam,
    scratch: &mut FewScratch,
) -> Report {
    let arrays = &rows.arrays;
    let [batch, heads, tokens, _] = arrays.queries.shape();
    let [_, kv_heads, keys, value_dim] = arrays.values.shape();
    let (row_heads, group) = (batch * heads, heads / kv_heads);
    let visible = |token: usize| attention.mask.visible(arrays.first_position + token, keys);
    // A window may begin behind the last key.
    let low = (0..tokens).map(|token| visible(token).start).min().unwrap_or(0).min(keys);
    let high = (0..tokens).map(|token| visible(token).end).max().unwrap_or(0).clamp(low, keys);

    let wanted = WANTED_TASKS.div_ceil(batch * kv_heads);
    let range_keys = (high - low).div_ceil(wanted).max(RANGE_KEYS);
    let ranges = (high - low).div_ceil(range_keys).max(1);
    let tasks = batch * kv_heads * ranges;
    scratch.tasks.resize_with(team.threads(), Mutex::default);
    if scratch.parts.len() < tasks {
        scratch.parts.resize_with(tasks, Part::default);
    }
    team.run_chunks(&mut scratch.parts[..tasks], 1, |task, part, worker| {
        let mut task_scratch = scratch.tasks[worker].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let first = low + task % ranges * range_keys;
        let range = first..high.min(first + range_keys);
        run_task(attention, arrays, task / ranges, range, &mut part[0], &mut task_scratch);
    });

    for mut rows in output.into_rows(group) {
        let parts = &mut scratch.parts[rows.kv_head * ranges..(rows.kv_head + 1) * ranges];
        let (total, others) = parts.split_first_mut().expect("at least one range");
        for head in 0..group {
            let row = head * tokens + rows.token;
            let numbers = row * value_dim..(row + 1) * value_dim;
            for other in &*others {
                total.merge(row, &other.output[numbers.clone()], other.log_sum_exp[row]);
            }
            let log_sum_exp = total.log_sum_exp[row];
            rows.write(head, &mut total.output[numbers], || log_sum_exp);
        }
    }
    let allowed = (0..tokens).map(|token| visible(token).len() as u64).sum();
    Report::of_heads(row_heads, &HeadReport::exact(tokens, allowed))
}

/// All query rows of row key/value head `kv_head` over `range`.
fn run_task(
    attention: &Attention,
    arrays: &Arrays<'_>,
    kv_head: usize,
    range: Range<usize>,
    part: &mut Part,
    scratch: &mut TaskScratch,
) {
    let [_, heads, tokens, key_dim] = arrays.queries.shape();
    let [_, kv_heads, keys, value_dim] = arrays.values.shape();
    let group = heads / kv_heads;
    let count = group * tokens;
    part.output.clear();
    part.output.resize(count * value_dim, 0.0);
    part.log_sum_exp.clear();
    part.log_sum_exp.resize(count, f32::NEG_INFINITY);
    scratch.sum.resize(value_dim, 0.0);
    scratch.queries.resize(count * key_dim, 0.0);
    scratch.seen.clear();
    for (row, query) in scratch.queries.chunks_exact_mut(key_dim).enumerate() {
        let (head, token) = (kv_head * group + row / tokens, row % tokens);
        arrays.queries.read_row(head, token, query);
        query.iter_mut().for_each(|value| *value *= attention.scale);
        let seen = attention.mask.visible(arrays.first_position + token, keys);
        scratch.seen.push(seen.start.max(range.start)..seen.end.min(range.end));
    }
    let (Some(key_rows), Some(value_rows)) = (arrays.keys.head_rows(kv_head), arrays.values.head_rows(kv_head)) else {
        unreachable!("checked by `Rows::new`")
    };
    let block = (BLOCK_BYTES / (4 * key_dim)).max(16);
    scratch.rows.resize(count * block, 0.0);
    for first in range.clone().step_by(block) {
        let of_block = first..range.end.min(first + block);
        let overlap = |seen: &Range<usize>| {
            let start = seen.start.max(of_block.start);
            start..seen.end.min(of_block.end).max(start)
        };
        let keys = block_rows(key_rows, of_block.clone(), key_dim, &mut scratch.widened);
        for (row, seen) in scratch.seen.iter().enumerate() {
            let seen = overlap(seen);
            let query = &scratch.queries[row * key_dim..(row + 1) * key_dim];
            let scores = &mut scratch.rows[row * block..][..seen.len()];
            dot_rows(query, from(keys, (seen.start - first) * key_dim), scores);
            if let Some(limit) = arrays.soft_cap {
                soft_cap_in_place(scores, limit);
            }
        }
        let values = block_rows(value_rows, of_block.clone(), value_dim, &mut scratch.widened);
        for (row, seen) in scratch.seen.iter().enumerate() {
            let seen = overlap(seen);
            scratch.weights.clear();
            scratch.weights.extend_from_slice(&scratch.rows[row * block..][..seen.len()]);
            let log_sum_exp = softmax_in_place(&mut scratch.weights);
            scratch.sum.fill(0.0);
            add_weighted_rows(&mut scratch.sum, &scratch.weights, from(values, (seen.start - first) * value_dim));
            part.merge(row, &scratch.sum, log_sum_exp);
        }
    }
}

/// Rows `range` of `[rows][width]`.
fn block_rows<'a>(
    elements: Elements<'a>,
    range: Range<usize>,
    width: usize,
    widened: &'a mut Vec<f32>,
) -> rows::Rows<'a> {
    let numbers = range.start * width..range.end * width;
    match elements {
        Elements::F32(values) => rows::Rows::F32(&values[numbers]),
        Elements::Bf16(bits) => rows::Rows::Bf16(&bits[numbers]),
        Elements::F16(bits) => {
            widened.resize(numbers.len(), 0.0);
            bits[numbers].reinterpret_cast::<f16>().convert_to_f32_slice(widened);
            rows::Rows::F32(widened)
        }
    }
}

/// `rows` without the first `skipped` numbers.
fn from(rows: rows::Rows<'_>, skipped: usize) -> rows::Rows<'_> {
    match rows {
        rows::Rows::F32(values) => rows::Rows::F32(&values[skipped.min(values.len())..]),
        rows::Rows::Bf16(bits) => rows::Rows::Bf16(&bits[skipped.min(bits.len())..]),
    }
}
