//! Scores packed with the key they belong to, so that comparing two numbers settles ties the same way everywhere, and
//! the best of many of them.

/// A score and a key as one number: larger scores are larger, and of equal scores the earlier key is.
pub(crate) fn pack(score: f32, key: u32) -> u64 {
    let bits = score.to_bits();
    // Floats compare like their bits once the negative ones are reversed. A NaN comes first, so that a key that is no
    // number shows in the result as it does under the exact method.
    let ordered = if score.is_nan() {
        u32::MAX
    } else if bits >> 31 == 0 {
        bits | 1 << 31
    } else {
        !bits
    };
    u64::from(ordered) << 32 | u64::from(!key)
}

/// The score and key of [`pack`].
pub(crate) fn unpack(packed: u64) -> (f32, u32) {
    let ordered = (packed >> 32) as u32;
    let bits = if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered };
    (f32::from_bits(bits), !(packed as u32))
}

/// The keys with the largest scores of those pushed.
#[derive(Default)]
pub(crate) struct Best {
    wanted: usize,
    packed: Vec<u64>,
    /// What is not above this is not among the best.
    threshold: u64,
    /// Score of `threshold`, for a quick first comparison.
    threshold_score: f32,
}

impl Best {
    /// Forgets everything; keeps the best `wanted` from here on.
    pub(crate) fn begin(&mut self, wanted: usize) {
        self.wanted = wanted;
        self.packed.clear();
        self.threshold = 0;
        self.threshold_score = f32::NEG_INFINITY;
    }

    /// Offers keys and their scores.
    pub(crate) fn extend(&mut self, keys: &[u32], scores: &[f32]) {
        for (&key, &score) in keys.iter().zip(scores) {
            // Not `>=`: a NaN goes on.
            if score < self.threshold_score {
                continue;
            }
            let packed = pack(score, key);
            if packed > self.threshold {
                self.packed.push(packed);
            }
        }
        // Cutting back at twice the wanted number makes a push cost a constant.
        if self.packed.len() >= self.wanted.saturating_mul(2).max(64) {
            self.cut();
        }
    }

    fn cut(&mut self) {
        if self.packed.len() > self.wanted {
            self.packed.select_nth_unstable_by(self.wanted - 1, |a, b| b.cmp(a));
            self.packed.truncate(self.wanted);
            self.threshold = self.packed[self.wanted - 1];
            self.threshold_score = unpack(self.threshold).0;
        }
    }

    /// The best, packed, largest score first.
    pub(crate) fn finish(&mut self) -> &[u64] {
        self.cut();
        self.packed.sort_unstable_by(|a, b| b.cmp(a));
        &self.packed
    }
}

#[cfg(test)]
mod tests {
    use iceformer_testing::random::Random;

    use super::*;

    #[test]
    fn packed_scores_order_and_come_back() {
        let scores = [f32::NEG_INFINITY, -3.5, -1e-40, 0.0, 1e-40, 2.0, f32::MAX, f32::INFINITY];
        for pair in scores.windows(2) {
            assert!(pack(pair[0], 0) < pack(pair[1], 9), "{} against {}", pair[0], pair[1]);
        }
        for score in scores {
            assert_eq!(unpack(pack(score, 77)), (score, 77));
            assert!(pack(score, 1) > pack(score, 2) && pack(f32::NAN, 5) > pack(score, 1));
        }
        assert!(unpack(pack(f32::NAN, 3)).0.is_nan() && unpack(pack(-f32::NAN, 3)).1 == 3);
    }

    #[test]
    fn best_equals_sorting() {
        let mut random = Random::new(1);
        let mut best = Best::default();
        for (count, wanted) in [(0, 3), (5, 20), (20, 20), (1_000, 1), (5_000, 20), (300, usize::MAX)] {
            let keys: Vec<u32> = (0..count).collect();
            // Few different scores, so that ties are many.
            let scores: Vec<f32> = keys.iter().map(|_| random.below(50) as f32 - 25.0).collect();
            best.begin(wanted);
            for (keys, scores) in keys.chunks(17).zip(scores.chunks(17)) {
                best.extend(keys, scores);
            }
            let mut expected: Vec<u64> = keys.iter().zip(&scores).map(|(&key, &score)| pack(score, key)).collect();
            expected.sort_unstable_by(|a, b| b.cmp(a));
            expected.truncate(wanted);
            assert_eq!(best.finish(), expected, "{wanted} of {count}");
        }
    }
}
