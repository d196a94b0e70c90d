//! `TokenBuffer`.

use super::batch::numbers_array;
use super::bridge::PyArray;
use crate::array::Array;
use crate::cache::TokenBuffer;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::sync::{Mutex, MutexGuard};

/// The tokens of one sequence in a buffer that grows by `step`. `TokenBuffer(tokens=None)`
#[pyclass(name = "TokenBuffer", module = "mlxrs_py.cache", subclass, dict, weakref, frozen)]
pub(super) struct PyTokenBuffer {
    /// Locked only while Rust runs.
    inner: Mutex<TokenBuffer>,
}

impl PyTokenBuffer {
    fn lock(&self) -> PyResult<MutexGuard<'_, TokenBuffer>> {
        self.inner.try_lock().map_err(|_| PyRuntimeError::new_err("the buffer is in use by the caller"))
    }
}

#[pymethods]
impl PyTokenBuffer {
    #[new]
    #[pyo3(signature = (tokens = None))]
    fn py_new(tokens: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let tokens = tokens
            .map_or_else(|| Ok(Array::from_i32(&[])?), |tokens| numbers_array("TokenBuffer", "tokens", tokens))?;
        Ok(Self { inner: Mutex::new(TokenBuffer::new(&tokens)?) })
    }

    /// Tokens by which the buffer grows.
    #[getter]
    fn step(&self) -> PyResult<usize> {
        Ok(self.lock()?.step)
    }

    #[setter]
    fn set_step(&self, step: usize) -> PyResult<()> {
        if step == 0 {
            return Err(PyValueError::new_err("step: expected at least 1 token, got 0"));
        }
        self.lock()?.step = step;
        Ok(())
    }

    /// Appends tokens (n,) and gives all of them, int32.
    fn update_and_fetch<'py>(&self, tokens: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let new = numbers_array("update_and_fetch", "tokens", tokens)?;
        PyArray(self.lock()?.update(&new)?).into_pyobject(tokens.py())
    }

    /// The buffer, padding included.
    #[getter]
    fn state(&self) -> PyResult<PyArray> {
        Ok(PyArray(self.lock()?.buffer().clone()))
    }

    /// The tokens, int32 (n,).
    #[getter]
    fn tokens(&self) -> PyResult<PyArray> {
        Ok(PyArray(self.lock()?.tokens()?))
    }

    /// The buffer, padding included.
    #[getter]
    fn _buffer(&self) -> PyResult<PyArray> {
        self.state()
    }

    /// Number of tokens.
    #[getter]
    fn _size(&self) -> PyResult<usize> {
        Ok(self.lock()?.len())
    }

    fn __reduce_ex__<'py>(slf: &Bound<'py, Self>, _protocol: i32) -> PyResult<Bound<'py, PyTuple>> {
        let tokens = slf.get().tokens()?;
        (slf.get_type(), (tokens,), slf.getattr("__dict__")?).into_pyobject(slf.py())
    }
}
