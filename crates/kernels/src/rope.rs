//! Rotary position embedding ([Su et al. 2021](https://arxiv.org/abs/2104.09864)) in the half-split order of Hugging
//! Face models: feature `i` turns with feature `i + rotary_dim / 2`.

use std::f64::consts::PI;

use crate::elementwise::row_groups;
use crate::simd::{self, Operation, Simd};
use crate::{InstructionSet, ThreadTeam};

/// How the frequencies of a longer context follow from those trained first.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// How much longer the context became.
        factor: f64,
    },
    /// Long wavelengths divided by `factor`, short ones kept, blended between (Llama 3.1).
    Llama3 {
        /// How much longer the context became.
        factor: f64,
        /// Wavelengths above `original_context / low_frequency_factor` are divided by the factor.
        low_frequency_factor: f64,
        /// Wavelengths below `original_context / high_frequency_factor` are kept.
        high_frequency_factor: f64,
        /// Context in tokens before the extension.
        original_context: f64,
    },
    /// YaRN ([Peng et al. 2023](https://arxiv.org/abs/2309.00071)).
    Yarn {
        /// How much longer the context became.
        factor: f64,
        /// Context in tokens before the extension.
        original_context: f64,
        /// Turns within the original context above which a frequency is kept (32 in the paper).
        beta_fast: f64,
        /// Turns within the original context below which a frequency is divided by the factor (1 in the paper).
        beta_slow: f64,
        /// Factor on queries and keys, see [`yarn_attention_factor`].
        attention_factor: f64,
        /// Whether the limits of the blend are rounded to whole features, as by default in transformers.
        truncate: bool,
    },
    /// Each frequency divided by its factor, `[rotary_dim / 2]` (tensor `rope_freqs.weight` of GGUF files).
    Factors(Vec<f64>),
}

/// The factor YaRN puts on queries and keys: `0.1 · mscale · ln(factor) + 1` (1 where `factor ≤ 1`), and the ratio of
/// the two where both `mscale` and `mscale_all_dim` are given and not zero.
pub fn yarn_attention_factor(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
    let one = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    match (mscale, mscale_all_dim) {
        (Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => one(mscale) / one(all),
        _ => one(1.0),
    }
}

/// Frequencies of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// Radians per position, `[rotary_dim / 2]`.
    inverse_frequencies: Vec<f64>,
    /// Factor on cosines and sines.
    attention_factor: f64,
}

/// What is wrong with the settings given to [`RopeTable::new`].
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum RopeError {
    /// The rotary width is zero or odd.
    #[error("a rotary width of {0}; expected an even number above zero")]
    Width(usize),
    /// A number that must be finite and above zero is not.
    #[error("rope {name} is {value}; expected a finite number above zero")]
    Value {
        /// Name of the setting.
        name: &'static str,
        /// Value given.
        value: f64,
    },
    /// The factors do not fit the width.
    #[error("{given} rope factors; expected {expected}, one for each pair of features")]
    Factors {
        /// Factors given.
        given: usize,
        /// Half of the rotary width.
        expected: usize,
    },
}

impl RopeTable {
    /// Frequencies `theta^(−2i / rotary_dim)`, scaled.
    ///
    /// # Errors
    /// When the width is zero or odd, a number is not finite and above zero, or the factors have another length.
    pub fn new(rotary_dim: usize, theta: f64, scaling: &RopeScaling) -> Result<Self, RopeError> {
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(RopeError::Width(rotary_dim));
        }
        positive("theta", theta)?;
        let pairs = rotary_dim / 2;
        let plain = |pair: usize| theta.powf(-((2 * pair) as f64) / rotary_dim as f64);
        let mut attention_factor = 1.0;
        let inverse_frequencies: Vec<f64> = match *scaling {
            RopeScaling::None => (0..pairs).map(plain).collect(),
            RopeScaling::Linear { factor } => {
                positive("factor", factor)?;
                (0..pairs).map(|pair| plain(pair) / factor).collect()
            }
            RopeScaling::Llama3 {
                factor,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_context,
            } => {
                positive("factor", factor)?;
                positive("low_freq_factor", low)?;
                positive("high_freq_factor", high)?;
                positive("high_freq_factor − low_freq_factor", high - low)?;
                positive("original_max_position_embeddings", original_context)?;
                let scale = |frequency: f64| {
                    let turns = original_context * frequency / (2.0 * PI);
                    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    frequency * (kept + (1.0 - kept) / factor)
                };
                (0..pairs).map(|pair| scale(plain(pair))).collect()
            }
            RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                attention_factor: given_factor,
                truncate,
            } => {
                positive("theta − 1", theta - 1.0)?;
                positive("factor", factor)?;
                positive("original_max_position_embeddings", original_context)?;
                positive("beta_fast", beta_fast)?;
                positive("beta_slow", beta_slow)?;
                positive("attention_factor", given_factor)?;
                attention_factor = given_factor;
                // The feature that makes `turns` turns within the original context.
                let feature = |turns: f64| pairs as f64 * (original_context / (turns * 2.0 * PI)).ln() / theta.ln();
                let (mut first, mut last) = (feature(beta_fast), feature(beta_slow));
                if truncate {
                    (first, last) = (first.floor(), last.ceil());
                }
                first = first.max(0.0);
                last = last.min(rotary_dim as f64 - 1.0);
                // transformers widens an empty blend likewise.
                if first == last {
                    last += 0.001;
                }
                let scale = |pair: usize| {
                    let scaled = ((pair as f64 - first) / (last - first)).clamp(0.0, 1.0);
                    plain(pair) * (scaled / factor + 1.0 - scaled)
                };
                (0..pairs).map(scale).collect()
            }
            RopeScaling::Factors(ref factors) => {
                if factors.len() != pairs {
                    return Err(RopeError::Factors { given: factors.len(), expected: pairs });
                }
                factors
                    .iter()
                    .enumerate()
                    .map(|(pair, &factor)| positive("factor", factor).map(|()| plain(pair) / factor))
                    .collect::<Result<_, _>>()?
            }
        };
        Ok(Self { inverse_frequencies, attention_factor })
    }

    /// Features of a head that turn; those behind them stay.
    pub fn rotary_dim(&self) -> usize {
        2 * self.inverse_frequencies.len()
    }

    /// Radians per position, `[rotary_dim / 2]`.
    pub fn inverse_frequencies(&self) -> &[f64] {
        &self.inverse_frequencies
    }

    /// Factor on queries and keys; 1 but for YaRN.
    pub fn attention_factor(&self) -> f64 {
        self.attention_factor
    }

    /// Cosines and sines for the positions `first_position..first_position + tokens`, once for all heads and layers.
    /// Angles are taken in f64, so that they are right at any position an f64 holds.
    pub fn rotations(&self, first_position: usize, tokens: usize, rotations: &mut Rotations, team: &ThreadTeam) {
        let pairs = self.inverse_frequencies.len();
        rotations.pairs = pairs;
        rotations.turns.resize(tokens * 2 * pairs, 0.0);
        row_groups(&mut rotations.turns, 2 * pairs, team, |first, rows| {
            for (token, row) in rows.chunks_exact_mut(2 * pairs).enumerate() {
                let position = (first_position + first + token) as f64;
                let (cosines, sines) = row.split_at_mut(pairs);
                for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(&self.inverse_frequencies) {
                    let (s, c) = (position * frequency).sin_cos();
                    *cosine = (c * self.attention_factor) as f32;
                    *sine = (s * self.attention_factor) as f32;
                }
            }
        });
    }
}

/// Cosines and sines of a run of positions, from [`RopeTable::rotations`]; kept from call to call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rotations {
    pairs: usize,
    /// `[tokens, 2, pairs]`: cosines, then sines.
    turns: Vec<f32>,
}

impl Rotations {
    /// Turns `data`, `[tokens, heads, head_dim]`, in place. Parallel over tokens when that pays.
    ///
    /// # Panics
    /// When `data` has another number of tokens than the positions, or `head_dim` is below the rotary width.
    pub fn apply(&self, data: &mut [f32], heads: usize, head_dim: usize, team: &ThreadTeam) {
        assert!(head_dim >= 2 * self.pairs, "the rotary width {} fits the head width {head_dim}", 2 * self.pairs);
        let width = heads * head_dim;
        assert_eq!(data.len() * 2 * self.pairs, self.turns.len() * width, "one row of data for each position");
        row_groups(data, width, team, |first, rows| {
            let turns = &self.turns[first * 2 * self.pairs..];
            simd::run(InstructionSet::current(), Rotate { rows, turns, pairs: self.pairs, heads, head_dim });
        });
    }
}

#[cfg(test)]
pub(crate) fn rotate_at(level: InstructionSet, rows: &mut [f32], rotations: &Rotations, heads: usize, head_dim: usize) {
    simd::run(level, Rotate { rows, turns: &rotations.turns, pairs: rotations.pairs, heads, head_dim });
}

struct Rotate<'a> {
    rows: &'a mut [f32],
    turns: &'a [f32],
    pairs: usize,
    heads: usize,
    head_dim: usize,
}

impl Operation for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let rows = self.rows.chunks_exact_mut(self.heads * self.head_dim);
        for (row, turns) in rows.zip(self.turns.chunks_exact(2 * self.pairs)) {
            let (cosines, sines) = turns.split_at(self.pairs);
            for head in row.chunks_exact_mut(self.head_dim) {
                let (low, high) = head[..2 * self.pairs].split_at_mut(self.pairs);
                rotate_head(simd, low, high, cosines, sines);
            }
        }
    }
}

/// `(a cos − b sin, b cos + a sin)`
#[inline(always)]
fn turn<S: Simd>(simd: S, a: S::Vector, b: S::Vector, cosine: S::Vector, sine: S::Vector) -> (S::Vector, S::Vector) {
    let minus_b = simd.sub(simd.splat(0.0), b);
    (simd.mul_add(a, cosine, simd.mul(minus_b, sine)), simd.mul_add(b, cosine, simd.mul(a, sine)))
}

#[inline(always)]
fn rotate_head<S: Simd>(simd: S, low: &mut [f32], high: &mut [f32], cosines: &[f32], sines: &[f32]) {
    let full = low.len() / S::LANES * S::LANES;
    for at in (0..full).step_by(S::LANES) {
        let (a, b) = (simd.load(&low[at..]), simd.load(&high[at..]));
        let (a, b) = turn(simd, a, b, simd.load(&cosines[at..]), simd.load(&sines[at..]));
        simd.store(a, &mut low[at..]);
        simd.store(b, &mut high[at..]);
    }
    if full < low.len() {
        let (a, b) = (simd.load_part(&low[full..], 0.0), simd.load_part(&high[full..], 0.0));
        let (cosine, sine) = (simd.load_part(&cosines[full..], 0.0), simd.load_part(&sines[full..], 0.0));
        let (a, b) = turn(simd, a, b, cosine, sine);
        simd.store_part(a, &mut low[full..]);
        simd.store_part(b, &mut high[full..]);
    }
}

fn positive(name: &'static str, value: f64) -> Result<(), RopeError> {
    if value.is_finite() && value > 0.0 { Ok(()) } else { Err(RopeError::Value { name, value }) }
}
