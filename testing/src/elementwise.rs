//! f64 references of linear layers, norms, rotary embedding, activations and softmax, each written as its definition.

/// Widens a slice.
pub fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// `output[r, o] = Σ_i input[r, i] · weights[o, i]` for `input` `[rows, in_features]` and `weights`
/// `[out_features, in_features]`.
pub fn linear(input: &[f32], weights: &[f32], in_features: usize) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    let rows = input.chunks_exact(in_features);
    rows.flat_map(|row| weights.chunks_exact(in_features).map(move |weights| dot(row, weights))).collect()
}

/// `x / √(mean(x²) + epsilon) · weight` for each row of `weight.len()` values.
pub fn rms_norm(input: &[f32], weight: &[f32], epsilon: f64) -> Vec<f64> {
    let mut output = Vec::with_capacity(input.len());
    for row in input.chunks_exact(weight.len()) {
        let mean = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / row.len() as f64;
        let scale = 1.0 / (mean + epsilon).sqrt();
        output.extend(row.iter().zip(weight).map(|(&x, &w)| f64::from(x) * scale * f64::from(w)));
    }
    output
}

/// Half-split rotary embedding of one head at one position: feature `i` turns with `i + frequencies.len()` by
/// `position · frequencies[i]` radians, and both are multiplied by `factor`.
pub fn rotate(head: &[f32], position: usize, frequencies: &[f64], factor: f64) -> Vec<f64> {
    let mut output = widen(head);
    for (pair, frequency) in frequencies.iter().enumerate() {
        let (sine, cosine) = (position as f64 * frequency).sin_cos();
        let (a, b) = (f64::from(head[pair]), f64::from(head[pair + frequencies.len()]));
        output[pair] = (a * cosine - b * sine) * factor;
        output[pair + frequencies.len()] = (b * cosine + a * sine) * factor;
    }
    output
}

/// `x / (1 + e^−x)`
pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// `x · Φ(x)` by the Maclaurin series of the error function, and its continued fraction from |x| = 3 on.
pub fn gelu(x: f64) -> f64 {
    let z = x.abs() / std::f64::consts::SQRT_2;
    let tail = if z < 2.2 {
        let (mut term, mut sum, mut n) = (z, z, 0.0);
        while term.abs() > 1e-18 * sum.abs() {
            n += 1.0;
            term *= -z * z / n;
            sum += term / (2.0 * n + 1.0);
        }
        1.0 - sum * 2.0 / std::f64::consts::PI.sqrt()
    } else {
        let fraction = (1..200).rev().fold(z, |fraction, k| z + f64::from(k) / 2.0 / fraction);
        (-z * z).exp() / (std::f64::consts::PI.sqrt() * fraction)
    };
    if x < 0.0 { x / 2.0 * tail } else { x - x / 2.0 * tail }
}

/// `x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`
pub fn gelu_tanh(x: f64) -> f64 {
    x / 2.0 * (1.0 + (std::f64::consts::FRAC_2_PI.sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
}

/// `ln Σ e^value`; −∞ for no values and where all are −∞.
pub fn log_sum_exp(values: &[f64]) -> f64 {
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY {
        return largest;
    }
    largest + values.iter().map(|value| (value - largest).exp()).sum::<f64>().ln()
}

/// `e^value / Σ e^value`; zero where all are −∞.
pub fn softmax(values: &[f64]) -> Vec<f64> {
    let log_sum_exp = log_sum_exp(values);
    if log_sum_exp == f64::NEG_INFINITY {
        return vec![0.0; values.len()];
    }
    values.iter().map(|value| (value - log_sum_exp).exp()).collect()
}
