//! How far a result is from its reference.

use std::fmt::Display;

/// Largest `|actual − expected|` over the largest `|expected|` of the slice; infinite when only one of them is finite
/// or NaN at some place, so that a NaN never passes.
///
/// # Panics
/// When the lengths differ.
pub fn relative_error(actual: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len(), "one reference for each result");
    let scale = expected.iter().filter(|value| value.is_finite()).fold(0.0, |a: f64, b| a.max(b.abs()));
    let error = |(&actual, &expected): (&f32, &f64)| {
        let actual = f64::from(actual);
        if actual == expected || (actual.is_nan() && expected.is_nan()) {
            0.0
        } else if actual.is_finite() && expected.is_finite() {
            (actual - expected).abs()
        } else {
            f64::INFINITY
        }
    };
    let largest = actual.iter().zip(expected).map(error).fold(0.0, f64::max);
    if largest == 0.0 { 0.0 } else { largest / scale.max(f64::MIN_POSITIVE) }
}

/// `|actual − expected|` in units of the last place of `expected` as an f32; infinite when one of them is not finite
/// and the other differs.
pub fn units_in_last_place(actual: f32, expected: f64) -> f64 {
    let rounded = expected as f32;
    if actual == rounded || (actual.is_nan() && expected.is_nan()) {
        return 0.0;
    }
    // An f32 one step below infinity is a fair answer for a value that rounds to infinity only just.
    let step = |value: f32| f64::from(f32::from_bits(value.abs().to_bits() + 1)) - f64::from(value.abs());
    if !actual.is_finite() || !rounded.is_finite() {
        return f64::INFINITY;
    }
    (f64::from(actual) - expected).abs() / step(rounded.min(f32::from_bits(f32::MAX.to_bits() - 1)))
}

/// Fails with `what` and the worst place when [`relative_error`] is above `tolerance`.
#[track_caller]
pub fn assert_close(actual: &[f32], expected: &[f64], tolerance: f64, what: impl Display) {
    let error = relative_error(actual, expected);
    if error <= tolerance {
        return;
    }
    let distance = |index: &usize| {
        let distance = (f64::from(actual[*index]) - expected[*index]).abs();
        if distance.is_nan() { f64::INFINITY } else { distance }
    };
    let worst = (0..actual.len()).max_by(|a, b| distance(a).total_cmp(&distance(b))).expect("an element");
    panic!(
        "{what}: relative error {error:.3e} is above {tolerance:.1e}; element {worst} is {}, expected {}",
        actual[worst], expected[worst]
    );
}

/// `Σ p ln(p / q)` in nats for the softmax `p` of the `reference` logits and `q` of the `actual` ones.
///
/// # Panics
/// When the lengths differ.
pub fn divergence(reference: &[f32], actual: &[f32]) -> f64 {
    assert_eq!(reference.len(), actual.len(), "one logit for each token of the vocabulary");
    let log_softmax = |logits: &[f32]| {
        let logits: Vec<f64> = logits.iter().copied().map(f64::from).collect();
        let log_sum_exp = crate::elementwise::log_sum_exp(&logits);
        logits.into_iter().map(|logit| logit - log_sum_exp).collect::<Vec<_>>()
    };
    let (p, q) = (log_softmax(reference), log_softmax(actual));
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
}
