//! Views of numbers that lie in a caller's memory with strides, as array libraries keep them.

use std::ops::Range;

use iceformer_kernels::attention::fetch;
use iceformer_kernels::brain_bits;
use iceformer_kernels::half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use iceformer_kernels::half::{bf16, f16};

/// Numbers as a caller keeps them.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// 16-bit floats as their bits.
    F16(&'a [u16]),
    /// 16-bit brain floats as their bits.
    Bf16(&'a [u16]),
}

impl Elements<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(bits) | Self::Bf16(bits) => bits.len(),
        }
    }
}

/// Numbers `[batch, heads, tokens, width]`, each dimension with a stride of its own (counted in elements; 0 repeats).
#[derive(Clone, Copy, Debug)]
pub struct StridedView<'a> {
    elements: Elements<'a>,
    shape: [usize; 4],
    strides: [usize; 4],
    offset: usize,
}

/// A view that reaches beyond its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a view of shape {shape:?} with strides {strides:?} reaches beyond its {elements} elements")]
pub struct StridedError {
    shape: [usize; 4],
    strides: [usize; 4],
    elements: usize,
}

impl<'a> StridedView<'a> {
    /// A view whose first number is the first of `elements`.
    ///
    /// # Errors
    /// When the shape and strides reach beyond `elements`.
    pub fn new(elements: Elements<'a>, shape: [usize; 4], strides: [usize; 4]) -> Result<Self, StridedError> {
        let view = Self { elements, shape, strides, offset: 0 };
        let inside = shape.contains(&0) || {
            let last = shape.iter().zip(&strides).try_fold(0_usize, |sum, (size, stride)| {
                (size - 1).checked_mul(*stride).and_then(|part| sum.checked_add(part))
            });
            last.is_some_and(|last| last < elements.len())
        };
        if inside { Ok(view) } else { Err(StridedError { shape, strides, elements: elements.len() }) }
    }

    /// Contiguous f32 `[tokens, heads, width]`, as the library takes them, as a batch of one.
    pub(crate) fn token_major(values: &'a [f32], tokens: usize, heads: usize, width: usize) -> Self {
        assert_eq!(values.len(), tokens * heads * width, "[{tokens}, {heads}, {width}] numbers");
        let (shape, strides) = ([1, heads, tokens, width], [values.len(), width, heads * width, 1]);
        Self { elements: Elements::F32(values), shape, strides, offset: 0 }
    }

    /// `[batch, heads, tokens, width]`
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The numbers' type and all the memory the view may reach.
    pub fn elements(&self) -> Elements<'a> {
        self.elements
    }

    /// Entry `index` of the batch alone, as a batch of one.
    ///
    /// # Panics
    /// When there is no such entry.
    pub fn entry(&self, index: usize) -> Self {
        assert!(index < self.shape[0], "entry {index} of a batch of {}", self.shape[0]);
        let [_, heads, tokens, width] = self.shape;
        let empty = self.shape.contains(&0);
        let offset = self.offset + if empty { 0 } else { index * self.strides[0] };
        Self { shape: [1, heads, tokens, width], offset, ..*self }
    }

    /// The first `tokens` tokens alone; all of them when there are fewer.
    pub fn first_tokens(&self, tokens: usize) -> Self {
        let [batch, heads, all, width] = self.shape;
        Self { shape: [batch, heads, all.min(tokens), width], ..*self }
    }

    /// The tokens of `range` alone.
    pub(crate) fn tokens(&self, range: Range<usize>) -> Self {
        let [batch, heads, _, width] = self.shape;
        let empty = range.is_empty() || self.shape.contains(&0);
        let offset = self.offset + if empty { 0 } else { range.start * self.strides[2] };
        Self { shape: [batch, heads, range.len(), width], offset, ..*self }
    }

    /// The `count` row heads from `first` on alone, heads of one entry of the batch, as a batch of one.
    pub(crate) fn row_heads_of(&self, first: usize, count: usize) -> Self {
        let [_, heads, tokens, width] = self.shape;
        debug_assert!(first % heads + count <= heads, "heads of one entry");
        let offset = if self.shape.contains(&0) { self.offset } else { self.start(first, 0) };
        Self { shape: [1, count, tokens, width], offset, ..*self }
    }

    /// Heads of all entries of the batch: head `h` of entry `b` is row head `b · heads + h`.
    pub(crate) fn row_heads(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// Where the row of `token` of row head `head` starts.
    fn start(&self, head: usize, token: usize) -> usize {
        let (entry, head) = (head / self.shape[1], head % self.shape[1]);
        self.offset + entry * self.strides[0] + head * self.strides[1] + token * self.strides[2]
    }

    /// The numbers of `token` of row head `head`, `[width]`: where they lie, or widened or brought together in `buffer`.
    pub(crate) fn row<'b>(&self, head: usize, token: usize, buffer: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        self.row_in_place(head, token).unwrap_or_else(|| {
            buffer.resize(self.shape[3], 0.0);
            self.read_row(head, token, buffer);
            buffer
        })
    }

    /// The numbers of `token` of row head `head`, `[width]`, where they lie as f32 one behind the other.
    pub(crate) fn row_in_place(&self, head: usize, token: usize) -> Option<&'a [f32]> {
        let width = self.shape[3];
        match self.elements {
            Elements::F32(values) if self.strides[3] == 1 || width == 1 => {
                Some(&values[self.start(head, token)..][..width])
            }
            _ => None,
        }
    }

    /// Asks the memory for the numbers of `token` of row head `head`, if they lie one behind the other.
    pub(crate) fn fetch_row(&self, head: usize, token: usize) {
        if self.strides[3] == 1 {
            let range = self.start(head, token)..self.start(head, token) + self.shape[3];
            match self.elements {
                Elements::F32(values) => fetch(&values[range]),
                Elements::F16(bits) | Elements::Bf16(bits) => fetch(&bits[range]),
            }
        }
    }

    /// As [`row_in_place`](Self::row_in_place), of `N` tokens from `token` on.
    pub(crate) fn rows_in_place<const N: usize>(&self, head: usize, token: usize) -> Option<[&'a [f32]; N]> {
        let mut rows: [&[f32]; N] = [&[]; N];
        for (offset, row) in rows.iter_mut().enumerate() {
            *row = self.row_in_place(head, token + offset)?;
        }
        Some(rows)
    }

    /// Writes the numbers of `token` of row head `head` to `row`, `[width]`.
    pub(crate) fn read_row(&self, head: usize, token: usize, row: &mut [f32]) {
        let (start, stride) = (self.start(head, token), self.strides[3]);
        if stride == 1 {
            let range = start..start + row.len();
            match self.elements {
                Elements::F32(values) => row.copy_from_slice(&values[range]),
                Elements::F16(bits) => bits[range].reinterpret_cast::<f16>().convert_to_f32_slice(row),
                Elements::Bf16(bits) => widen(&bits[range], row),
            }
            return;
        }
        for (channel, target) in row.iter_mut().enumerate() {
            let index = start + channel * stride;
            *target = match self.elements {
                Elements::F32(values) => values[index],
                Elements::F16(bits) => f16::from_bits(bits[index]).to_f32(),
                Elements::Bf16(bits) => bf16::from_bits(bits[index]).to_f32(),
            };
        }
    }

    /// The rows of row head `head` as `[tokens, width]` where they lie one behind the other.
    pub(crate) fn head_rows(&self, head: usize) -> Option<Elements<'a>> {
        let [_, _, tokens, width] = self.shape;
        if self.shape.contains(&0) || (tokens > 1 && self.strides[2] != width) || (width > 1 && self.strides[3] != 1) {
            return None;
        }
        let range = self.start(head, 0)..self.start(head, 0) + tokens * width;
        Some(match self.elements {
            Elements::F32(values) => Elements::F32(&values[range]),
            Elements::F16(bits) => Elements::F16(&bits[range]),
            Elements::Bf16(bits) => Elements::Bf16(&bits[range]),
        })
    }
}

/// bf16 to f32.
fn widen(bits: &[u16], row: &mut [f32]) {
    row.iter_mut().zip(bits).for_each(|(target, bits)| *target = f32::from_bits(u32::from(*bits) << 16));
}

/// Where results go: contiguous, `[batch, tokens, heads, width]`, rounded to nearest even where narrower than f32.
#[derive(Debug)]
pub enum ElementsMut<'a> {
    /// 32-bit floats.
    F32(&'a mut [f32]),
    /// 16-bit floats as their bits.
    F16(&'a mut [u16]),
    /// 16-bit brain floats as their bits.
    Bf16(&'a mut [u16]),
}

impl ElementsMut<'_> {
    /// Numbers that fit.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(bits) | Self::Bf16(bits) => bits.len(),
        }
    }

    /// Whether no number fits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A number that results are written in.
pub(crate) trait FromF32: Copy + Send {
    /// Writes `values` to `target`, which is as long.
    fn convert(values: &[f32], target: &mut [Self]);
}

impl FromF32 for f32 {
    fn convert(values: &[f32], target: &mut [f32]) {
        target.copy_from_slice(values);
    }
}

impl FromF32 for f16 {
    fn convert(values: &[f32], target: &mut [f16]) {
        target.convert_from_f32_slice(values);
    }
}

impl FromF32 for bf16 {
    fn convert(values: &[f32], target: &mut [bf16]) {
        target.iter_mut().zip(values).for_each(|(target, value)| *target = bf16::from_bits(brain_bits(*value)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize) -> Vec<f32> {
        (0..count).map(|value| value as f32).collect()
    }

    #[test]
    fn rows_of_any_layout() {
        // Memory [tokens 3, batch 2, width 2, heads 2]: no dimension where it usually lies.
        let memory = values(24);
        let view = StridedView::new(Elements::F32(&memory), [2, 2, 3, 2], [4, 1, 8, 2]).unwrap();
        for entry in 0..2 {
            for head in 0..2 {
                for token in 0..3 {
                    let mut row = [0.0; 2];
                    view.read_row(entry * 2 + head, token, &mut row);
                    let first = (token * 8 + entry * 4 + head) as f32;
                    assert_eq!(row, [first, first + 2.0]);
                    view.entry(entry).read_row(head, token, &mut row);
                    assert_eq!(row, [first, first + 2.0]);
                }
            }
        }
        let mut buffer = Vec::new();
        assert_eq!(view.tokens(1..3).row(3, 1, &mut buffer), [21.0, 23.0]);
        assert!(view.head_rows(0).is_none());
    }

    #[test]
    fn memory_is_used_in_place_where_it_lies_right() {
        let memory = values(2 * 3 * 4);
        let token_major = StridedView::new(Elements::F32(&memory), [1, 3, 2, 4], [24, 4, 12, 1]).unwrap();
        let mut buffer = Vec::new();
        assert_eq!(token_major.tokens(1..2).row(1, 0, &mut buffer), &memory[16..20]);
        assert!(token_major.head_rows(1).is_none());
        let head_major = StridedView::new(Elements::F32(&memory), [1, 3, 2, 4], [24, 8, 4, 1]).unwrap();
        assert_eq!(head_major.row(1, 1, &mut buffer), &memory[12..16]);
        assert!(buffer.is_empty(), "nothing was copied");
        assert!(matches!(head_major.head_rows(1), Some(Elements::F32(rows)) if rows == &memory[8..16]));
        assert!(matches!(head_major.first_tokens(1).head_rows(1), Some(Elements::F32(rows)) if rows == &memory[8..12]));
    }

    #[test]
    fn narrow_numbers_are_widened() {
        for stride in [1, 2] {
            let numbers = [1.5_f32, -2.0, 0.25, f32::INFINITY];
            let spread = |bits: fn(f32) -> u16| {
                numbers.iter().flat_map(|&value| [bits(value), 7].into_iter().take(stride)).collect::<Vec<u16>>()
            };
            let (half, brain) =
                (spread(|value| f16::from_f32(value).to_bits()), spread(|value| bf16::from_f32(value).to_bits()));
            for elements in [Elements::F16(&half), Elements::Bf16(&brain)] {
                let view = StridedView::new(elements, [1, 1, 1, 4], [0, 0, 0, stride]).unwrap();
                let mut buffer = Vec::new();
                let row = view.row(0, 0, &mut buffer);
                assert_eq!(row, numbers, "stride {stride}");
            }
        }
    }

    #[test]
    fn a_view_stays_inside_its_elements() {
        let memory = values(24);
        let view = |shape, strides| StridedView::new(Elements::F32(&memory), shape, strides);
        assert!(view([2, 3, 2, 2], [12, 4, 2, 1]).is_ok());
        assert!(view([2, 3, 2, 3], [12, 4, 2, 1]).is_err());
        assert!(view([2, 3, 2, 2], [usize::MAX, 4, 2, 1]).is_err());
        assert!(view([usize::MAX, 2, 2, 2], [0, 4, 2, 1]).is_ok());
        assert!(view([5, 0, 9, 9], [usize::MAX; 4]).is_ok());
        let error = view([1, 1, 1, 25], [0, 0, 0, 1]).unwrap_err().to_string();
        assert_eq!(error, "a view of shape [1, 1, 1, 25] with strides [0, 0, 0, 1] reaches beyond its 24 elements");
    }
}
