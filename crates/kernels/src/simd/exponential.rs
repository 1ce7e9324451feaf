//! `e^x` and `erfc` on vectors, by polynomials of our own (minimax fits by Lawson's iteration in f64).

use super::Simd;

/// Above: `e^x` is infinite in f32. Below −104: zero. Inputs are clamped to these before the exponent is split off.
const HIGHEST: f32 = 89.0;
const LOWEST: f32 = -104.0;

/// The same for `2^x`.
const HIGHEST_EXPONENT: f32 = 127.0;
const LOWEST_EXPONENT: f32 = -151.0;

/// 1.5 · 2²³: adding it rounds a small f32 to a whole number.
const ROUND: f32 = 12_582_912.0;

/// ln 2 in two parts; the first has so few bits that its product with a whole number below 2⁹ is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// `(e^r − 1 − r) / r²` for |r| ≤ ln 2 / 2, relative error of the whole 3·10⁻⁹.
const EXP: [f32; 5] = [0.5, 0.166_665_2, 0.041_666_206, 0.008_368_909, 0.001_395_051_6];

/// Powers of two below which a result is zero. Processors take some hundred cycles over every operation with a subnormal
/// number, so that a few keys of no account made attention thirty times slower.
const LOWEST_NORMAL: f32 = -125.0;
/// The same for weights of a softmax, relative to the largest: 10⁻³⁰, so that their products with other factors are no
/// subnormal numbers either. Below the last place of any sum of fewer than 10²³ of them.
pub(crate) const LOWEST_WEIGHT: f32 = -100.0;

/// `e^x`: within 2 units in the last place, and 0 instead of a subnormal number or one less than twice the smallest
/// normal; 0 at −∞, +∞ at +∞ and NaN at NaN.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    exp_from(simd, x, LOWEST_NORMAL)
}

/// `e^x` as the weight of a key whose logit is `x` above the largest: 0 where it is below 2^[`LOWEST_WEIGHT`].
#[inline(always)]
pub(crate) fn weight<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    exp_from(simd, x, LOWEST_WEIGHT)
}

#[inline(always)]
fn exp_from<S: Simd>(simd: S, x: S::Vector, lowest: f32) -> S::Vector {
    // A NaN is the second operand, so it stays.
    let x = simd.max(simd.splat(LOWEST), simd.min(simd.splat(HIGHEST), x));
    let n = simd.sub(simd.mul_add(x, simd.splat(std::f32::consts::LOG2_E), simd.splat(ROUND)), simd.splat(ROUND));
    let r = simd.mul_add(n, simd.splat(-LN_2_HIGH), x);
    let r = simd.mul_add(n, simd.splat(-LN_2_LOW), r);
    let tail = polynomial(simd, r, EXP);
    let one_and_r = simd.add(simd.splat(1.0), r);
    simd.scale_by_power_of_two(simd.mul_add(simd.mul(r, r), tail, one_and_r), n, simd.splat(lowest))
}

/// `(2^f − 1) / f` for f from 0 to 1; with it 2^f has a relative error of 8·10⁻⁸, and 2^0 is 1 exactly.
const EXP2: [f32; 5] = [0.693_151_3, 0.240_164_44, 0.055_799_913, 0.009_017_031, 0.001_867_13];

/// `2^x` for x up to 127: within 3 units in the last place, and 0 below 2^[`LOWEST_WEIGHT`]; 0 at −∞ and NaN at NaN.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    let (fraction, exponent) = simd.split_exponent(x);
    let slope = polynomial(simd, fraction, EXP2);
    simd.scale_by_power_of_two(simd.mul_add(slope, fraction, simd.splat(1.0)), exponent, simd.splat(LOWEST_WEIGHT))
}

/// [`Simd::split_exponent`] where no instruction does it.
#[inline(always)]
pub(super) fn split_exponent<S: Simd>(simd: S, x: S::Vector) -> (S::Vector, S::Vector) {
    // A NaN is the second operand, so it stays in the fraction; the exponent it leaves scales it to NaN all the same.
    let x = simd.max(simd.splat(LOWEST_EXPONENT), simd.min(simd.splat(HIGHEST_EXPONENT), x));
    let floor = simd.sub(simd.add(simd.sub(x, simd.splat(0.5)), simd.splat(ROUND)), simd.splat(ROUND));
    (simd.sub(x, floor), floor)
}

/// `e^{z²} · erfc(z)` in `t = 1 / (1 + 0.4 z)` for z from 0 to 10.5, relative error 4·10⁻⁸.
const ERFC: [f32; 10] = [
    2.217_273_7e-5,
    0.225_167_81,
    0.230_622_19,
    0.180_951_61,
    0.258_085_43,
    -0.048_319_984,
    0.250_766_43,
    -0.044_439_323,
    -0.083_128_86,
    0.030_272_56,
];

/// `erfc(z)` for `z ≥ 0`: 0 for large z, NaN at NaN.
#[inline(always)]
pub(crate) fn erfc_of_positive<S: Simd>(simd: S, z: S::Vector) -> S::Vector {
    let one = simd.splat(1.0);
    let t = simd.div(one, simd.mul_add(z, simd.splat(0.4), one));
    let minus_square = simd.sub(simd.splat(0.0), simd.mul(z, z));
    simd.mul(polynomial(simd, t, ERFC), exp(simd, minus_square))
}

/// Horner's rule; the constant term comes first.
#[inline(always)]
pub(crate) fn polynomial<S: Simd, const N: usize>(simd: S, x: S::Vector, coefficients: [f32; N]) -> S::Vector {
    let mut value = simd.splat(coefficients[N - 1]);
    for &coefficient in coefficients[..N - 1].iter().rev() {
        value = simd.mul_add(value, x, simd.splat(coefficient));
    }
    value
}
