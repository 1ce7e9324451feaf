//! Random numbers that depend on a seed and a position only, so that they do not depend on what came before.

/// Uniform in `[0, 1)`: SplitMix64 (Steele, Lea and Flood 2014) at `position` of the sequence `seed`.
pub(crate) fn uniform(seed: u64, position: u64) -> f64 {
    let mut bits =
        seed.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add((position + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((bits ^ (bits >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

/// Normal with mean 0 and deviation 1 (Box and Muller 1958).
pub(crate) fn normal(seed: u64, position: u64) -> f64 {
    let radius = (-2.0 * (1.0 - uniform(seed, 2 * position)).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform(seed, 2 * position + 1)).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_distributions() {
        for seed in [0, 1, u64::MAX] {
            let mean = |f: &dyn Fn(u64) -> f64| (0..20_000).map(f).sum::<f64>() / 20_000.0;
            assert!((mean(&|i| uniform(seed, i)) - 0.5).abs() < 0.01, "mean of uniform numbers, seed {seed}");
            assert!(mean(&|i| normal(seed, i)).abs() < 0.03, "mean of normal numbers, seed {seed}");
            assert!((mean(&|i| normal(seed, i).powi(2)) - 1.0).abs() < 0.05, "variance, seed {seed}");
            assert!(
                mean(&|i| (uniform(seed, i) - 0.5) * (uniform(seed, i + 1) - 0.5)).abs() < 0.003,
                "neighbours are related, seed {seed}"
            );
        }
    }
}
