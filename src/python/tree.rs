//! A cache's state between Rust's tree and Python's tuples.

use super::bridge::PyArray;
use crate::array::Array;
use crate::cache::State;
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyFloat, PyInt, PyList, PyString, PyTuple};

/// Deepest nesting of a state: caches in lists in lists are a handful of levels.
const MAX_DEPTH: usize = 64;

/// Tuples of arrays, numbers, texts and None.
pub(super) fn to_python(py: Python<'_>, state: State<Array>) -> PyResult<Bound<'_, PyAny>> {
    match state {
        State::Array(array) => PyArray(array).into_pyobject(py),
        State::Int(value) => value.into_bound_py_any(py),
        State::Bool(value) => value.into_bound_py_any(py),
        State::Float(value) => value.into_bound_py_any(py),
        State::Str(value) => value.into_bound_py_any(py),
        State::None => Ok(py.None().into_bound(py)),
        State::List(items) => {
            let items = items.into_iter().map(|item| to_python(py, item)).collect::<PyResult<Vec<_>>>()?;
            PyTuple::new(py, items).map(Bound::into_any)
        }
    }
}

/// The tree behind Python's tuples and lists.
pub(super) fn from_python(object: &Bound<'_, PyAny>) -> PyResult<State<Array>> {
    read(object, 0)
}

fn read(object: &Bound<'_, PyAny>, depth: usize) -> PyResult<State<Array>> {
    if depth > MAX_DEPTH {
        return Err(PyValueError::new_err(format!("state: expected at most {MAX_DEPTH} levels, got more")));
    }
    if let Ok(array) = object.extract::<PyArray>() {
        return Ok(State::Array(array.0));
    }
    if object.is_none() {
        return Ok(State::None);
    }
    // bool before int: Python's bool is an int.
    if let Ok(value) = object.cast::<PyBool>() {
        return Ok(State::Bool(value.is_true()));
    }
    if object.is_instance_of::<PyInt>() {
        return object.extract().map(State::Int);
    }
    if object.is_instance_of::<PyFloat>() {
        return object.extract().map(State::Float);
    }
    if let Ok(text) = object.cast::<PyString>() {
        return Ok(State::Str(text.to_str()?.to_owned()));
    }
    if object.is_instance_of::<PyList>() || object.is_instance_of::<PyTuple>() {
        let items = object.try_iter()?.map(|item| read(&item?, depth + 1)).collect::<PyResult<_>>()?;
        return Ok(State::List(items));
    }
    let got = object.get_type().qualname()?;
    Err(PyTypeError::new_err(format!("state: expected arrays, numbers, strings, None, tuples or lists, got {got}")))
}
