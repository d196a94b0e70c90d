//! `RotatingKVCache`.

use super::attention::PyMaskingCache;
use super::base::{base, count};
use crate::cache::plan::Ring;
use crate::cache::{Cache, RotatingKvCache};
use pyo3::exceptions::{PyNotImplementedError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};

/// The newest `max_size` tokens in a ring, behind the first `keep`. `RotatingKVCache(max_size, keep=0)`
#[pyclass(name = "RotatingKVCache", module = "mlxrs_py.cache", extends = PyMaskingCache, subclass, frozen)]
pub(super) struct PyRotatingKvCache;

#[pymethods]
impl PyRotatingKvCache {
    #[new]
    #[classmethod]
    #[pyo3(signature = (*_args, **_kwargs), text_signature = "(max_size, keep=0)")]
    fn py_new(
        class: &Bound<'_, PyType>,
        _args: &Bound<'_, PyTuple>,
        _kwargs: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        Ok(PyMaskingCache::new(class, "RotatingKVCache")?.add_subclass(Self))
    }

    #[pyo3(signature = (max_size, keep = 0))]
    fn __init__(slf: &Bound<'_, Self>, max_size: i64, keep: i64) -> PyResult<()> {
        let op = "RotatingKVCache";
        let mut cache = RotatingKvCache::new(count(op, "max_size", max_size)?, count(op, "keep", keep)?)?;
        let mut inner = base(slf.as_any())?.lock()?;
        cache.step = inner.step();
        *inner = Cache::Rotating(cache);
        Ok(())
    }

    /// Rows that the ring holds once full.
    #[getter]
    fn max_size(slf: &Bound<'_, Self>) -> PyResult<usize> {
        ring(slf).map(|ring| ring.max_size)
    }

    #[setter]
    fn set_max_size(slf: &Bound<'_, Self>, max_size: i64) -> PyResult<()> {
        let max_size = count("max_size", "max_size", max_size)?;
        set_ring(slf, Ring { max_size, ..ring(slf)? })
    }

    /// First rows that are never overwritten.
    #[getter]
    fn keep(slf: &Bound<'_, Self>) -> PyResult<usize> {
        ring(slf).map(|ring| ring.keep)
    }

    #[setter]
    fn set_keep(slf: &Bound<'_, Self>, keep: i64) -> PyResult<()> {
        let keep = count("keep", "keep", keep)?;
        set_ring(slf, Ring { keep, ..ring(slf)? })
    }

    /// Row after the last one written.
    #[getter]
    fn _idx(slf: &Bound<'_, Self>) -> PyResult<usize> {
        ring(slf).map(|ring| ring.index)
    }

    #[setter(_idx)]
    fn set_idx(slf: &Bound<'_, Self>, index: i64) -> PyResult<()> {
        let index = count("_idx", "_idx", index)?;
        set_ring(slf, Ring { index, ..ring(slf)? })
    }

    /// Not there yet: raises NotImplementedError, as mlx-lm does.
    #[pyo3(signature = (group_size = 64, bits = 4))]
    #[expect(clippy::unused_self, reason = "a method that callers look for")]
    fn to_quantized(&self, group_size: i64, bits: i64) -> PyResult<()> {
        let scheme = format!("group_size={group_size}, bits={bits}");
        Err(PyNotImplementedError::new_err(format!(
            "RotatingKVCache.to_quantized({scheme}): a ring cannot be quantized"
        )))
    }
}

fn ring(slf: &Bound<'_, PyRotatingKvCache>) -> PyResult<Ring> {
    match &*base(slf.as_any())?.lock()? {
        Cache::Rotating(cache) => Ok(*cache.ring()),
        other => Err(PyTypeError::new_err(format!("expected a RotatingKVCache, got {other:?}"))),
    }
}

fn set_ring(slf: &Bound<'_, PyRotatingKvCache>, ring: Ring) -> PyResult<()> {
    if let Cache::Rotating(cache) = &mut *base(slf.as_any())?.lock()? {
        cache.set_ring(ring);
    }
    Ok(())
}
