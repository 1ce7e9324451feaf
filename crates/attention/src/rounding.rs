//! Whether a call on a caller's arrays may read its keys and values rounded to a narrower type: tried on a few rows.
//!
//! Integers are attended to two to three times as fast as f32, and what a query may miss leaves room for their rounding
//! in most models, but not in all of them (keys with a few very large channels). So the rounded keys and values are
//! made, some queries attend to them and to the caller's own, and the difference decides.

use iceformer_kernels::InstructionSet;
use iceformer_kernels::rows::{ROW_MULTIPLE, Rows, add_weighted_rows, dot_rows};
use iceformer_kernels::softmax::softmax_in_place;

use crate::budgeted::distance;
use crate::exact::{self, AttentionScratch};
use crate::output::Output;
use crate::tiles::Call;
use crate::{Arrays, KeyValueType, StridedView, ThreadTeam};

/// Budget from which rounding is tried: with integers a row of the reference model misses .003 (median) to .012 (99th
/// percentile), and some of its heads more.
const LEAST_BUDGET: f32 = 0.02;
/// What rounding may take of the budget of a row. Errors of both kinds are independent, so that .87 of it is left to the
/// other.
const BUDGET_SHARE: f32 = 0.5;
/// One row of so many may take more, up to all of its budget.
const ROWS_FOR_ONE_ABOVE: usize = 50;
/// Queries that are tried, beside the last.
const PLACES: usize = 16;
/// Keys read at a time.
const BLOCK_KEYS: usize = 128;
/// Values whose spread stands for that of all, at least.
const SPREAD_VALUES: usize = 1024;

/// The type in which keys and values of type `precise` are attended to faster on this machine, where rounding to it may
/// be within `budget`.
pub(crate) fn faster_type(precise: KeyValueType, budget: f32) -> Option<KeyValueType> {
    let level = InstructionSet::current();
    let faster = match level {
        _ if budget < LEAST_BUDGET || level < InstructionSet::Avx512Vnni => return None,
        InstructionSet::Amx => KeyValueType::Bf16,
        _ => KeyValueType::Int8,
    };
    match (precise, faster) {
        (KeyValueType::F32, _) | (KeyValueType::Bf16, KeyValueType::Int8) => Some(faster),
        _ => None,
    }
}

/// Whether the rows that are tried miss little enough of `budget` when they read the keys and values of `arrays` as
/// `call.cache` has them.
pub(crate) fn is_within(
    budget: f32,
    arrays: &Arrays<'_>,
    call: &Call<'_>,
    team: &ThreadTeam,
    scratch: &mut AttentionScratch,
) -> bool {
    let [batch, heads, tokens, _] = call.queries.shape();
    let value_dim = call.cache.shape().value_dim;
    let mut places: Vec<usize> = (0..PLACES).map(|place| (2 * place + 1) * tokens / (2 * PLACES)).collect();
    places.push(tokens - 1);
    places.dedup();
    let mut rounded = vec![0.0_f32; places.len() * batch * heads * value_dim];
    for (&token, output) in places.iter().zip(rounded.chunks_exact_mut(batch * heads * value_dim)) {
        let output = Output::new(output, [batch, 1, heads, value_dim], None);
        exact::run(&call.part(token..token + 1), output, team, scratch);
    }
    // Of each key/value head: rows above their share, and whether one is above its budget.
    let mut above = vec![(0, false); call.cache.shape().kv_heads];
    team.run_chunks(&mut above, 1, |kv_head, above, _| {
        let (rows_above, one_is_lost) = &mut above[0];
        let unit = std::f32::consts::SQRT_2 * spread(&arrays.values, kv_head);
        for (&token, rounded) in places.iter().zip(rounded.chunks_exact(batch * heads * value_dim)) {
            let rounded = rounded[kv_head * call.group() * value_dim..].chunks_exact(value_dim);
            for (truth, rounded) in attend(arrays, call, kv_head, token).iter().zip(rounded) {
                let missed = distance(&truth[..value_dim], rounded) / unit;
                // Never where all values are alike or one is no number: no distance is small then.
                let is_within = |most: f32| missed <= most;
                *rows_above += usize::from(!is_within(BUDGET_SHARE * budget));
                *one_is_lost |= !is_within(budget);
            }
        }
    });
    let rows_above: usize = above.iter().map(|(rows, _)| rows).sum();
    rows_above <= places.len() * batch * heads / ROWS_FOR_ONE_ABOVE
        && !above.iter().any(|(_, one_is_lost)| *one_is_lost)
}

/// What the query heads that read `kv_head` give for query `token` with the keys and values as the caller has them, by
/// the definition: `[group][value_dim, filled up]`.
fn attend(arrays: &Arrays<'_>, call: &Call<'_>, kv_head: usize, token: usize) -> Vec<Vec<f32>> {
    let shape = call.cache.shape();
    let key_width = shape.key_dim.next_multiple_of(ROW_MULTIPLE);
    let value_width = shape.value_dim.next_multiple_of(ROW_MULTIPLE);
    let seen = call.seen(token);
    let group = kv_head * call.group()..(kv_head + 1) * call.group();
    let queries: Vec<Vec<f32>> = group
        .map(|head| {
            let mut query = vec![0.0; key_width];
            call.queries.read_row(head, token, &mut query[..shape.key_dim]);
            query.iter_mut().for_each(|value| *value *= call.attention.scale);
            query
        })
        .collect();
    let mut weights = vec![vec![0.0; seen.len()]; queries.len()];
    let mut outputs = vec![vec![0.0; value_width]; queries.len()];
    let mut block = vec![0.0; BLOCK_KEYS * key_width.max(value_width)];
    let blocks = || seen.clone().step_by(BLOCK_KEYS).map(|first| first..seen.end.min(first + BLOCK_KEYS));
    for keys in blocks() {
        let of_block = keys.start - seen.start..keys.end - seen.start;
        let keys = read_rows(&arrays.keys, kv_head, keys, key_width, &mut block);
        for (query, weights) in queries.iter().zip(&mut weights) {
            dot_rows(query, keys, &mut weights[of_block.clone()]);
        }
    }
    weights.iter_mut().for_each(|weights| _ = softmax_in_place(weights));
    for keys in blocks() {
        let of_block = keys.start - seen.start..keys.end - seen.start;
        let values = read_rows(&arrays.values, kv_head, keys, value_width, &mut block);
        for (weights, output) in weights.iter().zip(&mut outputs) {
            add_weighted_rows(output, &weights[of_block.clone()], values);
        }
    }
    outputs
}

/// The rows of `tokens`, filled up with zeros to `width`.
fn read_rows<'a>(
    view: &StridedView<'_>,
    head: usize,
    tokens: std::ops::Range<usize>,
    width: usize,
    block: &'a mut [f32],
) -> Rows<'a> {
    let [.., own_width] = view.shape();
    let block = &mut block[..tokens.len() * width];
    for (token, row) in tokens.zip(block.chunks_exact_mut(width)) {
        let (row, rest) = row.split_at_mut(own_width);
        view.read_row(head, token, row);
        rest.fill(0.0);
    }
    Rows::F32(block)
}

/// Root-mean-square distance of the values of a head from their mean.
fn spread(values: &StridedView<'_>, head: usize) -> f32 {
    let [.., tokens, width] = values.shape();
    let (mut sum, mut squares, mut count) = (vec![0.0_f64; width], 0.0_f64, 0.0_f64);
    let mut row = vec![0.0; width];
    for token in (0..tokens).step_by((tokens / SPREAD_VALUES).max(1)) {
        values.read_row(head, token, &mut row);
        for (sum, &value) in sum.iter_mut().zip(&row) {
            *sum += f64::from(value);
            squares += f64::from(value).powi(2);
        }
        count += 1.0;
    }
    let mean_square: f64 = sum.iter().map(|sum| (sum / count).powi(2)).sum();
    let variance = squares / count - mean_square;
    // Where all values are alike, what is left of the difference is rounding.
    if variance > 1e-12 * mean_square { variance.sqrt() as f32 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Elements;

    #[test]
    fn values_spread_around_their_mean() {
        // Two values, two channels: (1, 5) and (3, 5), one from the mean each.
        let memory = [1.0, 5.0, 3.0, 5.0];
        let view = |tokens| StridedView::new(Elements::F32(&memory), [1, 1, tokens, 2], [4, 4, 2, 1]).unwrap();
        assert!((spread(&view(2), 0) - 1.0).abs() < 1e-6);
        assert_eq!(spread(&view(1), 0), 0.0);
    }

    #[test]
    fn a_small_budget_leaves_no_room() {
        let level = InstructionSet::current();
        let faster = faster_type(KeyValueType::F32, 0.05);
        match level {
            InstructionSet::Amx => assert_eq!(faster, Some(KeyValueType::Bf16)),
            level if level >= InstructionSet::Avx512Vnni => assert_eq!(faster, Some(KeyValueType::Int8)),
            _ => assert_eq!(faster, None),
        }
        assert_eq!(faster_type(KeyValueType::F32, 0.01), None);
        assert_eq!(faster_type(KeyValueType::Int8, 0.05), None);
    }
}
