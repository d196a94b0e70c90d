//! `BatchKVCache` and `BatchQuantizedKVCache`.

use super::attention::mask_to_python;
use super::base::{base, count};
use super::batch::{PyBatchCache, numbers, with_batch};
use super::bridge::PyArray;
use crate::array::Array;
use crate::cache::{BatchKvCache, Cache, KvCache, Scheme};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};

/// A KVCache of several sequences. `BatchKVCache(left_padding)`
#[pyclass(name = "BatchKVCache", module = "mlxrs_py.cache", extends = PyBatchCache, subclass, frozen)]
pub(super) struct PyBatchKvCache;

/// A QuantizedKVCache of several sequences. `BatchQuantizedKVCache(left_padding, group_size=64, bits=8)`
#[pyclass(name = "BatchQuantizedKVCache", module = "mlxrs_py.cache", extends = PyBatchCache, subclass, frozen)]
pub(super) struct PyBatchQuantizedKvCache;

/// Runs `f` with the growing batch inside `slf`.
fn with<T>(slf: &Bound<'_, PyAny>, f: impl FnOnce(&mut BatchKvCache) -> T) -> PyResult<T> {
    match &mut *base(slf)?.lock()? {
        Cache::Batch(cache) => Ok(f(cache)),
        other => Err(PyTypeError::new_err(format!("expected a growing batch, got {other:?}"))),
    }
}

/// What the constructors do.
fn init(slf: &Bound<'_, PyAny>, left_padding: &Bound<'_, PyAny>, scheme: Option<Scheme>) -> PyResult<()> {
    let left_padding = numbers("BatchKVCache", "left_padding", left_padding)?;
    let mut cache = BatchKvCache::new(left_padding, scheme)?;
    let mut inner = base(slf)?.lock()?;
    cache.step = inner.step();
    *inner = Cache::Batch(cache);
    Ok(())
}

fn right_padding(slf: &Bound<'_, PyBatchCache>) -> PyResult<Option<PyArray>> {
    with_batch(slf, |batch| batch.pending().map(|padding| Array::from_i32(&padding).map(PyArray)).transpose())
}

fn make_mask<'py>(slf: &Bound<'py, PyAny>, n_tokens: i64, window: Option<i64>) -> PyResult<Bound<'py, PyAny>> {
    let op = "make_mask";
    let n_tokens = count(op, "N", n_tokens)?;
    let window = window.map(|window| count(op, "window_size", window)).transpose()?;
    mask_to_python(slf.py(), with(slf, |cache| cache.make_mask(n_tokens, window, true))??)
}

#[pymethods]
impl PyBatchKvCache {
    #[new]
    #[classmethod]
    #[pyo3(signature = (*_args, **_kwargs), text_signature = "(left_padding)")]
    fn py_new(
        class: &Bound<'_, PyType>,
        _args: &Bound<'_, PyTuple>,
        _kwargs: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        Ok(PyBatchCache::new(class, "BatchKVCache")?.add_subclass(Self))
    }

    #[pyo3(signature = (left_padding))]
    fn __init__(slf: &Bound<'_, Self>, left_padding: &Bound<'_, PyAny>) -> PyResult<()> {
        init(slf.as_any(), left_padding, None)
    }

    /// Columns filled so far.
    #[getter]
    fn _idx(slf: &Bound<'_, Self>) -> PyResult<usize> {
        with(slf.as_any(), |cache| cache.offset())
    }

    #[setter(_idx)]
    fn set_idx(slf: &Bound<'_, Self>, index: i64) -> PyResult<()> {
        let index = count("_idx", "_idx", index)?;
        with(slf.as_any(), |cache| cache.set_index(index))
    }

    /// Padding behind each sequence that `finalize` will move, or None.
    #[getter]
    fn _right_padding(slf: &Bound<'_, Self>) -> PyResult<Option<PyArray>> {
        right_padding(slf.as_super())
    }

    /// The mask for `N` columns that are about to be updated: bool (B, 1, N, `_idx` + N).
    #[pyo3(signature = (N, return_array = false, window_size = None))]
    #[allow(non_snake_case, unused_variables)]
    fn make_mask<'py>(
        slf: &Bound<'py, Self>,
        N: i64,
        return_array: bool,
        window_size: Option<i64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        make_mask(slf.as_any(), N, window_size)
    }
}

#[pymethods]
impl PyBatchQuantizedKvCache {
    #[new]
    #[classmethod]
    #[pyo3(signature = (*_args, **_kwargs), text_signature = "(left_padding, group_size=64, bits=8)")]
    fn py_new(
        class: &Bound<'_, PyType>,
        _args: &Bound<'_, PyTuple>,
        _kwargs: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        Ok(PyBatchCache::new(class, "BatchQuantizedKVCache")?.add_subclass(Self))
    }

    #[pyo3(signature = (left_padding, group_size = 64, bits = 8))]
    fn __init__(slf: &Bound<'_, Self>, left_padding: &Bound<'_, PyAny>, group_size: i64, bits: i64) -> PyResult<()> {
        let op = "BatchQuantizedKVCache";
        let scheme = Scheme::new(op, count(op, "group_size", group_size)?, count(op, "bits", bits)?)?;
        init(slf.as_any(), left_padding, Some(scheme))
    }

    /// Columns filled so far.
    #[getter]
    fn _idx(slf: &Bound<'_, Self>) -> PyResult<usize> {
        with(slf.as_any(), |cache| cache.offset())
    }

    /// Padding behind each sequence that `finalize` will move, or None.
    #[getter]
    fn _right_padding(slf: &Bound<'_, Self>) -> PyResult<Option<PyArray>> {
        right_padding(slf.as_super())
    }

    /// Elements that share a scale and a bias.
    #[getter]
    fn group_size(slf: &Bound<'_, Self>) -> PyResult<usize> {
        with(slf.as_any(), |cache| cache.scheme().map_or(0, |scheme| scheme.group_size()))
    }

    /// Bits per element.
    #[getter]
    fn bits(slf: &Bound<'_, Self>) -> PyResult<usize> {
        with(slf.as_any(), |cache| cache.scheme().map_or(0, |scheme| scheme.bits()))
    }

    /// The mask for `N` columns that are about to be updated: bool (B, 1, N, `_idx` + N).
    #[pyo3(signature = (N, return_array = false, window_size = None))]
    #[allow(non_snake_case, unused_variables)]
    fn make_mask<'py>(
        slf: &Bound<'py, Self>,
        N: i64,
        return_array: bool,
        window_size: Option<i64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        make_mask(slf.as_any(), N, window_size)
    }
}
