//! Vectors of f32 behind one small trait, so that an operation is written once for every instruction set.
//!
//! A type that implements [`Simd`] is a *proof*: it exists only where the processor has the instructions, so its
//! methods are safe. An operation is a struct with one generic [`Operation::eval`], entered through [`run`].

pub(crate) mod exponential;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use crate::InstructionSet;

/// Vector primitives of one instruction set. Comparisons follow x86: with a NaN the second operand is taken.
pub(crate) trait Simd: Copy {
    /// A vector of [`Simd::LANES`] f32.
    type Vector: Copy;
    /// f32 in a vector.
    const LANES: usize;

    /// All lanes `value`.
    fn splat(self, value: f32) -> Self::Vector;
    /// The first `LANES` values. Panics when there are fewer.
    fn load(self, values: &[f32]) -> Self::Vector;
    /// `values` in the first lanes, `fill` in the others. Panics when there are `LANES` values or more.
    fn load_part(self, values: &[f32], fill: f32) -> Self::Vector;
    /// The first `LANES` brain floats, widened. Panics when there are fewer.
    fn load_brain(self, values: &[u16]) -> Self::Vector;
    /// The first `LANES` pairs of brain floats, widened: the first of each pair, and the second. Panics when there are
    /// fewer.
    fn load_brain_pairs(self, values: &[u16]) -> (Self::Vector, Self::Vector);
    /// Writes all lanes to the first `LANES` places. Panics when there are fewer.
    fn store(self, vector: Self::Vector, values: &mut [f32]);
    /// Writes the first lanes to `values`. Panics when there are `LANES` places or more.
    fn store_part(self, vector: Self::Vector, values: &mut [f32]);
    /// `a + b`
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a − b`
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a · b`
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a / b`
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a · b + c`, in one rounding where the instruction set has it.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// `a < b ? a : b`
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a > b ? a : b`
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a <= limit ? then : otherwise`; `otherwise` at NaN
    fn at_most(self, a: Self::Vector, limit: Self::Vector, then: Self::Vector, otherwise: Self::Vector)
    -> Self::Vector;
    /// One bit for each lane, the first lane's the lowest: whether `a < limit`.
    fn below(self, a: Self::Vector, limit: Self::Vector) -> u32;
    /// Writes `first` plus the place of each bit that is set, of the lowest `LANES`, to `places`, and returns how many there
    /// are. Panics when there are fewer than `LANES` places; those behind hold anything afterwards.
    #[inline(always)]
    fn store_places(self, bits: u32, first: u32, places: &mut [u32]) -> usize {
        assert!(places.len() >= Self::LANES, "a full vector");
        let (mut rest, mut used) = (bits & (u32::MAX >> (32 - Self::LANES)), 0);
        while rest != 0 {
            places[used] = first + rest.trailing_zeros();
            rest &= rest - 1;
            used += 1;
        }
        used
    }
    /// `a · 2^n` for whole `n` up to 252, and 0 where `n` is below `lowest`, which is −125 or more; with a NaN for either NaN.
    fn scale_by_power_of_two(self, a: Self::Vector, n: Self::Vector, lowest: Self::Vector) -> Self::Vector;
    /// A fraction from 0 to 1 and an exponent for [`scale_by_power_of_two`](Self::scale_by_power_of_two), which together
    /// make 2^x: for x up to 127 and down to the lowest that is no 0. A NaN stays in the fraction.
    #[inline(always)]
    fn split_exponent(self, x: Self::Vector) -> (Self::Vector, Self::Vector) {
        exponential::split_exponent(self, x)
    }
    /// Sum of the lanes, in an order that depends on the instruction set only.
    fn reduce_add(self, a: Self::Vector) -> f32;
    /// The sum of the lanes of each of up to sixteen vectors, whatever the others are.
    #[inline(always)]
    fn reduce_add_each<const N: usize>(self, vectors: &[Self::Vector; N]) -> [f32; N] {
        let mut sums = [0.0; N];
        for (sum, vector) in sums.iter_mut().zip(vectors) {
            *sum = self.reduce_add(*vector);
        }
        sums
    }
    /// Largest lane; a NaN may be passed over.
    fn reduce_max(self, a: Self::Vector) -> f32;
}

/// A piece of work written once for every instruction set.
pub(crate) trait Operation {
    /// What the work returns.
    type Output;
    /// The body. Implementations are `#[inline(always)]`, so that they are compiled with the caller's instructions.
    fn eval<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `operation` with the instructions of `level`.
///
/// # Panics
/// When the machine does not have `level`.
pub(crate) fn run<O: Operation>(level: InstructionSet, operation: O) -> O::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if level >= InstructionSet::Avx512 {
            return avx512::Avx512::new().expect("the machine has AVX-512").enter(operation);
        }
        if level == InstructionSet::Avx2 {
            return avx2::Avx2::new().expect("the machine has AVX2 and FMA").enter(operation);
        }
    }
    assert_eq!(level, InstructionSet::Portable, "the machine has the level");
    operation.eval(portable::Portable)
}

// The closures given to the helpers below need `#[inline(always)]` like every body of an operation: compiled on their
// own, without the instructions of the caller, each primitive in them would be a function call.

/// Replaces each value by `map(value)`.
#[inline(always)]
pub(crate) fn map_in_place<S: Simd>(simd: S, values: &mut [f32], map: impl Fn(S::Vector) -> S::Vector) {
    let mut chunks = values.chunks_exact_mut(S::LANES);
    for chunk in &mut chunks {
        simd.store(map(simd.load(chunk)), chunk);
    }
    let rest = chunks.into_remainder();
    if !rest.is_empty() {
        simd.store_part(map(simd.load_part(rest, 0.0)), rest);
    }
}

/// Writes `map(output, input)` to each place of `output`; both are of one length.
#[inline(always)]
pub(crate) fn zip_in_place<S: Simd>(
    simd: S,
    output: &mut [f32],
    input: &[f32],
    map: impl Fn(S::Vector, S::Vector) -> S::Vector,
) {
    let mut outputs = output.chunks_exact_mut(S::LANES);
    let mut inputs = input.chunks_exact(S::LANES);
    for (output, input) in (&mut outputs).zip(&mut inputs) {
        simd.store(map(simd.load(output), simd.load(input)), output);
    }
    let (output, input) = (outputs.into_remainder(), inputs.remainder());
    if !output.is_empty() {
        simd.store_part(map(simd.load_part(output, 0.0), simd.load_part(input, 0.0)), output);
    }
}

/// `Σ term(value)` over `values`. Blocks of 1,024 values are summed in f32 and the blocks in f64, so that the error
/// does not grow with the length. `term` of `fill` must be zero: it stands in the lanes behind the last value.
#[inline(always)]
pub(crate) fn sum_of<S: Simd>(simd: S, values: &[f32], fill: f32, term: impl Fn(S::Vector) -> S::Vector) -> f64 {
    const BLOCK: usize = 1024;
    let mut total = 0.0;
    for block in values.chunks(BLOCK) {
        let mut sum = simd.splat(0.0);
        let mut chunks = block.chunks_exact(S::LANES);
        for chunk in &mut chunks {
            sum = simd.add(sum, term(simd.load(chunk)));
        }
        if !chunks.remainder().is_empty() {
            sum = simd.add(sum, term(simd.load_part(chunks.remainder(), fill)));
        }
        total += f64::from(simd.reduce_add(sum));
    }
    total
}

#[cfg(test)]
mod tests {
    /// A primitive in a function that is not compiled with the caller's instructions (a trait's default method, a closure
    /// given to the standard library) is a call for each vector: AVX2 attention once took three times as long for it, with
    /// the same results.
    #[test]
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    fn no_primitive_became_a_function() {
        use object::{Object, ObjectSymbol};

        let path = std::env::current_exe().expect("a test has an executable");
        let bytes = std::fs::read(&path).expect("it can be read");
        let file = object::File::parse(&*bytes).expect("an executable");
        let names = file.symbols().filter_map(|symbol| symbol.name().ok().map(str::to_owned));
        let names: Vec<_> = names.filter(|name| name.contains("iceformer_kernels") || name.contains("_mm")).collect();
        assert!(names.iter().any(|name| name.contains("enter")), "{} has symbols", path.display());
        // Loads and stores come with checks in such a build, and are left alone in very large functions.
        let is_checked = |name: &str| name.contains("loadu") || name.contains("storeu");
        let is_primitive =
            |name: &str| name.contains("core_arch") && ["_mm256_", "_mm512_"].iter().any(|p| name.contains(p));
        let functions: Vec<_> = names.iter().filter(|name| is_primitive(name) && !is_checked(name)).collect();
        assert!(functions.is_empty(), "functions that should be instructions: {functions:#?}");
    }
}
