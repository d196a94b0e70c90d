//! `QuantizedRotatingKVCache`, which mlx-lm lacks.

use super::attention::PyMaskingCache;
use super::base::count;
use super::rotating::with_rotating;
use crate::cache::{RotatingKvCache, Scheme};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};

/// A RotatingKVCache whose rows are affine-quantized. `QuantizedRotatingKVCache(max_size, keep=0, group_size=64, bits=8)`
#[pyclass(name = "QuantizedRotatingKVCache", module = "mlxrs_py.cache", extends = PyMaskingCache, subclass, frozen)]
pub(super) struct PyQuantizedRotatingKvCache;

#[pymethods]
impl PyQuantizedRotatingKvCache {
    #[new]
    #[classmethod]
    #[pyo3(signature = (*_args, **_kwargs), text_signature = "(max_size, keep=0, group_size=64, bits=8)")]
    fn py_new(
        class: &Bound<'_, PyType>,
        _args: &Bound<'_, PyTuple>,
        _kwargs: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        Ok(PyMaskingCache::new(class, "QuantizedRotatingKVCache")?.add_subclass(Self))
    }

    #[pyo3(signature = (max_size, keep = 0, group_size = 64, bits = 8))]
    fn __init__(slf: &Bound<'_, Self>, max_size: i64, keep: i64, group_size: i64, bits: i64) -> PyResult<()> {
        let op = "QuantizedRotatingKVCache";
        let scheme = Scheme::new(op, count(op, "group_size", group_size)?, count(op, "bits", bits)?)?;
        let ring = RotatingKvCache::new(count(op, "max_size", max_size)?, count(op, "keep", keep)?)?;
        let quantized = ring.to_quantized(scheme)?;
        with_rotating(slf.as_any(), |cache| {
            let step = cache.step;
            *cache = quantized;
            cache.step = step;
        })
    }

    /// Rows that the ring holds once full.
    #[getter]
    fn max_size(slf: &Bound<'_, Self>) -> PyResult<usize> {
        with_rotating(slf.as_any(), |cache| cache.ring().max_size)
    }

    /// First rows that are never overwritten.
    #[getter]
    fn keep(slf: &Bound<'_, Self>) -> PyResult<usize> {
        with_rotating(slf.as_any(), |cache| cache.ring().keep)
    }

    /// Row after the last one written.
    #[getter]
    fn _idx(slf: &Bound<'_, Self>) -> PyResult<usize> {
        with_rotating(slf.as_any(), |cache| cache.ring().index)
    }

    /// Elements that share a scale and a bias.
    #[getter]
    fn group_size(slf: &Bound<'_, Self>) -> PyResult<Option<usize>> {
        with_rotating(slf.as_any(), |cache| cache.scheme().map(|scheme| scheme.group_size()))
    }

    /// Bits per element.
    #[getter]
    fn bits(slf: &Bound<'_, Self>) -> PyResult<Option<usize>> {
        with_rotating(slf.as_any(), |cache| cache.scheme().map(|scheme| scheme.bits()))
    }
}
