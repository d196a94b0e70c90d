//! `KVCache`.

use super::attention::PyMaskingCache;
use super::base::{base, count};
use super::batch::merged;
use super::cache_to_python;
use super::quantized::PyQuantizedKvCache;
use super::wrap;
use crate::cache::Cache;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};

/// Keys and values in buffers that grow by `step` rows. `KVCache()`
#[pyclass(name = "KVCache", module = "mlxrs_py.cache", extends = PyMaskingCache, subclass, frozen)]
pub(super) struct PyKvCache;

#[pymethods]
impl PyKvCache {
    #[new]
    #[classmethod]
    #[pyo3(signature = (*_args, **_kwargs), text_signature = "()")]
    fn py_new(
        class: &Bound<'_, PyType>,
        _args: &Bound<'_, PyTuple>,
        _kwargs: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        Ok(PyMaskingCache::new(class, "KVCache")?.add_subclass(Self))
    }

    #[pyo3(signature = ())]
    #[expect(clippy::unused_self, reason = "the constructor takes nothing")]
    fn __init__(&self) {}

    /// The same tokens in a QuantizedKVCache.
    #[pyo3(signature = (group_size = 64, bits = 4))]
    fn to_quantized<'py>(slf: &Bound<'py, Self>, group_size: i64, bits: i64) -> PyResult<Bound<'py, PyAny>> {
        let op = "to_quantized";
        let (group_size, bits) = (count(op, "group_size", group_size)?, count(op, "bits", bits)?);
        let quantized = match &*base(slf.as_any())?.lock()? {
            Cache::Standard(cache) => cache.to_quantized(group_size, bits)?,
            other => return Err(PyTypeError::new_err(format!("expected a KVCache, got {other:?}"))),
        };
        wrap(slf.py(), Cache::Quantized(quantized), PyQuantizedKvCache)
    }

    /// A BatchKVCache of the sequences in `caches`; the shorter ones get padding on the left.
    #[classmethod]
    fn merge<'py>(class: &Bound<'py, PyType>, caches: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        cache_to_python(class.py(), merged(caches)?)
    }
}
