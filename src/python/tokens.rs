//! Tokens from Python: lists, tuples, NumPy and mlx arrays, and other sequences of integers.

use super::bridge::PyArray;
use crate::array::{Array, Dtype};
use pyo3::buffer::{Element, ElementType, PyUntypedBuffer};
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyList, PySequence, PyTuple};

/// Token ids of 64 bits. TypeError for what is no sequence of integers, ValueError for more than one axis,
/// OverflowError for what 64 bits cannot hold.
pub(super) struct Tokens(pub Vec<i64>);

impl<'a, 'py> FromPyObject<'a, 'py> for Tokens {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let tokens = if let Ok(list) = object.cast::<PyList>() {
            each(list.len(), list.iter())
        } else if let Ok(tuple) = object.cast::<PyTuple>() {
            each(tuple.len(), tuple.iter())
        } else if let Ok(array) = object.extract::<PyArray>() {
            of_array(py, &array.0)
        } else if let Ok(buffer) = PyUntypedBuffer::get(&object) {
            of_buffer(py, &buffer)
        } else if let Ok(sequence) = object.cast::<PySequence>() {
            sequence.try_iter()?.map(|token| token?.extract()).collect()
        } else {
            let got = object.get_type().qualname()?;
            Err(PyTypeError::new_err(format!("expected token ids in a list, a tuple or an array, got {got}")))
        };
        tokens.map(Self)
    }
}

fn each<'py>(n_tokens: usize, items: impl Iterator<Item = Bound<'py, PyAny>>) -> PyResult<Vec<i64>> {
    let mut tokens = Vec::with_capacity(n_tokens);
    for item in items {
        tokens.push(item.extract()?);
    }
    Ok(tokens)
}

/// Evaluates without the GIL.
fn of_array(py: Python<'_>, array: &Array) -> PyResult<Vec<i64>> {
    let dtype = array.dtype();
    if dtype.is_float() || dtype == Dtype::Bool || dtype == Dtype::C64 {
        return Err(PyTypeError::new_err(format!("expected token ids of an integer type, got {array:?}")));
    }
    one_axis(array.shape().len())?;
    let wide = array.astype(Dtype::I64)?;
    let bytes = py.detach(move || wide.to_bytes())?;
    let tokens: Vec<_> = bytes.as_chunks().0.iter().map(|&token| i64::from_ne_bytes(token)).collect();
    if dtype == Dtype::U64 && tokens.iter().any(|&token| token < 0) {
        return Err(too_large());
    }
    Ok(tokens)
}

fn of_buffer(py: Python<'_>, buffer: &PyUntypedBuffer) -> PyResult<Vec<i64>> {
    one_axis(buffer.dimensions())?;
    let element = match buffer.format().to_bytes() {
        [_] => ElementType::from_format(buffer.format()),
        // PyO3 takes ">" for the order of this machine.
        _ => ElementType::Unknown,
    };
    match element {
        // Python's own empty arrays point nowhere, which PyO3 calls badly aligned.
        ElementType::SignedInteger { .. } | ElementType::UnsignedInteger { .. } if buffer.item_count() == 0 => {
            Ok(Vec::new())
        }
        // A copy: other threads may write into the buffer.
        ElementType::SignedInteger { bytes: 8 } => buffer.as_typed::<i64>()?.to_vec(py),
        ElementType::SignedInteger { bytes: 4 } => widened::<i32>(py, buffer),
        ElementType::SignedInteger { bytes: 2 } => widened::<i16>(py, buffer),
        ElementType::SignedInteger { bytes: 1 } => widened::<i8>(py, buffer),
        ElementType::UnsignedInteger { bytes: 4 } => widened::<u32>(py, buffer),
        ElementType::UnsignedInteger { bytes: 2 } => widened::<u16>(py, buffer),
        ElementType::UnsignedInteger { bytes: 1 } => widened::<u8>(py, buffer),
        ElementType::UnsignedInteger { bytes: 8 } => {
            let tokens = buffer.as_typed::<u64>()?.to_vec(py)?;
            tokens.into_iter().map(|token| i64::try_from(token).map_err(|_| too_large())).collect()
        }
        _ => {
            let format = buffer.format().to_string_lossy().into_owned();
            Err(PyTypeError::new_err(format!("expected token ids of an integer type, got format {format:?}")))
        }
    }
}

fn widened<T: Element + Into<i64>>(py: Python<'_>, buffer: &PyUntypedBuffer) -> PyResult<Vec<i64>> {
    Ok(buffer.as_typed::<T>()?.to_vec(py)?.into_iter().map(Into::into).collect())
}

fn one_axis(n_axes: usize) -> PyResult<()> {
    match n_axes {
        1 => Ok(()),
        _ => Err(PyValueError::new_err(format!("expected token ids (P,), got {n_axes} axes"))),
    }
}

fn too_large() -> PyErr {
    PyOverflowError::new_err("expected token ids below 2^63, got a larger one")
}
