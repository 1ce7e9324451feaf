//! Stretches a dump to any length by repeating it.
//!
//! Position `p` of a sequence of `N` tokens takes its query, key and value from one token of a dump of `n`: the first
//! `N mod n` positions from the dump's first tokens, then whole copies follow. So the sequence starts with the tokens
//! that heads use as sinks, ends where the dump ends, and the neighbours of a token are its neighbours in the dump.
//!
//! Repeating means that every key comes about `N / n` times: a weight of the dump is spread over as many equal keys, the
//! share of keys that carry a given mass stays what it was at length `n`, and the number of keys grows with `N`. Keys of
//! earlier copies carry the rotation of their place in the dump, so queries see them as near as there. Noise makes the
//! copies of a key differ.

use std::ops::Range;

use crate::dump::Layer;
use crate::random::Random;
use crate::{Inputs, Shape};

/// A layer stretched to `tokens` keys, with the queries of the last `queries` of them. To each channel of the keys and
/// values of every copy but the last, normal noise of `noise` times the channel's standard deviation in the dump is
/// added; the same seed gives the same noise.
///
/// # Panics
/// When there are more queries than tokens.
pub fn tile(layer: &Layer, tokens: usize, queries: usize, noise: f32, seed: u64) -> (Inputs, Shape) {
    assert!(queries <= tokens, "queries are the last tokens");
    let Shape { query_heads, kv_heads, key_dim, value_dim, key_tokens: length, .. } = layer.shape;
    let Inputs { queries: from_queries, keys: from_keys, values: from_values } = &layer.inputs;
    let inputs = Inputs {
        queries: repeat(from_queries, query_heads * key_dim, length, tokens, tokens - queries..tokens),
        keys: noisy(from_keys, kv_heads * key_dim, length, tokens, noise, &mut Random::new(seed)),
        values: noisy(from_values, kv_heads * value_dim, length, tokens, noise, &mut Random::new(!seed)),
    };
    (inputs, Shape { query_tokens: queries, key_tokens: tokens, ..layer.shape })
}

/// Token of a dump of `length` that position `position` of a sequence of `tokens` takes.
fn token(position: usize, length: usize, tokens: usize) -> usize {
    let partial = tokens % length;
    if position < partial { position } else { (position - partial) % length }
}

fn repeat(data: &[f32], width: usize, length: usize, tokens: usize, positions: Range<usize>) -> Vec<f32> {
    let mut repeated = Vec::with_capacity(positions.len() * width);
    for position in positions {
        repeated.extend_from_slice(&data[token(position, length, tokens) * width..][..width]);
    }
    repeated
}

fn noisy(data: &[f32], width: usize, length: usize, tokens: usize, noise: f32, random: &mut Random) -> Vec<f32> {
    let mut repeated = repeat(data, width, length, tokens, 0..tokens);
    if noise > 0.0 && tokens > length {
        let deviations: Vec<f32> = channel_deviations(data, width).iter().map(|deviation| noise * deviation).collect();
        for row in repeated.chunks_exact_mut(width).take(tokens - length) {
            row.iter_mut().zip(&deviations).for_each(|(value, deviation)| *value += deviation * random.normal() as f32);
        }
    }
    repeated
}

/// Standard deviation of each column of `data` `[tokens, width]`.
fn channel_deviations(data: &[f32], width: usize) -> Vec<f32> {
    let count = (data.len() / width) as f64;
    let (mut sums, mut squares) = (vec![0.0; width], vec![0.0; width]);
    for row in data.chunks_exact(width) {
        for (channel, &value) in row.iter().enumerate() {
            sums[channel] += f64::from(value);
            squares[channel] += f64::from(value).powi(2);
        }
    }
    let variance = |(sum, square): (&f64, &f64)| (square / count - (sum / count).powi(2)).max(0.0);
    sums.iter().zip(&squares).map(|pair| variance(pair).sqrt() as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One head of width 1 whose query, key and value of token `t` are `t`, `10 + t` and `20 + t`.
    fn layer(tokens: usize) -> Layer {
        let numbers = |from: usize| (from..from + tokens).map(|number| number as f32).collect();
        Layer {
            inputs: Inputs { queries: numbers(0), keys: numbers(10), values: numbers(20) },
            shape: Shape {
                query_tokens: tokens,
                key_tokens: tokens,
                query_heads: 1,
                kv_heads: 1,
                key_dim: 1,
                value_dim: 1,
            },
            scale: 1.0,
            causal: true,
            window: None,
        }
    }

    #[test]
    fn copies_start_with_the_first_tokens_and_end_with_the_last() {
        let (inputs, shape) = tile(&layer(3), 8, 4, 0.0, 0);
        assert_eq!((shape.key_tokens, shape.query_tokens), (8, 4));
        assert_eq!(inputs.keys, [10.0, 11.0, 10.0, 11.0, 12.0, 10.0, 11.0, 12.0]);
        assert_eq!(inputs.values, [20.0, 21.0, 20.0, 21.0, 22.0, 20.0, 21.0, 22.0]);
        assert_eq!(inputs.queries, [2.0, 0.0, 1.0, 2.0]);
        let (shorter, _) = tile(&layer(3), 2, 1, 0.5, 0);
        assert_eq!((shorter.keys, shorter.queries), (vec![10.0, 11.0], vec![1.0]));
    }

    #[test]
    fn noise_is_in_proportion_and_spares_the_last_copy() {
        let (plain, noisy) = (tile(&layer(100), 50_000, 1, 0.0, 1).0, tile(&layer(100), 50_000, 1, 0.1, 1).0);
        assert_eq!(plain.keys[49_900..], noisy.keys[49_900..]);
        let squares: f32 = plain.keys.iter().zip(&noisy.keys).map(|(a, b)| (a - b).powi(2)).sum();
        let deviation = (squares / 49_900.0).sqrt();
        assert!((deviation / (0.1 * 28.866) - 1.0).abs() < 0.02, "{deviation}");
        assert_eq!(noisy, tile(&layer(100), 50_000, 1, 0.1, 1).0);
        assert_ne!(noisy, tile(&layer(100), 50_000, 1, 0.1, 2).0);
    }
}
