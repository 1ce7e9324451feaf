//! Draws that depend on nothing but the seed and the case.

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// The generator of one case.
pub(crate) struct Random(ChaCha8Rng);

impl Random {
    /// A stream of its own for each task, length and case number.
    pub fn new(seed: u64, task: &str, length: usize, number: usize) -> Self {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        // FNV-1a (Fowler, Noll, Vo) over all that names the case.
        let bytes = task.bytes().chain(length.to_le_bytes()).chain(number.to_le_bytes());
        let stream = bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        generator.set_stream(stream);
        Self(generator)
    }

    /// A whole number from `least` to `most`.
    pub fn number(&mut self, least: u64, most: u64) -> u64 {
        self.0.random_range(least..=most)
    }

    /// A place in a list of `length`.
    pub fn index(&mut self, length: usize) -> usize {
        self.number(0, length as u64 - 1) as usize
    }

    /// One of `items`.
    pub fn choose<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.index(items.len())]
    }

    /// Another order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        items.shuffle(&mut self.0);
    }

    /// A word of `letters` letters from `a` to `z`.
    pub fn letters(&mut self, letters: usize) -> String {
        (0..letters).map(|_| char::from(b'a' + self.number(0, 25) as u8)).collect()
    }

    /// Two words with a hyphen between, one that `taken` does not hold, and then does.
    pub fn key(&mut self, words: &[String], taken: &mut std::collections::BTreeSet<String>) -> String {
        loop {
            let key = format!("{}-{}", self.choose(words), self.choose(words));
            if taken.insert(key.clone()) {
                return key;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_their_own_and_stay() {
        let draw = |seed, task, length, number| {
            let mut random = Random::new(seed, task, length, number);
            [random.number(0, u64::MAX - 1), random.number(0, u64::MAX - 1)]
        };
        let first = draw(1, "single", 4096, 0);
        assert_eq!(first, draw(1, "single", 4096, 0));
        for other in [
            draw(2, "single", 4096, 0),
            draw(1, "multi-key", 4096, 0),
            draw(1, "single", 8192, 0),
            draw(1, "single", 4096, 1),
        ] {
            assert_ne!(first, other);
        }
    }
}
