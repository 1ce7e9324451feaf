//! Scores packed with the key they belong to, so that comparing two numbers settles ties the same way everywhere, and
//! the best of many of them.

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

/// A number that at least `wanted` of `scores` reach, if there are as many, and seldom many more; −∞ where it does not pay
/// to look for one. A NaN reaches none.
///
/// The scores are dealt out to a few times as many groups: as many groups as are wanted have a largest score that is not
/// below the one returned. Unlike one comparison after the other with the best so far, this has no branch to guess.
pub(crate) fn reached_by(wanted: usize, scores: &[f32], largest: &mut Vec<f32>) -> f32 {
    let groups = (3 * wanted.min(MOST_WANTED)).next_power_of_two();
    if wanted == 0 || wanted > MOST_WANTED || scores.len() < 2 * groups {
        return f32::NEG_INFINITY;
    }
    largest.clear();
    largest.resize(groups, f32::NEG_INFINITY);
    for scores in scores.chunks(groups) {
        for (largest, &score) in largest.iter_mut().zip(scores) {
            *largest = if score > *largest { score } else { *largest };
        }
    }
    *largest.select_nth_unstable_by(wanted - 1, |a, b| b.total_cmp(a)).1
}

/// Above, [`reached_by`] takes longer than it saves.
const MOST_WANTED: usize = 128;
/// Scores that are compared together.
const CHUNK: usize = 8;

/// Calls `take` with the index of each score that is `limit` or more, or no number.
pub(crate) fn for_each_above(limit: f32, scores: &[f32], mut take: impl FnMut(usize)) {
    // Not `>=`: a NaN is taken.
    let is_below = |score: f32| score < limit;
    for (chunk, scores) in scores.chunks(CHUNK).enumerate() {
        if !scores.iter().fold(true, |all, score| all & is_below(*score)) {
            let above = scores.iter().enumerate().filter(|(_, score)| !is_below(**score));
            above.for_each(|(index, _)| take(CHUNK * chunk + index));
        }
    }
}

/// The keys with the largest scores of those offered.
#[derive(Default)]
pub(crate) struct Best {
    wanted: usize,
    keys: Vec<u32>,
    scores: Vec<f32>,
    /// The best of those that were looked at.
    packed: Vec<u64>,
    largest: Vec<f32>,
}

impl Best {
    /// Forgets everything; keeps the best `wanted` from here on.
    pub(crate) fn begin(&mut self, wanted: usize) {
        self.wanted = wanted;
        self.keys.clear();
        self.scores.clear();
        self.packed.clear();
    }

    /// Offers keys and their scores.
    pub(crate) fn extend(&mut self, keys: &[u32], scores: &[f32]) {
        self.keys.extend_from_slice(keys);
        self.scores.extend_from_slice(scores);
    }

    /// The best, packed, largest score first.
    pub(crate) fn finish(&mut self) -> &[u64] {
        let Self { wanted, keys, scores, packed, largest } = self;
        if !scores.is_empty() {
            let limit = reached_by(*wanted, scores, largest);
            for_each_above(limit, scores, |index| packed.push(pack(scores[index], keys[index])));
            keys.clear();
            scores.clear();
            if packed.len() > *wanted {
                packed.select_nth_unstable_by(*wanted - 1, |a, b| b.cmp(a));
                packed.truncate(*wanted);
            }
            packed.sort_unstable_by(|a, b| b.cmp(a));
        }
        packed
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
    fn as_many_scores_as_wanted_reach_the_limit() {
        let mut random = Random::new(4);
        for (count, wanted) in [(10, 3), (128, 20), (600, 20), (601, 1), (900, 100), (5_000, 127), (5_000, 128)] {
            let mut scores = random.normals(count, 1.0);
            scores[count / 2] = f32::NAN;
            let limit = reached_by(wanted, &scores, &mut Vec::new());
            let (mut above, mut number) = (Vec::new(), 0);
            for_each_above(limit, &scores, |index| above.push(index));
            for (index, score) in scores.iter().enumerate() {
                assert_eq!(above.contains(&index), score.is_nan() || *score >= limit);
                number += usize::from(*score >= limit);
            }
            assert!(number >= wanted.min(count - 1), "{number} of {wanted}");
            // Few too many, where scores are many beside what is wanted.
            assert!(count < 10 * wanted || number <= 2 * wanted, "{number} of {wanted} among {count}");
        }
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
