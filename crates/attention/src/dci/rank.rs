//! Scores packed with the key they belong to, so that comparing two numbers settles ties the same way everywhere, and
//! the best of many of them.

use iceformer_kernels::selection::{push_reaching, reached_by};

/// A score and a key as one number: larger scores are larger, and of equal scores the earlier key is.
pub(crate) fn pack(score: f32, key: u32) -> u64 {
    // Floats compare like their bits once the negative ones are reversed. A NaN comes first, so that a key that is no
    // number shows in the result as it does under the exact method. (Without branches: signs are anyone's guess.)
    let bits = score.to_bits();
    let sign = (bits as i32 >> 31) as u32;
    let ordered = if score.is_nan() { u32::MAX } else { bits ^ (sign | 1 << 31) };
    u64::from(ordered) << 32 | u64::from(!key)
}

/// The score and key of [`pack`].
pub(crate) fn unpack(packed: u64) -> (f32, u32) {
    let ordered = (packed >> 32) as u32;
    let bits = if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered };
    (f32::from_bits(bits), !(packed as u32))
}

/// Buffers of a selection.
#[derive(Default)]
pub(crate) struct Selection {
    pub indices: Vec<u32>,
    pub largest: Vec<f32>,
}

/// The keys with the largest scores of those offered.
#[derive(Default)]
pub(crate) struct Best {
    wanted: usize,
    /// A score that enough keys reach already; −∞ where that is not known.
    limit: f32,
    /// Keys that may be among the best, packed.
    packed: Vec<u64>,
}

impl Best {
    /// Forgets everything; keeps the best `wanted` from here on.
    pub(crate) fn begin(&mut self, wanted: usize) {
        self.wanted = wanted;
        self.limit = f32::NEG_INFINITY;
        self.packed.clear();
    }

    /// Learns that keys with these scores will be offered, all of them visible.
    pub(crate) fn expect(&mut self, scores: &[f32], Selection { largest, .. }: &mut Selection) {
        self.limit = self.limit.max(reached_by(self.wanted, scores, largest));
    }

    /// Offers the keys with these scores that may be among the best, by calling `push` with their indices and with the
    /// list to append them to, packed.
    pub(crate) fn offer(
        &mut self,
        scores: &[f32],
        Selection { indices, .. }: &mut Selection,
        push: impl FnOnce(&[u32], &mut Vec<u64>),
    ) {
        indices.clear();
        push_reaching(self.limit, scores, indices);
        push(indices, &mut self.packed);
    }

    /// Keeps the best of those offered, in order.
    pub(crate) fn finish(&mut self) {
        let Self { wanted, packed, .. } = self;
        if packed.len() > *wanted {
            packed.select_nth_unstable_by(*wanted - 1, |a, b| b.cmp(a));
            packed.truncate(*wanted);
        }
        packed.sort_unstable_by(|a, b| b.cmp(a));
    }

    /// What was kept when it was [finished](Self::finish): packed, largest score first.
    pub(crate) fn found(&self) -> &[u64] {
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
                let selection = &mut Selection::default();
                best.expect(scores, selection);
                best.offer(scores, selection, |indices, packed| {
                    packed.extend(indices.iter().map(|&index| pack(scores[index as usize], keys[index as usize])));
                });
            }
            let mut expected: Vec<u64> = keys.iter().zip(&scores).map(|(&key, &score)| pack(score, key)).collect();
            expected.sort_unstable_by(|a, b| b.cmp(a));
            expected.truncate(wanted);
            best.finish();
            assert_eq!(best.found(), expected, "{wanted} of {count}");
        }
    }
}
