//! Whether a call on a caller's arrays may read its keys and values rounded to a narrower type: tried on a few rows.
//!
//! Integers are attended to 1.4 (AVX2) to three times as fast as f32, and what a query may miss leaves room for their rounding
//! in most models, but not in all of them (keys with a few very large channels). So the rounded keys and values are
//! made, some queries attend to them and to the caller's own, and the difference decides.

use std::ops::Range;

use iceformer_kernels::InstructionSet;
use iceformer_kernels::rows::{ROW_MULTIPLE, Rows, add_weighted_rows, dot_rows};
use iceformer_kernels::softmax::softmax_in_place;

use crate::budgeted::{anywhere_in, distance, share_of_allowed};
use crate::exact::{self, AttentionScratch};
use crate::output::Output;
use crate::tiles::Call;
use crate::{Arrays, CacheShape, KeyValueType, StridedView, ThreadTeam};

/// Budget from which rounding is tried: with integers a row of the reference model misses .003 (median) to .012 (99th
/// percentile), and some of its heads more.
const LEAST_BUDGET: f32 = 0.02;
/// Queries from which a trial is little beside the call.
const LEAST_QUERIES: usize = 512;
/// What rounding may take of the budget of a row.
const BUDGET_SHARE: f32 = 0.5;
/// One row of a head may take more, up to all of its budget.
const ROWS_ABOVE: usize = 1;
/// Queries that are tried: …
const PLACES: usize = 17;
/// … so many of them the longest beside others of their head, as what rounding makes of a logit grows with the query.
const LONGEST: usize = 4;
/// Keys that such a query sees at least.
const LEAST_SEEN: usize = 64;
/// Keys read at a time.
const BLOCK_KEYS: usize = 128;
/// Values whose spread stands for that of all, at least.
const SPREAD_VALUES: usize = 1024;

/// What of `budget` is left to the clusters of a call that reads rounded keys and values: errors of both kinds are
/// independent, so that their squares add up.
pub(crate) fn rest_of(budget: f32) -> f32 {
    budget * (1.0 - BUDGET_SHARE * BUDGET_SHARE).sqrt()
}

/// The type in which keys and values of type `precise` are attended to faster on this machine, where rounding to it may
/// be within `budget` and a trial is worth it for `queries`.
pub(crate) fn faster_type(precise: KeyValueType, budget: f32, queries: usize) -> Option<KeyValueType> {
    let level = InstructionSet::current();
    let faster = match level {
        _ if budget < LEAST_BUDGET || queries < LEAST_QUERIES => return None,
        // AVX-512 multiplies f32 as fast as AVX2 does integers.
        InstructionSet::Portable | InstructionSet::Avx512 => return None,
        InstructionSet::Amx => KeyValueType::Bf16,
        _ => KeyValueType::Int8,
    };
    match (precise, faster) {
        (KeyValueType::F32, _) | (KeyValueType::Bf16, KeyValueType::Int8) => Some(faster),
        _ => None,
    }
}

/// Whether the rows that are tried miss little enough of `budget` when they read the keys and values of `arrays`, which
/// has no sinks, as `call.cache` has them.
pub(crate) fn is_within(
    budget: f32,
    arrays: &Arrays<'_>,
    call: &Call<'_>,
    team: &ThreadTeam,
    scratch: &mut AttentionScratch,
) -> bool {
    let [batch, heads, tokens, _] = call.queries.shape();
    let CacheShape { kv_heads, value_dim, .. } = call.cache.shape();
    // Padding says nothing of the others.
    let seeing: Vec<usize> = (0..tokens).filter(|token| call.seen(*token).len() >= LEAST_SEEN).collect();
    if seeing.len() < PLACES {
        return false;
    }
    let mut places = longest_queries(call, &seeing, team);
    let stretches = PLACES - places.len();
    places.extend((0..stretches).map(|stretch| {
        let (first, end) = (stretch * seeing.len() / stretches, (stretch + 1) * seeing.len() / stretches);
        seeing[first + anywhere_in(stretch, end - first)]
    }));
    let mut rounded = vec![0.0_f32; PLACES * batch * heads * value_dim];
    for (&token, output) in places.iter().zip(rounded.chunks_exact_mut(batch * heads * value_dim)) {
        let output = Output::new(output, [batch, 1, heads, value_dim], None);
        exact::run(&call.part(token..token + 1), output, team, scratch);
    }
    // Of each place and key/value head, and each query head that reads it.
    let group = call.group();
    let mut shares = vec![vec![f32::INFINITY; group]; PLACES * kv_heads];
    team.run_chunks(&mut shares, 1, |task, shares, _| {
        let (place, kv_head) = (task / kv_heads, task % kv_heads);
        let unit = std::f32::consts::SQRT_2 * spread(&arrays.values, kv_head, call.seen(places[place]));
        let truth = attend(arrays, call, kv_head, places[place]);
        let rounded = rounded[(place * kv_heads + kv_head) * group * value_dim..].chunks_exact(value_dim);
        for ((share, truth), rounded) in shares[0].iter_mut().zip(&truth).zip(rounded) {
            let truth = &truth[..value_dim];
            *share = share_of_allowed(distance(truth, rounded) / unit, truth, budget, unit);
        }
    });
    (0..kv_heads * group).all(|head| {
        let shares = (0..PLACES).map(|place| shares[place * kv_heads + head / group][head % group]);
        let above = shares.clone().filter(|share| *share > BUDGET_SHARE).count();
        above <= ROWS_ABOVE && shares.clone().all(|share| share <= 1.0)
    })
}

/// Those of `tokens` with the longest queries of some head, in relation to its root mean square length.
fn longest_queries(call: &Call<'_>, tokens: &[usize], team: &ThreadTeam) -> Vec<usize> {
    let [batch, heads, _, width] = call.queries.shape();
    let mut squares = vec![vec![0.0_f32; tokens.len()]; batch * heads];
    team.run_chunks(&mut squares, 1, |head, squares, _| {
        let (squares, mut query) = (&mut squares[0], vec![0.0; width]);
        for (square, token) in squares.iter_mut().zip(tokens) {
            call.queries.read_row(head, *token, &mut query);
            *square = query.iter().map(|value| value * value).sum();
        }
        let mean = squares.iter().map(|square| f64::from(*square)).sum::<f64>() / tokens.len() as f64;
        squares.iter_mut().for_each(|square| *square = (f64::from(*square) / mean) as f32);
    });
    let longest = |place: usize| squares.iter().map(|squares| squares[place]).fold(0.0, f32::max);
    let mut lengths: Vec<(f32, usize)> =
        tokens.iter().enumerate().map(|(place, token)| (longest(place), *token)).collect();
    lengths.sort_by(|a, b| b.0.total_cmp(&a.0));
    lengths.truncate(LONGEST);
    lengths.into_iter().map(|(_, token)| token).collect()
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
    tokens: Range<usize>,
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

/// Root-mean-square distance of the values `seen` of a head from their mean.
fn spread(values: &StridedView<'_>, head: usize, seen: Range<usize>) -> f32 {
    let [.., width] = values.shape();
    let (mut sum, mut squares, mut count) = (vec![0.0_f64; width], 0.0_f64, 0.0_f64);
    let mut row = vec![0.0; width];
    for token in seen.clone().step_by((seen.len() / SPREAD_VALUES).max(1)) {
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
        assert!((spread(&view(2), 0, 0..2) - 1.0).abs() < 1e-6);
        assert_eq!(spread(&view(2), 0, 1..2), 0.0);
    }

    #[test]
    fn a_small_budget_leaves_no_room_and_few_queries_are_not_worth_it() {
        let level = InstructionSet::current();
        let faster = faster_type(KeyValueType::F32, 0.05, 512);
        match level {
            InstructionSet::Amx => assert_eq!(faster, Some(KeyValueType::Bf16)),
            level if level == InstructionSet::Avx2 || level >= InstructionSet::Avx512Vnni => {
                assert_eq!(faster, Some(KeyValueType::Int8));
            }
            _ => assert_eq!(faster, None),
        }
        assert_eq!(faster_type(KeyValueType::F32, 0.01, 512), None);
        assert_eq!(faster_type(KeyValueType::F32, 0.05, 511), None);
        assert_eq!(faster_type(KeyValueType::Int8, 0.05, 512), None);
        assert!((rest_of(0.04) - 0.04 * 0.75_f32.sqrt()).abs() < 1e-9);
    }
}
