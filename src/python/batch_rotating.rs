//! `BatchRotatingKVCache`.

use super::attention::mask_to_python;
use super::base::{base, count};
use super::batch::{PyBatchCache, numbers};
use super::bridge::PyArray;
use crate::array::Array;
use crate::cache::plan::BatchRing;
use crate::cache::{BatchRotatingKvCache, Cache, KvCache};
use pyo3::exceptions::{PyNotImplementedError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};

/// The newest `max_size` columns of several sequences in a ring. `BatchRotatingKVCache(max_size, left_padding)`
#[pyclass(name = "BatchRotatingKVCache", module = "mlxrs_py.cache", extends = PyBatchCache, subclass, frozen)]
pub(super) struct PyBatchRotatingKvCache;

/// Runs `f` with the ring inside `slf`.
fn with<T>(slf: &Bound<'_, PyBatchRotatingKvCache>, f: impl FnOnce(&mut BatchRotatingKvCache) -> T) -> PyResult<T> {
    match &mut *base(slf.as_any())?.lock()? {
        Cache::BatchRotating(cache) => Ok(f(cache)),
        other => Err(PyTypeError::new_err(format!("expected a BatchRotatingKVCache, got {other:?}"))),
    }
}

/// Assigns the position that `f` makes of the present one.
fn set_ring(slf: &Bound<'_, PyBatchRotatingKvCache>, f: impl FnOnce(BatchRing) -> BatchRing) -> PyResult<()> {
    with(slf, |cache| cache.set_ring(f(*cache.ring())))
}

#[pymethods]
impl PyBatchRotatingKvCache {
    #[new]
    #[classmethod]
    #[pyo3(signature = (*_args, **_kwargs), text_signature = "(max_size, left_padding)")]
    fn py_new(
        class: &Bound<'_, PyType>,
        _args: &Bound<'_, PyTuple>,
        _kwargs: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        Ok(PyBatchCache::new(class, "BatchRotatingKVCache")?.add_subclass(Self))
    }

    #[pyo3(signature = (max_size, left_padding))]
    fn __init__(slf: &Bound<'_, Self>, max_size: i64, left_padding: &Bound<'_, PyAny>) -> PyResult<()> {
        let op = "BatchRotatingKVCache";
        let left_padding = numbers(op, "left_padding", left_padding)?;
        let mut cache = BatchRotatingKvCache::new(count(op, "max_size", max_size)?, left_padding)?;
        let mut inner = base(slf.as_any())?.lock()?;
        cache.step = inner.step();
        *inner = Cache::BatchRotating(cache);
        Ok(())
    }

    /// Columns that the ring holds once full.
    #[getter]
    fn max_size(slf: &Bound<'_, Self>) -> PyResult<usize> {
        with(slf, |cache| cache.ring().max_size)
    }

    #[setter]
    fn set_max_size(slf: &Bound<'_, Self>, max_size: i64) -> PyResult<()> {
        let max_size = count("max_size", "max_size", max_size)?;
        set_ring(slf, |ring| BatchRing { max_size, ..ring })
    }

    /// Columns seen so far.
    #[getter]
    fn _offset(slf: &Bound<'_, Self>) -> PyResult<usize> {
        with(slf, |cache| cache.ring().offset)
    }

    #[setter(_offset)]
    fn set_columns(slf: &Bound<'_, Self>, offset: i64) -> PyResult<()> {
        let offset = count("_offset", "_offset", offset)?;
        set_ring(slf, |ring| BatchRing { offset, ..ring })
    }

    /// Column after the last one written.
    #[getter]
    fn _idx(slf: &Bound<'_, Self>) -> PyResult<usize> {
        with(slf, |cache| cache.ring().index)
    }

    #[setter(_idx)]
    fn set_idx(slf: &Bound<'_, Self>, index: i64) -> PyResult<()> {
        let index = count("_idx", "_idx", index)?;
        set_ring(slf, |ring| BatchRing { index, ..ring })
    }

    /// True if the oldest column is the one at `_idx`, not the first one.
    #[getter]
    fn rotated(slf: &Bound<'_, Self>) -> PyResult<bool> {
        with(slf, |cache| cache.ring().rotated)
    }

    #[setter]
    fn set_rotated(slf: &Bound<'_, Self>, rotated: bool) -> PyResult<()> {
        set_ring(slf, |ring| BatchRing { rotated, ..ring })
    }

    /// Offsets at which the announced tokens of the sequences end, or None.
    #[getter]
    fn _lengths(slf: &Bound<'_, Self>) -> PyResult<Option<PyArray>> {
        let ends = with(slf, |cache| cache.ends().map(Array::from_i32).transpose())??;
        Ok(ends.map(PyArray))
    }

    /// The mask for `N` columns that are about to be updated: bool (B, 1, N, min(max_size - 1, `_offset`) + N).
    #[pyo3(signature = (N, window_size = None, return_array = false))]
    #[allow(non_snake_case, unused_variables)]
    fn make_mask<'py>(
        slf: &Bound<'py, Self>,
        N: i64,
        window_size: Option<i64>,
        return_array: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let op = "make_mask";
        let n_tokens = count(op, "N", N)?;
        let window = window_size.map(|window| count(op, "window_size", window)).transpose()?;
        mask_to_python(slf.py(), with(slf, |cache| cache.make_mask(n_tokens, window, true))??)
    }

    /// Raises NotImplementedError, as mlx-lm does.
    #[pyo3(signature = (group_size = 64, bits = 4))]
    #[expect(clippy::unused_self, reason = "a method that callers look for")]
    fn to_quantized(&self, group_size: i64, bits: i64) -> PyResult<()> {
        let scheme = format!("group_size={group_size}, bits={bits}");
        Err(PyNotImplementedError::new_err(format!(
            "BatchRotatingKVCache.to_quantized({scheme}): a ring of several sequences cannot be quantized"
        )))
    }
}
