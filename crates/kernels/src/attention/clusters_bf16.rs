//! AVX-512 BF16 kernels of cluster summaries: estimates of masses, and sums of mean values, for up to six rows.

use std::arch::x86_64::*;

use super::PANEL_CLUSTERS;
use super::clusters::{MOST_EXCESS, MOST_HALF_VARIANCE, MOST_ROWS_OF_PAIRS};
use super::softmax::exp2;

/// Pointers of one estimate. Row `r` of `queries` and `half_squares` starts `r · key_dim` elements on, of the two
/// outputs `r · stride`; `panels` whole panels of means, of variances and of farthest keys follow each other.
pub(super) struct BrainEstimate {
    pub queries: *const u16,
    pub half_squares: *const u16,
    pub key_dim: usize,
    pub means: *const u16,
    pub variances: *const u16,
    pub farthest: *const u16,
    /// Keys of a cluster.
    pub keys: f32,
    pub panels: usize,
    pub log_masses: *mut f32,
    pub uncertainties: *mut f32,
    pub stride: usize,
}

/// Estimates for `rows` (1 to 6) rows.
///
/// # Safety
/// The machine has the features, and the pointers of `estimate` hold for `rows` rows and its panels.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn estimate_rows(rows: usize, estimate: &BrainEstimate) {
    // SAFETY: forwarded from the caller.
    unsafe {
        match rows {
            1 => estimate_panels::<1>(estimate),
            2 => estimate_panels::<2>(estimate),
            3 => estimate_panels::<3>(estimate),
            4 => estimate_panels::<4>(estimate),
            5 => estimate_panels::<5>(estimate),
            _ => estimate_panels::<6>(estimate),
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn estimate_panels<const ROWS: usize>(estimate: &BrainEstimate) {
    // SAFETY: forwarded from the caller; `panel + PANELS <= panels`.
    unsafe {
        let mut panel = 0;
        while ROWS <= MOST_ROWS_OF_PAIRS && panel + 1 < estimate.panels {
            estimate_block::<ROWS, 2>(estimate, panel);
            panel += 2;
        }
        while panel < estimate.panels {
            estimate_block::<ROWS, 1>(estimate, panel);
            panel += 1;
        }
    }
}

/// Three sums for each row and panel: those of two panels for four rows fill 24 of the 32 registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn estimate_block<const ROWS: usize, const PANELS: usize>(estimate: &BrainEstimate, panel: usize) {
    // SAFETY: a panel is `[key_dim / 2][16]` pairs, a row of queries `key_dim / 2` pairs; the outputs hold 16 columns
    // for each panel.
    unsafe {
        let steps = estimate.key_dim / 2;
        let means = estimate.means.cast::<__m512i>().add(panel * steps);
        let variances = estimate.variances.cast::<__m512i>().add(panel * steps);
        let farthest = estimate.farthest.cast::<__m512i>().add(panel * steps);
        let (queries, half_squares) = (estimate.queries.cast::<i32>(), estimate.half_squares.cast::<i32>());
        let mut logits = [[_mm512_setzero_ps(); PANELS]; ROWS];
        let mut halves = [[_mm512_setzero_ps(); PANELS]; ROWS];
        let mut lone = [[_mm512_setzero_ps(); PANELS]; ROWS];
        for step in 0..steps {
            let mut mean = [_mm512_setzero_si512(); PANELS];
            let mut variance = [_mm512_setzero_si512(); PANELS];
            let mut far = [_mm512_setzero_si512(); PANELS];
            for panel in 0..PANELS {
                mean[panel] = _mm512_loadu_si512(means.add(panel * steps + step));
                variance[panel] = _mm512_loadu_si512(variances.add(panel * steps + step));
                far[panel] = _mm512_loadu_si512(farthest.add(panel * steps + step));
            }
            for row in 0..ROWS {
                let query = pairs(_mm512_set1_epi32(queries.add(row * steps + step).read_unaligned()));
                let half_square = pairs(_mm512_set1_epi32(half_squares.add(row * steps + step).read_unaligned()));
                for panel in 0..PANELS {
                    logits[row][panel] = _mm512_dpbf16_ps(logits[row][panel], pairs(mean[panel]), query);
                    halves[row][panel] = _mm512_dpbf16_ps(halves[row][panel], pairs(variance[panel]), half_square);
                    lone[row][panel] = _mm512_dpbf16_ps(lone[row][panel], pairs(far[panel]), query);
                }
            }
        }
        let most_half = _mm512_set1_ps(MOST_HALF_VARIANCE);
        let most_excess = _mm512_set1_ps(MOST_EXCESS);
        let twice_in_octaves = _mm512_set1_ps(2.0 * std::f32::consts::LOG2_E);
        let log_keys = _mm512_set1_ps(estimate.keys.ln());
        let half_keys = _mm512_set1_ps(0.5 * estimate.keys);
        for row in 0..ROWS {
            for column in 0..PANELS {
                // With a NaN x86 takes the second operand: the half variance, so that a NaN stays.
                let half = _mm512_min_ps(most_half, halves[row][column]);
                let excess = _mm512_min_ps(most_excess, _mm512_sub_ps(halves[row][column], half));
                let uncertainty = _mm512_mul_ps(half, exp2(_mm512_mul_ps(excess, twice_in_octaves)));
                // The mass of the farthest key beside that of all.
                let lone = _mm512_sub_ps(lone[row][column], log_keys);
                let part = _mm512_min_ps(_mm512_setzero_ps(), _mm512_sub_ps(lone, half));
                let alone = _mm512_mul_ps(half_keys, exp2(_mm512_mul_ps(part, twice_in_octaves)));
                let log_mass = _mm512_add_ps(logits[row][column], _mm512_max_ps(half, lone));
                let place = row * estimate.stride + (panel + column) * PANEL_CLUSTERS;
                _mm512_storeu_ps(estimate.log_masses.add(place), log_mass);
                _mm512_storeu_ps(estimate.uncertainties.add(place), _mm512_max_ps(uncertainty, alone));
            }
        }
    }
}

/// Pointers of a weighted sum of values: `output += weights · values`. Row `r` of weights starts `r · stride` elements
/// on, of output `r · value_dim`; values are `[pairs][value_dim][2]`.
pub(super) struct BrainSum {
    pub weights: *const u16,
    pub stride: usize,
    pub values: *const u16,
    pub pairs: usize,
    pub value_dim: usize,
    pub output: *mut f32,
}

/// Sums for `rows` (1 to 6) rows.
///
/// # Safety
/// The machine has the features; the pointers of `sum` hold for `rows` rows, and `value_dim` is a multiple of 16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn sum_rows(rows: usize, sum: &BrainSum) {
    // SAFETY: forwarded from the caller.
    unsafe {
        match rows {
            1 => sum_columns::<1>(sum),
            2 => sum_columns::<2>(sum),
            3 => sum_columns::<3>(sum),
            4 => sum_columns::<4>(sum),
            5 => sum_columns::<5>(sum),
            _ => sum_columns::<6>(sum),
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn sum_columns<const ROWS: usize>(sum: &BrainSum) {
    // SAFETY: forwarded from the caller; `column + PANELS · 16 <= value_dim`.
    unsafe {
        let mut column = 0;
        while column < sum.value_dim {
            let panels = ((sum.value_dim - column) / PANEL_CLUSTERS).min(4);
            match panels {
                4 => sum_block::<ROWS, 4>(sum, column),
                3 => sum_block::<ROWS, 3>(sum, column),
                2 => sum_block::<ROWS, 2>(sum, column),
                _ => sum_block::<ROWS, 1>(sum, column),
            }
            column += panels * PANEL_CLUSTERS;
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn sum_block<const ROWS: usize, const PANELS: usize>(sum: &BrainSum, column: usize) {
    // SAFETY: values are `[pairs][value_dim]` pairs, a row of weights has `pairs` pairs, a row of output `value_dim`
    // floats, and the columns are within it.
    unsafe {
        let values = sum.values.cast::<i32>().add(column);
        let output = sum.output.add(column);
        let mut sums = [[_mm512_setzero_ps(); PANELS]; ROWS];
        for (row, sums) in sums.iter_mut().enumerate() {
            for (panel, sum_of_panel) in sums.iter_mut().enumerate() {
                *sum_of_panel = _mm512_loadu_ps(output.add(row * sum.value_dim + panel * 16));
            }
        }
        for pair in 0..sum.pairs {
            let mut lanes = [_mm512_setzero_si512(); PANELS];
            for (panel, lanes) in lanes.iter_mut().enumerate() {
                *lanes = _mm512_loadu_si512(values.add(pair * sum.value_dim + panel * 16).cast());
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let weights = sum.weights.add(row * sum.stride).cast::<i32>().add(pair).read_unaligned();
                let weights = pairs(_mm512_set1_epi32(weights));
                for (sum_of_panel, lanes) in sums.iter_mut().zip(lanes) {
                    *sum_of_panel = _mm512_dpbf16_ps(*sum_of_panel, pairs(lanes), weights);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (panel, sum_of_panel) in sums.iter().enumerate() {
                _mm512_storeu_ps(output.add(row * sum.value_dim + panel * 16), *sum_of_panel);
            }
        }
    }
}

/// Rounds `values` to brain floats.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn round(values: &[f32], brain: &mut [u16]) {
    let (chunks, rest) = values.as_chunks::<16>();
    for (chunk, target) in chunks.iter().zip(brain.as_chunks_mut::<16>().0) {
        // SAFETY: both are 16 elements long, and the two vector types have no invalid bit patterns.
        unsafe {
            let rounded: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(chunk.as_ptr())));
            _mm256_storeu_si256(target.as_mut_ptr().cast(), rounded);
        }
    }
    let done = 16 * chunks.len();
    brain[done..].iter_mut().zip(rest).for_each(|(target, value)| *target = half::bf16::from_f32(*value).to_bits());
}

/// The bits of a vector of bf16 pairs as the dot product wants them.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both types are 64 bytes without invalid bit patterns.
    unsafe { std::mem::transmute(bits) }
}
