//! Sixteen f32 as one value, on each instruction set: the unit of a page of 16 keys.

/// Sixteen f32 lanes. Implemented by a register (AVX-512), a pair of registers (AVX2) or an array (portable).
///
/// # Safety
/// Methods may use the instruction set of the implementation: they must only be called, inlined, from a function that
/// enables it, on a machine that has it. `load` and `store` access 16 consecutive f32 at any alignment.
pub(super) unsafe trait Lanes: Copy {
    /// Panels of 16 that a micro-kernel of six rows keeps in registers.
    const PANELS: usize;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(source: *const f32) -> Self;
    unsafe fn store(self, target: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// `self · factor + addend`.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// Lane-wise maximum; where `self` is NaN, `other`.
    unsafe fn max(self, other: Self) -> Self;
    /// 2 to the power of each lane, relative error below 3e-7; zero below −126, NaN for NaN.
    unsafe fn exp2(self) -> Self;
    unsafe fn reduce_max(self) -> f32;
}

/// Coefficients of 2^f on [−½, ½], highest power first (Taylor in f·ln 2, degree 6: 1.2e-7 at the ends).
const EXP2: [f32; 7] =
    [1.540_353e-4, 1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 0.240_226_5, std::f32::consts::LN_2, 1.0];

#[derive(Clone, Copy)]
pub(super) struct PortableLanes([f32; 16]);

// SAFETY: no instruction set beyond the target's own is used.
unsafe impl Lanes for PortableLanes {
    const PANELS: usize = 1;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 16])
    }

    #[inline(always)]
    unsafe fn load(source: *const f32) -> Self {
        // SAFETY: the caller promises 16 readable f32.
        Self(unsafe { source.cast::<[f32; 16]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32) {
        // SAFETY: the caller promises 16 writable f32.
        unsafe { target.cast::<[f32; 16]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] - other.0[lane]))
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] * other.0[lane]))
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        // Not fused: without FMA instructions `f32::mul_add` is a library call per lane.
        Self(std::array::from_fn(|lane| self.0[lane] * factor.0[lane] + addend.0[lane]))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| if self.0[lane] > other.0[lane] { self.0[lane] } else { other.0[lane] }))
    }

    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        Self(self.0.map(|x| {
            if x < -126.0 {
                return 0.0;
            }
            let clamped = if x > 128.0 { 128.0 } else { x };
            let whole = (clamped + 12_582_912.0) - 12_582_912.0;
            let fraction = clamped - whole;
            let mantissa = EXP2.iter().fold(0.0, |sum, coefficient| sum * fraction + coefficient);
            // Two steps, so that 2^128 overflows to infinity instead of wrapping into the sign.
            let half = ((whole as i32 >> 1) + 127) as u32;
            let rest = (whole as i32 - (whole as i32 >> 1) + 127) as u32;
            mantissa * f32::from_bits(half << 23) * f32::from_bits(rest << 23)
        }))
    }

    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{EXP2, Lanes};

    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2Lanes([__m256; 2]);

    impl Avx2Lanes {
        #[inline(always)]
        unsafe fn zip(self, other: Self, operation: impl Fn(__m256, __m256) -> __m256) -> Self {
            Self([operation(self.0[0], other.0[0]), operation(self.0[1], other.0[1])])
        }
    }

    // SAFETY: every method needs AVX2 and FMA, as the trait demands of its caller.
    unsafe impl Lanes for Avx2Lanes {
        const PANELS: usize = 1;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the caller enables AVX2 (trait contract); so for every block below.
            unsafe { Self([_mm256_set1_ps(value); 2]) }
        }

        #[inline(always)]
        unsafe fn load(source: *const f32) -> Self {
            // SAFETY: the caller promises 16 readable f32.
            unsafe { Self([_mm256_loadu_ps(source), _mm256_loadu_ps(source.add(8))]) }
        }

        #[inline(always)]
        unsafe fn store(self, target: *mut f32) {
            // SAFETY: the caller promises 16 writable f32.
            unsafe {
                _mm256_storeu_ps(target, self.0[0]);
                _mm256_storeu_ps(target.add(8), self.0[1]);
            }
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: as in `splat`.
            unsafe { self.zip(other, |a, b| _mm256_add_ps(a, b)) }
        }

        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            // SAFETY: as in `splat`.
            unsafe { self.zip(other, |a, b| _mm256_sub_ps(a, b)) }
        }

        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            // SAFETY: as in `splat`.
            unsafe { self.zip(other, |a, b| _mm256_mul_ps(a, b)) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
            // SAFETY: as in `splat`.
            unsafe {
                Self([
                    _mm256_fmadd_ps(self.0[0], factor.0[0], addend.0[0]),
                    _mm256_fmadd_ps(self.0[1], factor.0[1], addend.0[1]),
                ])
            }
        }

        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            // SAFETY: as in `splat`.
            unsafe { self.zip(other, |a, b| _mm256_max_ps(a, b)) }
        }

        #[inline(always)]
        unsafe fn exp2(self) -> Self {
            // SAFETY: as in `splat`.
            unsafe {
                Self(self.0.map(|x| {
                    let above = _mm256_cmp_ps::<_CMP_NLT_UQ>(x, _mm256_set1_ps(-126.0));
                    // The clamp keeps a NaN: `min` and `max` return the second operand.
                    let clamped = _mm256_min_ps(_mm256_set1_ps(128.0), _mm256_max_ps(_mm256_set1_ps(-126.0), x));
                    let whole = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(clamped);
                    let fraction = _mm256_sub_ps(clamped, whole);
                    let mut mantissa = _mm256_set1_ps(EXP2[0]);
                    for coefficient in &EXP2[1..] {
                        mantissa = _mm256_fmadd_ps(mantissa, fraction, _mm256_set1_ps(*coefficient));
                    }
                    // Two steps, so that 2^128 overflows to infinity instead of wrapping into the sign.
                    let exponent = _mm256_cvtps_epi32(whole);
                    let half = _mm256_srai_epi32::<1>(exponent);
                    let power =
                        |n| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))));
                    let value =
                        _mm256_mul_ps(_mm256_mul_ps(mantissa, power(half)), power(_mm256_sub_epi32(exponent, half)));
                    _mm256_and_ps(value, above)
                }))
            }
        }

        #[inline(always)]
        unsafe fn reduce_max(self) -> f32 {
            // SAFETY: as in `splat`.
            unsafe {
                let eight = _mm256_max_ps(self.0[0], self.0[1]);
                let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
            }
        }
    }

    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512Lanes(pub __m512);

    // SAFETY: every method needs AVX-512 F and DQ, as the trait demands of its caller.
    unsafe impl Lanes for Avx512Lanes {
        const PANELS: usize = 4;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the caller enables AVX-512 (trait contract); so for every block below.
            unsafe { Self(_mm512_set1_ps(value)) }
        }

        #[inline(always)]
        unsafe fn load(source: *const f32) -> Self {
            // SAFETY: the caller promises 16 readable f32.
            unsafe { Self(_mm512_loadu_ps(source)) }
        }

        #[inline(always)]
        unsafe fn store(self, target: *mut f32) {
            // SAFETY: the caller promises 16 writable f32.
            unsafe { _mm512_storeu_ps(target, self.0) }
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: as in `splat`.
            unsafe { Self(_mm512_add_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            // SAFETY: as in `splat`.
            unsafe { Self(_mm512_sub_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            // SAFETY: as in `splat`.
            unsafe { Self(_mm512_mul_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
            // SAFETY: as in `splat`.
            unsafe { Self(_mm512_fmadd_ps(self.0, factor.0, addend.0)) }
        }

        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            // SAFETY: as in `splat`.
            unsafe { Self(_mm512_max_ps(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn exp2(self) -> Self {
            // SAFETY: as in `splat`.
            unsafe {
                let whole = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0);
                // −∞ − −∞ would be NaN: where the result is zero anyhow, keep the fraction zero.
                let above = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(self.0, _mm512_set1_ps(-126.0));
                let fraction = _mm512_maskz_sub_ps(above, self.0, whole);
                let mut mantissa = _mm512_set1_ps(EXP2[0]);
                for coefficient in &EXP2[1..] {
                    mantissa = _mm512_fmadd_ps(mantissa, fraction, _mm512_set1_ps(*coefficient));
                }
                Self(_mm512_maskz_scalef_ps(above, mantissa, whole))
            }
        }

        #[inline(always)]
        unsafe fn reduce_max(self) -> f32 {
            // SAFETY: as in `splat`.
            unsafe { _mm512_reduce_max_ps(self.0) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2Lanes, Avx512Lanes};
