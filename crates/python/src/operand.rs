//! Arrays as they come from the Python half.

use iceformer_attention::{Elements, ElementsMut, StridedView};
use numpy::{PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyReadwriteArrayDyn};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// `(memory, dtype, shape, strides)`: all memory from the first to the last number as a contiguous array (`float32`, or
/// `uint16` of the bits of `float16` and `bfloat16`), its type, and `[batch, heads, tokens, width]`.
#[derive(FromPyObject)]
pub struct Operand<'py>(Bound<'py, PyAny>, String, [usize; 4], [usize; 4]);

/// An [`Operand`]'s memory, borrowed from NumPy.
pub enum Borrowed<'py> {
    F32(PyReadonlyArrayDyn<'py, f32>),
    F16(PyReadonlyArrayDyn<'py, u16>),
    Bf16(PyReadonlyArrayDyn<'py, u16>),
}

impl<'py> Operand<'py> {
    pub fn borrow(&self) -> PyResult<Borrowed<'py>> {
        Ok(match self.1.as_str() {
            "float32" => Borrowed::F32(self.0.cast::<PyArrayDyn<f32>>()?.readonly()),
            "float16" => Borrowed::F16(self.0.cast::<PyArrayDyn<u16>>()?.readonly()),
            "bfloat16" => Borrowed::Bf16(self.0.cast::<PyArrayDyn<u16>>()?.readonly()),
            other => return Err(unknown_type(other)),
        })
    }

    pub fn view<'a>(&self, borrowed: &'a Borrowed<'py>) -> PyResult<StridedView<'a>> {
        let elements = match borrowed {
            Borrowed::F32(array) => Elements::F32(array.as_slice()?),
            Borrowed::F16(array) => Elements::F16(array.as_slice()?),
            Borrowed::Bf16(array) => Elements::Bf16(array.as_slice()?),
        };
        StridedView::new(elements, self.2, self.3).map_err(|error| PyValueError::new_err(error.to_string()))
    }
}

/// `(memory, dtype)`: where results go, contiguous.
#[derive(FromPyObject)]
pub struct Output<'py>(Bound<'py, PyAny>, String);

/// An [`Output`]'s memory, borrowed from NumPy.
pub enum BorrowedMut<'py> {
    F32(PyReadwriteArrayDyn<'py, f32>),
    F16(PyReadwriteArrayDyn<'py, u16>),
    Bf16(PyReadwriteArrayDyn<'py, u16>),
}

impl<'py> Output<'py> {
    pub fn borrow(&self) -> PyResult<BorrowedMut<'py>> {
        Ok(match self.1.as_str() {
            "float32" => BorrowedMut::F32(self.0.cast::<PyArrayDyn<f32>>()?.readwrite()),
            "float16" => BorrowedMut::F16(self.0.cast::<PyArrayDyn<u16>>()?.readwrite()),
            "bfloat16" => BorrowedMut::Bf16(self.0.cast::<PyArrayDyn<u16>>()?.readwrite()),
            other => return Err(unknown_type(other)),
        })
    }
}

impl BorrowedMut<'_> {
    pub fn elements(&mut self) -> PyResult<ElementsMut<'_>> {
        Ok(match self {
            Self::F32(array) => ElementsMut::F32(array.as_slice_mut()?),
            Self::F16(array) => ElementsMut::F16(array.as_slice_mut()?),
            Self::Bf16(array) => ElementsMut::Bf16(array.as_slice_mut()?),
        })
    }
}

fn unknown_type(name: &str) -> PyErr {
    PyTypeError::new_err(format!("arrays of {name}; expected float32, float16 or bfloat16"))
}
