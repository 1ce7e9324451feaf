//! The largest of many scores, found without a branch for each.

use std::cmp::Ordering;

use crate::InstructionSet;
use crate::simd::{self, Operation, Simd};

/// A number that at least `wanted` of `scores` reach, or −∞. Seldom do many more reach it: where a few scores are of another
/// magnitude than the others, or there are few more than are wanted. A NaN reaches none.
///
/// `largest` is room for numbers in between.
pub fn reached_by(wanted: usize, scores: &[f32], largest: &mut Vec<f32>) -> f32 {
    reached_at(InstructionSet::current(), wanted, scores, largest)
}

/// Appends to `indices` the index of each score that is `limit` or more, or no number.
///
/// # Panics
/// With 2³² scores or more.
pub fn push_reaching(limit: f32, scores: &[f32], indices: &mut Vec<u32>) {
    assert!(u32::try_from(scores.len()).is_ok(), "scores have indices of 32 bits");
    simd::run(InstructionSet::current(), Reaching { limit, scores, indices });
}

/// Writes to `order` the indices of all scores, the largest first; of equal ones the first. No score may be NaN.
///
/// # Panics
/// With 2³² scores or more.
pub fn order_descending(scores: &[f32], order: &mut Vec<u32>) {
    assert!(u32::try_from(scores.len()).is_ok(), "scores have indices of 32 bits");
    order_at(InstructionSet::current(), scores, order);
}

/// Up to as many scores are each compared with all others.
const FEW: usize = 64;

fn order_at(level: InstructionSet, scores: &[f32], order: &mut Vec<u32>) {
    order.clear();
    if scores.len() > FEW {
        order.extend(0..scores.len() as u32);
        order.sort_unstable_by(|&a, &b| {
            scores[b as usize].partial_cmp(&scores[a as usize]).unwrap_or(Ordering::Equal).then(a.cmp(&b))
        });
    } else {
        order.resize(scores.len(), 0);
        simd::run(level, Ordered { scores, order });
    }
}

struct Ordered<'a> {
    scores: &'a [f32],
    order: &'a mut [u32],
}

impl Operation for Ordered<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        // NaN is below nothing, and nothing is below it.
        let mut all = [f32::NAN; FEW];
        all[..self.scores.len()].copy_from_slice(self.scores);
        let chunks = self.scores.len().div_ceil(S::LANES);
        for (index, &score) in self.scores.iter().enumerate() {
            // As many come before it as are above it, and of its equals (neither above nor below) the earlier ones.
            let one = simd.splat(score);
            let mut place = 0;
            for chunk in 0..chunks {
                let others = simd.load(&all[chunk * S::LANES..]);
                let first = (1 << index.saturating_sub(chunk * S::LANES).min(S::LANES)) - 1;
                let not_below = !simd.below(others, one);
                place += (simd.below(one, others) | (not_below & first)).count_ones() as usize;
            }
            self.order[place] = index as u32;
        }
    }
}

fn reached_at(level: InstructionSet, wanted: usize, scores: &[f32], largest: &mut Vec<f32>) -> f32 {
    if wanted == 0 || scores.len() <= wanted {
        return f32::NEG_INFINITY;
    }
    simd::run(level, Reached { wanted, scores, largest })
}

struct Reached<'a> {
    wanted: usize,
    scores: &'a [f32],
    largest: &'a mut Vec<f32>,
}

impl Operation for Reached<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> f32 {
        let Self { wanted, scores, largest } = self;
        // Dealt out to a few times as many groups as are wanted, as many groups as are wanted have a largest score that is
        // not below the number returned: fewer numbers to look at.
        let groups = wanted.saturating_mul(3).saturating_add(S::LANES - 1) / S::LANES * S::LANES;
        let groups = if groups <= scores.len() / 2 { groups } else { scores.len() };
        largest.clear();
        for scores in scores.chunks(groups) {
            if largest.is_empty() {
                largest.extend_from_slice(scores);
                continue;
            }
            simd::zip_in_place(
                simd,
                &mut largest[..scores.len()],
                scores,
                #[inline(always)]
                // Of a NaN and what there was the latter is taken.
                |largest, score| simd.max(score, largest),
            );
        }
        largest.resize(groups.next_multiple_of(S::LANES), f32::NAN);
        number_reached(simd, wanted, largest)
    }
}

/// As [`reached_by`], of whole vectors of numbers, by bisection.
#[inline(always)]
fn number_reached<S: Simd>(simd: S, wanted: usize, numbers: &[f32]) -> f32 {
    let (mut smallest, mut largest) = (simd.splat(f32::INFINITY), simd.splat(f32::NEG_INFINITY));
    for numbers in numbers.chunks_exact(S::LANES) {
        // Of a NaN and what there was the latter is taken.
        let numbers = simd.load(numbers);
        (smallest, largest) = (simd.min(numbers, smallest), simd.max(numbers, largest));
    }
    let smallest = -simd.reduce_max(simd.sub(simd.splat(0.0), smallest));
    let (mut low, mut high) = (smallest.max(f32::MIN), simd.reduce_max(largest));
    if !high.is_finite() {
        return f32::NEG_INFINITY;
    }
    let enough = wanted.saturating_add(wanted / 4);
    let mut found = f32::NEG_INFINITY;
    // Each round halves what is between: twenty tell scores apart that differ by a millionth of their spread.
    for _ in 0..20 {
        let middle = 0.5 * low + 0.5 * high;
        let reached = count_reaching(simd, middle, numbers);
        if reached < wanted {
            high = middle;
        } else {
            (low, found) = (middle, middle);
            if reached <= enough {
                break;
            }
        }
    }
    found
}

#[inline(always)]
fn count_reaching<S: Simd>(simd: S, limit: f32, numbers: &[f32]) -> usize {
    // Above the number before it: unlike "not below", no NaN is.
    let before = simd.splat(limit.next_down());
    let mut reaching = 0;
    for numbers in numbers.chunks_exact(S::LANES) {
        reaching += simd.below(before, simd.load(numbers)).count_ones() as usize;
    }
    reaching
}

struct Reaching<'a> {
    limit: f32,
    scores: &'a [f32],
    indices: &'a mut Vec<u32>,
}

impl Operation for Reaching<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { limit, scores, indices } = self;
        let limit = simd.splat(limit);
        let mut used = indices.len();
        // Room for all, and for a whole vector behind the last.
        indices.resize(used + scores.len() + S::LANES, 0);
        let chunks = scores.chunks_exact(S::LANES);
        let rest = chunks.remainder();
        let mut first = 0;
        for scores in chunks {
            used += simd.store_places(!simd.below(simd.load(scores), limit), first, &mut indices[used..]);
            first += S::LANES as u32;
        }
        if !rest.is_empty() {
            let some = (1 << rest.len()) - 1;
            let reaching = !simd.below(simd.load_part(rest, 0.0), limit) & some;
            used += simd.store_places(reaching, first, &mut indices[used..]);
        }
        indices.truncate(used);
    }
}

#[cfg(test)]
mod tests {
    use iceformer_testing::random::Random;

    use super::*;
    use crate::elementwise::levels;

    fn reaching(level: InstructionSet, limit: f32, scores: &[f32]) -> Vec<u32> {
        let mut indices = vec![7];
        simd::run(level, Reaching { limit, scores, indices: &mut indices });
        assert_eq!(indices.remove(0), 7, "what was there stays");
        indices
    }

    #[test]
    fn as_many_scores_as_wanted_reach_the_number() {
        let mut random = Random::new(4);
        for level in levels() {
            for count in (1..200).chain([300, 601, 5_000]) {
                for wanted in [1, 3, 20, 127, 400, usize::MAX] {
                    let scores = random.normals(count, 1.0);
                    let limit = reached_at(level, wanted, &scores, &mut Vec::new());
                    let indices = reaching(level, limit, &scores);
                    let expected = (0..count as u32).filter(|&index| scores[index as usize] >= limit);
                    assert!(indices.iter().copied().eq(expected), "{level:?}: {wanted} of {count}");
                    let number = indices.len();
                    assert!(number >= wanted.min(count), "{level:?}: {number} reach, {wanted} of {count} wanted");
                    // Few too many, where scores are many beside what is wanted.
                    assert!(
                        wanted > count / 8 || number <= 2 * wanted + 4,
                        "{level:?}: {number} of {wanted} of {count}"
                    );
                }
            }
        }
    }

    #[test]
    fn order_equals_sorting() {
        let mut random = Random::new(6);
        for level in levels() {
            for count in 0..150 {
                // Few different scores, so that ties are many; both zeros are equal.
                let score = |number: usize| match number {
                    0 => f32::NEG_INFINITY,
                    1 => f32::INFINITY,
                    2 => -0.0,
                    number => number as f32 - 3.0,
                };
                let scores: Vec<f32> = (0..count).map(|_| score(random.below(20))).collect();
                let mut expected: Vec<u32> = (0..count).collect();
                expected.sort_by(|&a, &b| scores[b as usize].partial_cmp(&scores[a as usize]).expect("numbers"));
                let mut order = vec![1, 2, 3];
                order_at(level, &scores, &mut order);
                assert_eq!(order, expected, "{level:?}: {scores:?}");
            }
        }
    }

    #[test]
    fn outliers_and_numbers_that_are_none_do_no_harm() {
        for level in levels() {
            for count in [40, 41, 2_000] {
                let mut scores = vec![1.0; count];
                scores[count / 2] = f32::NAN;
                scores[count - 1] = f32::NAN;
                scores[3] = f32::NEG_INFINITY;
                let limit = reached_at(level, 20, &scores, &mut Vec::new());
                assert!(reaching(level, limit, &scores).len() >= 20 + 2, "those that are no number do not count");
                assert!(reaching(level, f32::INFINITY, &scores) == [count as u32 / 2, count as u32 - 1]);
                // One of another magnitude, in any place, and half of all no number.
                let usual = Random::new(count as u64).normals(count, 1.0);
                for place in 0..count {
                    for one in [f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY] {
                        let mut scores = usual.clone();
                        scores[place] = one;
                        scores.iter_mut().step_by(2).for_each(|score| *score = f32::NAN);
                        let limit = reached_at(level, 5, &scores, &mut Vec::new());
                        let reached = scores.iter().filter(|score| **score >= limit).count();
                        assert!(reached >= 5, "{level:?}: {reached} reach {limit} with {one} at {place} of {count}");
                    }
                }
                for every in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, f32::MIN, f32::MAX] {
                    let scores = vec![every; count];
                    let limit = reached_at(level, 20, &scores, &mut Vec::new());
                    assert!(reaching(level, limit, &scores).len() >= 20, "{level:?}: {every} reach {limit}");
                }
            }
        }
    }
}
