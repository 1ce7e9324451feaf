//! From the largest inner product to the nearest neighbour.
//!
//! With `c ≥ max ‖k‖`, the transformations `T_K(k) = [k/c ; √(1 − ‖k‖²/c²)]` and `T_Q(q) = [q/‖q‖ ; 0]` give unit
//! vectors with `‖T_Q(q) − T_K(k)‖² = 2 − 2 q·k/(c‖q‖)`: the nearest keys are those with the largest logits (IceFormer,
//! §4.2; Neyshabur and Srebro 2015).
//!
//! Nothing here is stored lifted. Keys keep their own vector and squared norm, and `c` enters when two of them are
//! compared, so a later key with a larger norm changes one number and leaves the index valid.

/// The bound `c` on the norms of some keys.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    inverse: f32,
    inverse_square: f32,
}

impl Bound {
    /// From the largest squared norm.
    pub(crate) fn new(largest_squared_norm: f32) -> Self {
        // All keys are zero: any bound does.
        let square = if largest_squared_norm > 0.0 { largest_squared_norm } else { 1.0 };
        Self { inverse: 1.0 / square.sqrt(), inverse_square: 1.0 / square }
    }

    /// `1/c`
    pub(crate) fn inverse(self) -> f32 {
        self.inverse
    }

    /// Last coordinate of `T_K`; zero for a norm that is no number.
    pub(crate) fn extra(self, squared_norm: f32) -> f32 {
        (1.0 - squared_norm * self.inverse_square).max(0.0).sqrt()
    }

    /// `T_K(a) · T_K(b)` of two keys with this product and these last coordinates.
    pub(crate) fn lifted_product(self, product: f32, extra_a: f32, extra_b: f32) -> f32 {
        product * self.inverse_square + extra_a * extra_b
    }
}

/// The larger of a squared norm so far and a further one, unless that is not finite: one broken key must not flatten
/// the lift of all others.
pub(crate) fn larger_norm(so_far: f32, squared_norm: f32) -> f32 {
    if squared_norm.is_finite() { so_far.max(squared_norm) } else { so_far }
}

#[cfg(test)]
mod tests {
    use iceformer_testing::random::Random;

    use super::*;

    #[test]
    fn lifted_distance_orders_keys_by_their_product() {
        let mut random = Random::new(3);
        let query = random.normals(24, 2.0);
        let keys: Vec<Vec<f32>> = (0..50).map(|_| random.normals(24, 1.0)).collect();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let largest = keys.iter().map(|key| dot(key, key)).fold(0.0, larger_norm);
        let bound = Bound::new(largest);
        let query_norm = dot(&query, &query).sqrt();
        for key in &keys {
            let extra = bound.extra(dot(key, key));
            let lifted: Vec<f32> = key.iter().map(|value| value * bound.inverse()).chain([extra]).collect();
            assert!((dot(&lifted, &lifted) - 1.0).abs() < 1e-5, "a lifted key has norm 1");
            let unit: Vec<f32> = query.iter().map(|value| value / query_norm).chain([0.0]).collect();
            let distance: f32 = unit.iter().zip(&lifted).map(|(a, b)| (a - b) * (a - b)).sum();
            let expected = 2.0 - 2.0 * dot(&query, key) * bound.inverse() / query_norm;
            assert!((distance - expected).abs() < 1e-5, "{distance} is not {expected}");
            let other = &keys[7];
            let product = bound.lifted_product(dot(key, other), extra, bound.extra(dot(other, other)));
            let distance = dot(key, key) + dot(other, other) - 2.0 * dot(key, other);
            let extra_distance = (extra - bound.extra(dot(other, other))).powi(2);
            let expected = 1.0 - (distance * bound.inverse_square + extra_distance) / 2.0;
            assert!((product - expected).abs() < 1e-5, "{product} is not {expected}");
        }
    }

    #[test]
    fn zero_and_broken_keys_keep_the_bound_usable() {
        assert!(Bound::new(0.0).extra(0.0) == 1.0);
        assert!(larger_norm(4.0, f32::NAN) == 4.0 && larger_norm(4.0, f32::INFINITY) == 4.0);
        assert!(Bound::new(4.0).extra(f32::NAN) == 0.0 && Bound::new(4.0).extra(5.0) == 0.0);
    }
}
