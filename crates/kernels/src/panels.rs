//! Vectors against rows of numbers that lie in panels of sixteen, for searches: dot products of many vectors with few rows.
//!
//! A panel holds one column of its rows after the other, so that a product fills the lanes with rows and needs no sum across
//! them, and vectors that meet the same panel share what was read of it.

use std::ops::Range;

use crate::InstructionSet;
use crate::attention;
use crate::rows::{Element, ROW_MULTIPLE};
use crate::simd::{self, Operation, Simd};

/// Rows of a panel.
pub const PANEL_ROWS: usize = 16;

/// Panels `[panels, width, PANEL_ROWS]`, the last filled up with any numbers; the width is a multiple of [`ROW_MULTIPLE`].
#[derive(Clone, Copy, Debug)]
pub enum Panels<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// 16-bit brain floats, widened as they are read.
    Bf16(&'a [u16]),
}

impl Panels<'_> {
    /// Name of the kernel that runs on panels of this type at `level`, as reports print it.
    pub fn kernel_name(self, level: InstructionSet) -> &'static str {
        use InstructionSet::{Avx2, Portable};
        match (self, level) {
            (Self::F32(_), Portable) => "panels-f32-portable",
            (Self::F32(_), Avx2) => "panels-f32-avx2",
            (Self::F32(_), _) => "panels-f32-avx512",
            (Self::Bf16(_), Portable) => "panels-bf16-portable",
            (Self::Bf16(_), Avx2) => "panels-bf16-avx2",
            (Self::Bf16(_), _) => "panels-bf16-avx512",
        }
    }
}

/// The places of row `row` in `panels`, one for each column.
///
/// # Panics
/// When there are fewer panels.
pub fn row_mut<T>(panels: &mut [T], row: usize, width: usize) -> impl Iterator<Item = &mut T> {
    let panel = &mut panels[row / PANEL_ROWS * PANEL_ROWS * width..][..PANEL_ROWS * width];
    panel.as_chunks_mut::<PANEL_ROWS>().0.iter_mut().map(move |column| &mut column[row % PANEL_ROWS])
}

/// Some rows that a vector is compared with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Visit {
    /// Which vector.
    pub vector: u32,
    /// The first row.
    pub first_row: u32,
    /// Number of rows.
    pub rows: u32,
    /// Where the first product is written.
    pub place: u32,
}

impl Visit {
    fn rows(&self) -> Range<usize> {
        self.first_row as usize..self.first_row as usize + self.rows as usize
    }
}

/// Writes the products of all `visits` of the `vectors` `[vectors, width]` to the same panels. A product does not depend on
/// the other visits and rows of the call, to the last bit.
///
/// # Panics
/// When the width is no multiple of [`ROW_MULTIPLE`], or a visit names a vector, row or place that does not exist.
pub fn dot_panels(vectors: &[f32], width: usize, panels: Panels<'_>, visits: &[Visit], output: &mut [f32]) {
    dots_at(InstructionSet::current(), Dots { vectors, width, panels, visits, output });
}

/// Asks the memory for panels that will be needed soon, up to 1 KiB of them: behind that the hardware sees the pattern.
pub fn fetch(panels: Panels<'_>) {
    fn lines<T>(values: &[T]) {
        attention::fetch(&values[..values.len().min(1024 / size_of::<T>())]);
    }
    match panels {
        Panels::F32(values) => lines(values),
        Panels::Bf16(values) => lines(values),
    }
}

fn dots_at(level: InstructionSet, dots: Dots<'_>) {
    assert!(dots.width.is_multiple_of(ROW_MULTIPLE), "a width that is no multiple of {ROW_MULTIPLE}");
    simd::run(level, dots);
}

struct Dots<'a> {
    vectors: &'a [f32],
    width: usize,
    panels: Panels<'a>,
    visits: &'a [Visit],
    output: &'a mut [f32],
}

impl Operation for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        match self.panels {
            Panels::F32(panels) => self.of_panels(simd, panels),
            Panels::Bf16(panels) => self.of_panels(simd, panels),
        }
    }
}

impl Dots<'_> {
    #[inline(always)]
    fn of_panels<S: Simd, E: Element>(self, simd: S, panels: &[E]) {
        let Self { vectors, width, mut visits, output, .. } = self;
        // As many at a time as leave registers for their sums.
        while S::LANES == 16 && visits.len() > 2 {
            let (some, others) = visits.split_at(visits.len().min(4));
            together::<S, E, 4>(simd, vectors, width, panels, some, output);
            visits = others;
        }
        while visits.len() > 1 {
            let (some, others) = visits.split_at(2);
            together::<S, E, 2>(simd, vectors, width, panels, some, output);
            visits = others;
        }
        if !visits.is_empty() {
            together::<S, E, 1>(simd, vectors, width, panels, visits, output);
        }
    }
}

/// Up to `N` visits; the last stands for those that are missing.
#[inline(always)]
fn together<S: Simd, E: Element, const N: usize>(
    simd: S,
    vectors: &[f32],
    width: usize,
    panels: &[E],
    visits: &[Visit],
    output: &mut [f32],
) {
    let mut of_visit = [&vectors[..0]; N];
    let (mut start, mut end) = (usize::MAX, 0);
    for n in 0..N {
        let visit = &visits[n.min(visits.len() - 1)];
        of_visit[n] = &vectors[visit.vector as usize * width..][..width];
        (start, end) = (start.min(visit.rows().start), end.max(visit.rows().end));
    }
    for panel in start / PANEL_ROWS..end.div_ceil(PANEL_ROWS) {
        let first = panel * PANEL_ROWS;
        let products = block::<S, E, N>(simd, &of_visit, &panels[first * width..][..PANEL_ROWS * width]);
        for (visit, products) in visits.iter().zip(&products) {
            let rows = visit.rows();
            let of_panel = rows.start.max(first)..rows.end.min(first + PANEL_ROWS);
            if of_panel.is_empty() {
                continue;
            }
            let output = &mut output[visit.place as usize + of_panel.start - rows.start..][..of_panel.len()];
            match output.first_chunk_mut() {
                // Of a length that is known, this is a store.
                Some(output) => *output = *products,
                None => output.copy_from_slice(&products[of_panel.start - first..][..of_panel.len()]),
            }
        }
    }
}

/// Sums of one product, which do not wait for each other.
const SUMS: usize = 4;

/// The products of `N` vectors with the rows of one panel.
#[inline(always)]
fn block<S: Simd, E: Element, const N: usize>(simd: S, vectors: &[&[f32]; N], panel: &[E]) -> [[f32; PANEL_ROWS]; N] {
    let mut output = [[0.0; PANEL_ROWS]; N];
    // In arrays, whose constant length needs no check in the inner loop.
    let columns = panel.as_chunks::<PANEL_ROWS>().0.as_chunks::<SUMS>().0;
    let mut of_vector = [vectors[0].as_chunks::<SUMS>().0; N];
    for n in 0..N {
        of_vector[n] = &vectors[n].as_chunks::<SUMS>().0[..columns.len()];
    }
    for lane in (0..PANEL_ROWS).step_by(S::LANES) {
        let mut sums = [[simd.splat(0.0); SUMS]; N];
        for step in 0..columns.len() {
            for sum in 0..SUMS {
                let rows = E::load(simd, &columns[step][sum][lane..]);
                for n in 0..N {
                    sums[n][sum] = simd.mul_add(simd.splat(of_vector[n][step][sum]), rows, sums[n][sum]);
                }
            }
        }
        for n in 0..N {
            let [a, b, c, d] = sums[n];
            simd.store(simd.add(simd.add(a, b), simd.add(c, d)), &mut output[n][lane..]);
        }
    }
    output
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use iceformer_testing::random::Random;

    use super::*;
    use crate::elementwise::levels;

    #[test]
    fn products_of_every_range_and_width() {
        let mut random = Random::new(1);
        for level in levels() {
            for width in [0, 16, 48, 64, 128, 256] {
                let (vectors, rows) = (random.normals(7 * width, 1.0), 40_usize);
                let mut wide = vec![f32::NAN; rows.next_multiple_of(PANEL_ROWS) * width];
                for row in 0..rows {
                    row_mut(&mut wide, row, width)
                        .zip(random.normals(width, 1.0))
                        .for_each(|(place, value)| *place = value);
                }
                let narrow: Vec<u16> = wide.iter().map(|&value| bf16::from_f32(value).to_bits()).collect();
                let widened: Vec<f32> = narrow.iter().map(|&bits| bf16::from_bits(bits).to_f32()).collect();
                for (panels, values) in [(Panels::F32(&wide), &wide), (Panels::Bf16(&narrow), &widened)] {
                    let terms = |vector: usize, row: usize| {
                        let panel = &values[row / PANEL_ROWS * PANEL_ROWS * width..];
                        let row = panel.iter().skip(row % PANEL_ROWS).step_by(PANEL_ROWS);
                        let vector = &vectors[vector * width..][..width];
                        vector.iter().zip(row).map(|(&a, &b)| f64::from(a) * f64::from(b)).collect::<Vec<f64>>()
                    };
                    let run = |visits: &[Visit], places: usize| {
                        let mut output = vec![f32::NAN; places];
                        dots_at(level, Dots { vectors: &vectors, width, panels, visits, output: &mut output });
                        output
                    };
                    let single = |vector: usize, row: usize| {
                        let visit = Visit { vector: vector as u32, first_row: row as u32, rows: 1, place: 0 };
                        run(&[visit], 1)[0]
                    };
                    for count in 0..=7 {
                        let (mut visits, mut places) = (Vec::new(), 0);
                        for _ in 0..count {
                            let first_row = random.below(rows) as u32;
                            let visited = random.below(rows + 1 - first_row as usize) as u32;
                            let vector = random.below(7) as u32;
                            visits.push(Visit { vector, first_row, rows: visited, place: places });
                            places += visited;
                        }
                        let output = run(&visits, places as usize);
                        for visit in &visits {
                            for row in visit.rows() {
                                let what = format!("{level:?}, width {width}, {visit:?} of {count}, row {row}");
                                let product = output[visit.place as usize + row - visit.rows().start];
                                let terms = terms(visit.vector as usize, row);
                                let error = (f64::from(product) - terms.iter().sum::<f64>()).abs();
                                // Relative to what is summed: a sum may cancel.
                                let bound = 1e-6 * terms.iter().map(|term| term.abs()).sum::<f64>();
                                assert!(error <= bound, "{what}: {error}");
                                assert!(product == single(visit.vector as usize, row), "{what}: differs when alone");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "no multiple of 16")]
    fn odd_width_is_refused() {
        dot_panels(&[0.0; 7], 7, Panels::F32(&[0.0; 112]), &[], &mut []);
    }
}
