//! With how many tokens in sight the first tokens of a session were read.
//!
//! An int8 cache takes the mean that it centres keys on from the first of them (SageAttention), as many as it holds when
//! a pass attends. So the rounding of a token's keys, and with it every later layer, depends on the tokens read in the
//! same pass, those behind it too. A session that goes on from a part of what it holds must not keep tokens that a new
//! session would read beside others, or its answer would depend on what it was asked before.

use iceformer_attention::KeyValueCache;

/// Keys from which an int8 cache takes the mean.
pub(crate) const MEAN_KEYS: usize = KeyValueCache::MEAN_KEYS;

/// For each of the first [`MEAN_KEYS`] tokens held, the tokens held after the pass that read it; 0 where some of those
/// that gave the mean are gone.
#[derive(Clone, Debug, Default)]
pub(crate) struct FirstPasses {
    ends: Vec<usize>,
}

impl FirstPasses {
    /// A pass has read whatever is new up to token `end`.
    pub(crate) fn read_to(&mut self, end: usize) {
        if self.ends.len() < MEAN_KEYS {
            self.ends.resize(end.min(MEAN_KEYS), end);
        }
    }

    /// All tokens from `length` on are dropped.
    pub(crate) fn truncate(&mut self, length: usize) {
        self.ends.truncate(length);
        self.ends.iter_mut().filter(|end| (**end).min(MEAN_KEYS) > length).for_each(|end| *end = 0);
    }

    /// Takes back what `earlier` knew of the first `kept` tokens, once the same tokens as then stand behind them.
    pub(crate) fn restore(&mut self, earlier: &Self, kept: usize) {
        self.ends.iter_mut().zip(&earlier.ends).take(kept).for_each(|(end, &earlier)| *end = earlier);
    }

    /// Whether the first `kept` tokens were read as if `tokens` tokens, of which the first `common` are those held, were
    /// read anew in chunks of `chunk`.
    pub(crate) fn are_as_anew(&self, kept: usize, common: usize, tokens: usize, chunk: usize) -> bool {
        self.ends.iter().take(kept).enumerate().all(|(token, &end)| {
            let anew = (token / chunk + 1).saturating_mul(chunk).min(tokens).min(MEAN_KEYS);
            end.min(MEAN_KEYS) == anew && anew <= common
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_others_gave_the_mean_for_are_not_as_anew() {
        let mut passes = FirstPasses::default();
        passes.read_to(100);
        passes.read_to(101);
        for (common, tokens, as_anew) in
            [(100, 150, true), (64, 150, true), (63, 150, false), (50, 150, false), (40, 40, false), (70, 70, true)]
        {
            assert_eq!(
                passes.are_as_anew(common.min(tokens - 1), common, tokens, 512),
                as_anew,
                "{common} of {tokens}"
            );
        }
        assert!(passes.are_as_anew(0, 0, 5, 512));
        assert!(!passes.are_as_anew(70, 70, 150, 20), "smaller chunks see fewer tokens");

        let mut short = FirstPasses::default();
        (30..=80).for_each(|end| short.read_to(end));
        assert!(short.are_as_anew(29, 30, 30, 512), "the same prompt again");
        assert!(!short.are_as_anew(80, 80, 100, 512), "a longer one would be read at once");
        let earlier = short.clone();
        short.truncate(29);
        assert!(!short.are_as_anew(28, 29, 29, 512), "the last of those that gave the mean is gone");
        short.read_to(30);
        short.restore(&earlier, 29);
        assert!(short.are_as_anew(29, 30, 30, 512));
    }
}
