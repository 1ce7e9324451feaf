//! Chooses the next token from logits.
//!
//! The steps run in the order of Hugging Face's `generate`: repetition penalty, temperature, top-k, top-p, min-p, draw.
//! Ties are ordered by token id and the generator is ChaCha8, so a seed gives the same tokens on every machine.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerSettings {
    /// Divisor of the logits; 0 takes the most probable token always (greedy).
    pub temperature: f32,
    /// Keep the `top_k` most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of most probable tokens whose probabilities reach `top_p`; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least `min_p` times the probability of the best; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen among the last `repetition_window`; 1 is off
    /// (Keskar et al., CTRL, arXiv 1909.05858).
    pub repetition_penalty: f32,
    /// How many of the latest tokens, prompt included, the penalty looks at.
    pub repetition_window: usize,
    /// Seed of the generator.
    pub seed: u64,
}

impl Default for SamplerSettings {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repetition_penalty: 1.0,
            repetition_window: 64,
            seed: 0,
        }
    }
}

/// What is wrong with sampler settings or with the logits.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplerError {
    /// A setting is outside its range.
    #[error("{setting} is {value}; expected {expected}")]
    OutOfRange {
        /// Name of the setting.
        setting: &'static str,
        /// Value given.
        value: f32,
        /// Range it must lie in.
        expected: &'static str,
    },
    /// The logits hold no number to choose by.
    #[error("the model's logits are not numbers; the weights are damaged or overflow in this type")]
    NotANumber,
}

/// A source of token choices: settings and the state of the generator.
pub struct Sampler {
    settings: SamplerSettings,
    generator: ChaCha8Rng,
    /// `(token, logit or probability)`, best first, reused from call to call.
    candidates: Vec<(u32, f32)>,
    /// The logits after the repetition penalty.
    penalised: Vec<f32>,
}

impl Sampler {
    /// A sampler with checked settings.
    ///
    /// # Errors
    /// [`SamplerError::OutOfRange`] naming the setting, its value and the range.
    pub fn new(settings: SamplerSettings) -> Result<Self, SamplerError> {
        let check = |setting, value: f32, holds: bool, expected| {
            if holds { Ok(()) } else { Err(SamplerError::OutOfRange { setting, value, expected }) }
        };
        let s = &settings;
        check("temperature", s.temperature, (0.0..=100.0).contains(&s.temperature), "a number from 0 to 100")?;
        check("top-p", s.top_p, s.top_p > 0.0 && s.top_p <= 1.0, "a number above 0 and up to 1")?;
        check("min-p", s.min_p, (0.0..=1.0).contains(&s.min_p), "a number from 0 to 1")?;
        let penalty = s.repetition_penalty;
        check("repetition penalty", penalty, penalty > 0.0 && penalty <= 10.0, "a number above 0 and up to 10")?;
        let generator = ChaCha8Rng::seed_from_u64(settings.seed);
        Ok(Self { settings, generator, candidates: Vec::new(), penalised: Vec::new() })
    }

    /// The settings in use.
    pub fn settings(&self) -> &SamplerSettings {
        &self.settings
    }

    /// Chooses a token by `logits` `[vocabulary]`; `history` holds all tokens so far, latest last.
    ///
    /// # Errors
    /// [`SamplerError::NotANumber`] when no logit is a number above −∞.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, SamplerError> {
        let mut penalised = std::mem::take(&mut self.penalised);
        let logits = if self.settings.repetition_penalty == 1.0 {
            logits
        } else {
            penalised.clear();
            penalised.extend_from_slice(logits);
            self.penalise(&mut penalised, history);
            &penalised
        };
        let chosen = if self.settings.temperature == 0.0 { greedy(logits) } else { self.draw(logits) };
        self.penalised = penalised;
        chosen.ok_or(SamplerError::NotANumber)
    }

    fn penalise(&self, logits: &mut [f32], history: &[u32]) {
        let penalty = self.settings.repetition_penalty;
        let mut recent = history[history.len().saturating_sub(self.settings.repetition_window)..].to_vec();
        recent.sort_unstable();
        recent.dedup();
        for token in recent {
            if let Some(logit) = logits.get_mut(token as usize) {
                let penalised = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                // A penalty near zero must not make a number infinite, which is what damaged weights do.
                *logit = if logit.is_finite() { penalised.clamp(f32::MIN, f32::MAX) } else { penalised };
            }
        }
    }

    fn draw(&mut self, logits: &[f32]) -> Option<u32> {
        let best = logits[greedy(logits)? as usize];
        let settings = &self.settings;
        let candidates = &mut self.candidates;
        candidates.clear();
        // Below e⁻³⁰ of the best a token is never drawn in practice; leaving it out makes the sort short.
        let floor = best - 30.0 * settings.temperature;
        candidates.extend((0..).zip(logits.iter().copied()).filter(|&(_, logit)| logit >= floor));
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if settings.top_k > 0 && settings.top_k < candidates.len() {
            candidates.select_nth_unstable_by(settings.top_k - 1, order);
            candidates.truncate(settings.top_k);
        }
        candidates.sort_unstable_by(order);
        for candidate in candidates.iter_mut() {
            candidate.1 = ((candidate.1 - best) / settings.temperature).exp();
        }
        let total: f64 = candidates.iter().map(|&(_, p)| f64::from(p)).sum();
        let mut before = 0.0;
        let kept = candidates
            .iter()
            .position(|&(_, p)| {
                let reached = before >= f64::from(settings.top_p) * total;
                before += f64::from(p);
                reached
            })
            .unwrap_or(candidates.len());
        candidates.truncate(kept.max(1));
        // The best has weight 1, so `min_p` is the least weight; it always stays itself.
        candidates.retain(|&(_, p)| p >= settings.min_p);
        let total: f64 = candidates.iter().map(|&(_, p)| f64::from(p)).sum();
        let uniform = (self.generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = uniform * total;
        for &(token, p) in candidates.iter() {
            left -= f64::from(p);
            if left < 0.0 {
                return Some(token);
            }
        }
        candidates.last().map(|&(token, _)| token)
    }
}

/// The token with the highest logit, the lowest id among equals; `None` when no logit is a number above −∞.
fn greedy(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (token, &logit) in (0..).zip(logits) {
        if logit > best.map_or(f32::NEG_INFINITY, |(_, value)| value) {
            best = Some((token, logit));
        }
    }
    best.filter(|&(_, logit)| logit.is_finite()).map(|(token, _)| token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(change: impl FnOnce(&mut SamplerSettings)) -> Sampler {
        let mut settings = SamplerSettings { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..Default::default() };
        change(&mut settings);
        Sampler::new(settings).unwrap()
    }

    /// How often each token of `logits` is drawn in 20,000 draws.
    fn shares(sampler: &mut Sampler, logits: &[f32], history: &[u32]) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..20_000 {
            counts[sampler.sample(logits, history).unwrap() as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    fn assert_close(found: &[f64], expected: &[f64]) {
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() < 0.015, "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_equals() {
        let mut greedy = sampler(|s| s.temperature = 0.0);
        assert_eq!(greedy.sample(&[1.0, 3.0, 3.0, f32::NAN, 2.0], &[]), Ok(1));
    }

    #[test]
    fn draws_follow_the_softmax_at_the_temperature() {
        let logits = [0.0f32, 1.0, 2.0];
        let expected = |t: f64| {
            let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / t).exp()).collect();
            let sum: f64 = weights.iter().sum();
            weights.iter().map(|w| w / sum).collect::<Vec<_>>()
        };
        assert_close(&shares(&mut sampler(|_| {}), &logits, &[]), &expected(1.0));
        assert_close(&shares(&mut sampler(|s| s.temperature = 0.5), &logits, &[]), &expected(0.5));
    }

    #[test]
    fn top_k_top_p_and_min_p_cut_the_tail() {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.15f32.ln(), 0.05f32.ln()];
        let two = [0.625, 0.375, 0.0, 0.0];
        assert_close(&shares(&mut sampler(|s| s.top_k = 2), &logits, &[]), &two);
        assert_close(&shares(&mut sampler(|s| s.top_p = 0.7), &logits, &[]), &two);
        assert_close(&shares(&mut sampler(|s| s.min_p = 0.4), &logits, &[]), &two);
        assert_close(&shares(&mut sampler(|s| s.top_p = 0.01), &logits, &[]), &[1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn repetition_penalty_looks_at_the_window_only() {
        let mut greedy = sampler(|s| {
            s.temperature = 0.0;
            s.repetition_penalty = 2.0;
            s.repetition_window = 2;
        });
        assert_eq!(greedy.sample(&[3.0, 2.0, -1.0], &[0, 1, 2]), Ok(0));
        assert_eq!(greedy.sample(&[3.0, 2.0, -1.0], &[1, 2, 0]), Ok(1));
        assert_eq!(greedy.sample(&[-1.0, -1.5, -3.0], &[0, 0]), Ok(1));
        let mut rewarding = sampler(|s| (s.temperature, s.repetition_penalty) = (0.0, 1e-40));
        assert_eq!(rewarding.sample(&[3.0, 2.0, -1.0], &[1]), Ok(1));
        assert_eq!(rewarding.sample(&[3.0, f32::INFINITY, -1.0], &[1]), Err(SamplerError::NotANumber));
    }

    #[test]
    fn one_seed_gives_one_sequence() {
        let logits: Vec<f32> = (0..500).map(|i| ((i * 37) % 101) as f32 / 20.0).collect();
        let sequence = |seed| {
            let mut sampler = sampler(|s| s.seed = seed);
            (0..50).map(|_| sampler.sample(&logits, &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(sequence(7), sequence(7));
        assert_ne!(sequence(7), sequence(8));
    }

    #[test]
    fn bad_settings_and_logits_are_named() {
        for (settings, expected) in [
            (SamplerSettings { temperature: -1.0, ..Default::default() }, "temperature is -1"),
            (SamplerSettings { temperature: f32::NAN, ..Default::default() }, "temperature is NaN"),
            (SamplerSettings { top_p: 0.0, ..Default::default() }, "top-p is 0"),
            (SamplerSettings { min_p: 1.5, ..Default::default() }, "min-p is 1.5"),
            (SamplerSettings { repetition_penalty: 0.0, ..Default::default() }, "repetition penalty is 0"),
        ] {
            let message = Sampler::new(settings).err().unwrap().to_string();
            assert!(message.starts_with(expected), "{message}");
        }
        let bad = [f32::NAN, f32::NEG_INFINITY];
        assert_eq!(sampler(|_| {}).sample(&bad, &[]), Err(SamplerError::NotANumber));
        assert_eq!(sampler(|s| s.temperature = 0.0).sample(&bad, &[]), Err(SamplerError::NotANumber));
    }
}
