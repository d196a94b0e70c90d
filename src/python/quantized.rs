//! `QuantizedKVCache`.

use super::attention::PyMaskingCache;
use super::base::{base, count};
use super::batch::merged;
use super::cache_to_python;
use crate::cache::{Cache, QuantizedKvCache};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};

/// A KVCache whose rows are affine-quantized. `QuantizedKVCache(group_size=64, bits=8)`
#[pyclass(name = "QuantizedKVCache", module = "mlxrs_py.cache", extends = PyMaskingCache, subclass, frozen)]
pub(super) struct PyQuantizedKvCache;

#[pymethods]
impl PyQuantizedKvCache {
    #[new]
    #[classmethod]
    #[pyo3(signature = (*_args, **_kwargs), text_signature = "(group_size=64, bits=8)")]
    fn py_new(
        class: &Bound<'_, PyType>,
        _args: &Bound<'_, PyTuple>,
        _kwargs: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        Ok(PyMaskingCache::new(class, "QuantizedKVCache")?.add_subclass(Self))
    }

    #[pyo3(signature = (group_size = 64, bits = 8))]
    fn __init__(slf: &Bound<'_, Self>, group_size: i64, bits: i64) -> PyResult<()> {
        let op = "QuantizedKVCache";
        let mut cache = QuantizedKvCache::new(count(op, "group_size", group_size)?, count(op, "bits", bits)?)?;
        let mut inner = base(slf.as_any())?.lock()?;
        cache.step = inner.step();
        *inner = Cache::Quantized(cache);
        Ok(())
    }

    /// Elements that share a scale and a bias.
    #[getter]
    fn group_size(slf: &Bound<'_, Self>) -> PyResult<usize> {
        with(slf, |cache| cache.scheme().group_size())
    }

    #[setter]
    fn set_group_size(slf: &Bound<'_, Self>, group_size: i64) -> PyResult<()> {
        let group_size = count("group_size", "group_size", group_size)?;
        with(slf, |cache| cache.set_scheme(group_size, cache.scheme().bits()))??;
        Ok(())
    }

    /// Bits per element.
    #[getter]
    fn bits(slf: &Bound<'_, Self>) -> PyResult<usize> {
        with(slf, |cache| cache.scheme().bits())
    }

    #[setter]
    fn set_bits(slf: &Bound<'_, Self>, bits: i64) -> PyResult<()> {
        let bits = count("bits", "bits", bits)?;
        with(slf, |cache| cache.set_scheme(cache.scheme().group_size(), bits))??;
        Ok(())
    }

    /// A BatchQuantizedKVCache of the sequences in `caches`; the shorter ones get padding on the left.
    #[classmethod]
    fn merge<'py>(class: &Bound<'py, PyType>, caches: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        cache_to_python(class.py(), merged(caches)?)
    }
}

/// Runs `f` with the quantized cache inside.
fn with<T>(slf: &Bound<'_, PyQuantizedKvCache>, f: impl FnOnce(&mut QuantizedKvCache) -> T) -> PyResult<T> {
    match &mut *base(slf.as_any())?.lock()? {
        Cache::Quantized(cache) => Ok(f(cache)),
        other => Err(PyTypeError::new_err(format!("expected a QuantizedKVCache, got {other:?}"))),
    }
}
