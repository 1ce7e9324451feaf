//! Plain Rust: four lanes that the compiler maps to the baseline vectors of the target.

use super::Simd;

/// Needs no proof: every machine has it.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

const LANES: usize = 4;
type Vector = [f32; LANES];

#[inline(always)]
fn lanes(f: impl Fn(usize) -> f32) -> Vector {
    std::array::from_fn(f)
}

impl Simd for Portable {
    type Vector = Vector;
    const LANES: usize = LANES;

    #[inline(always)]
    fn splat(self, value: f32) -> Vector {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, values: &[f32]) -> Vector {
        *values.first_chunk().expect("a full vector")
    }

    #[inline(always)]
    fn load_part(self, values: &[f32], fill: f32) -> Vector {
        let mut vector = [fill; LANES];
        vector[..LANES - 1][..values.len()].copy_from_slice(values);
        vector
    }

    #[inline(always)]
    fn load_brain(self, values: &[u16]) -> Vector {
        let values: [u16; LANES] = *values.first_chunk().expect("a full vector");
        lanes(|i| f32::from_bits(u32::from(values[i]) << 16))
    }

    #[inline(always)]
    fn load_brain_pairs(self, values: &[u16]) -> (Vector, Vector) {
        let values: [u16; 2 * LANES] = *values.first_chunk().expect("a full vector of pairs");
        let widened = |place: usize| f32::from_bits(u32::from(values[place]) << 16);
        (lanes(|i| widened(2 * i)), lanes(|i| widened(2 * i + 1)))
    }

    #[inline(always)]
    fn store(self, vector: Vector, values: &mut [f32]) {
        *values.first_chunk_mut().expect("a full vector") = vector;
    }

    #[inline(always)]
    fn store_part(self, vector: Vector, values: &mut [f32]) {
        values.copy_from_slice(&vector[..LANES - 1][..values.len()]);
    }

    #[inline(always)]
    fn add(self, a: Vector, b: Vector) -> Vector {
        lanes(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Vector, b: Vector) -> Vector {
        lanes(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Vector, b: Vector) -> Vector {
        lanes(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Vector, b: Vector) -> Vector {
        lanes(|i| a[i] / b[i])
    }

    // Not `f32::mul_add`: without the instruction it is a slow call.
    #[inline(always)]
    fn mul_add(self, a: Vector, b: Vector, c: Vector) -> Vector {
        lanes(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn min(self, a: Vector, b: Vector) -> Vector {
        lanes(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn max(self, a: Vector, b: Vector) -> Vector {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn at_most(self, a: Vector, limit: Vector, then: Vector, otherwise: Vector) -> Vector {
        lanes(|i| if a[i] <= limit[i] { then[i] } else { otherwise[i] })
    }

    #[inline(always)]
    fn below(self, a: Vector, limit: Vector) -> u32 {
        (0..LANES).fold(0, |bits, i| bits | u32::from(a[i] < limit[i]) << i)
    }

    #[inline(always)]
    fn scale_by_power_of_two(self, a: Vector, n: Vector, lowest: Vector) -> Vector {
        // In two steps, since 2^n itself may be no f32; the first step is exact.
        let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
        lanes(|i| {
            let wanted = if n[i] < lowest[i] { 0 } else { u32::MAX };
            // The low bits of 1.5 · 2²³ + n hold n: cheaper than a saturating conversion.
            let n = (n[i] + 12_582_912.0).to_bits() as i32 - 0x4b40_0000;
            let half = n >> 1;
            a[i] * power(half) * f32::from_bits(power(n - half).to_bits() & wanted)
        })
    }

    #[inline(always)]
    fn reduce_add(self, a: Vector) -> f32 {
        (a[0] + a[2]) + (a[1] + a[3])
    }

    #[inline(always)]
    fn reduce_max(self, a: Vector) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}
