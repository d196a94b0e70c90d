//! `RotatingKVCache`.

use super::attention::PyMaskingCache;
use super::base::{base, count};
use super::batch::merged;
use super::cache_to_python;
use crate::cache::plan::Ring;
use crate::cache::{Cache, RotatingKvCache, Scheme};
use pyo3::exceptions::PyTypeError;
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

    /// The same tokens in a QuantizedRotatingKVCache.
    #[pyo3(signature = (group_size = 64, bits = 4))]
    fn to_quantized<'py>(slf: &Bound<'py, Self>, group_size: i64, bits: i64) -> PyResult<Bound<'py, PyAny>> {
        let op = "to_quantized";
        let scheme = Scheme::new(op, count(op, "group_size", group_size)?, count(op, "bits", bits)?)?;
        let quantized = with_rotating(slf.as_any(), |cache| cache.to_quantized(scheme))??;
        cache_to_python(slf.py(), Cache::Rotating(quantized))
    }

    /// A BatchRotatingKVCache of the sequences in `caches`; the shorter ones get padding on the left.
    #[classmethod]
    fn merge<'py>(class: &Bound<'py, PyType>, caches: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        cache_to_python(class.py(), merged(caches)?)
    }
}

/// Runs `f` with the ring inside an object of a rotating class.
pub(super) fn with_rotating<T>(object: &Bound<'_, PyAny>, f: impl FnOnce(&mut RotatingKvCache) -> T) -> PyResult<T> {
    match &mut *base(object)?.lock()? {
        Cache::Rotating(cache) => Ok(f(cache)),
        other => Err(PyTypeError::new_err(format!("expected a RotatingKVCache, got {other:?}"))),
    }
}

fn ring(slf: &Bound<'_, PyRotatingKvCache>) -> PyResult<Ring> {
    with_rotating(slf.as_any(), |cache| *cache.ring())
}

fn set_ring(slf: &Bound<'_, PyRotatingKvCache>, ring: Ring) -> PyResult<()> {
    with_rotating(slf.as_any(), |cache| cache.set_ring(ring))
}
