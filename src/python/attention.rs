//! `AttentionCache` and `MaskingCache`: what the Python classes with keys and values share.

use super::base::{PyCache, count};
use super::bridge::{ArrayRef, PyArray};
use crate::cache::{Cache, KvCache, KvTensor, MaskMode};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyTuple, PyType};

/// A cache with keys and values. Use a subclass.
#[pyclass(name = "AttentionCache", module = "mlxrs_py.cache", extends = PyCache, subclass, frozen)]
pub(super) struct PyAttentionCache;

/// An attention cache that makes masks. Use a subclass.
#[pyclass(name = "MaskingCache", module = "mlxrs_py.cache", extends = PyAttentionCache, subclass, frozen)]
pub(super) struct PyMaskingCache;

impl PyMaskingCache {
    /// The start of every class's `__new__`: an empty cache of the class `name` with the `step` of the Python class.
    pub(super) fn new(class: &Bound<'_, PyType>, name: &'static str) -> PyResult<PyClassInitializer<Self>> {
        Ok(PyAttentionCache::new(class, name)?.add_subclass(Self))
    }

    /// An object around `cache`, to be given a subclass.
    pub(super) fn around(cache: Cache) -> PyClassInitializer<Self> {
        PyAttentionCache::around(cache).add_subclass(Self)
    }
}

impl PyAttentionCache {
    /// As [`PyMaskingCache::new`].
    pub(super) fn new(class: &Bound<'_, PyType>, name: &'static str) -> PyResult<PyClassInitializer<Self>> {
        let cache = Cache::of_class(name).ok_or_else(|| PyTypeError::new_err(name))?;
        let base = PyCache::new(cache);
        base.set_step(&class.getattr("step")?)?;
        Ok(PyClassInitializer::from(base).add_subclass(Self))
    }

    /// As [`PyMaskingCache::around`].
    pub(super) fn around(cache: Cache) -> PyClassInitializer<Self> {
        PyClassInitializer::from(PyCache::new(cache)).add_subclass(Self)
    }
}

/// Keys or values on their way out.
pub(super) fn tensor_to_python(py: Python<'_>, tensor: KvTensor) -> PyResult<Bound<'_, PyAny>> {
    match tensor {
        KvTensor::Dense(array) => PyArray(array).into_pyobject(py),
        KvTensor::Quantized(arrays) => PyTuple::new(py, arrays.map(PyArray)).map(Bound::into_any),
    }
}

/// Keys or values on their way in: an array, a triple, or None.
fn tensor_from_python(value: &Bound<'_, PyAny>) -> PyResult<Option<KvTensor>> {
    if value.is_none() {
        return Ok(None);
    }
    if let Ok(array) = value.extract::<PyArray>() {
        return Ok(Some(KvTensor::Dense(array.0)));
    }
    let [packed, scales, biases]: [PyArray; 3] = value.extract().map_err(|_| {
        PyTypeError::new_err("expected an mlx.core.array, three of them (packed, scales, biases), or None")
    })?;
    Ok(Some(KvTensor::Quantized([packed.0, scales.0, biases.0])))
}

pub(super) fn mask_to_python(py: Python<'_>, mask: MaskMode) -> PyResult<Bound<'_, PyAny>> {
    match mask {
        MaskMode::None => Ok(py.None().into_bound(py)),
        MaskMode::Causal => "causal".into_bound_py_any(py),
        MaskMode::Array(array) => PyArray(array).into_pyobject(py),
    }
}

#[pymethods]
impl PyAttentionCache {
    /// Rows by which the buffers grow. May be set on a subclass or an instance.
    #[classattr]
    fn step() -> usize {
        crate::cache::STEP
    }

    /// Takes `keys` (B, H, S, D) and `values` (B, H, S, Dv) of S new tokens and gives all that attention shall see.
    fn update_and_fetch<'py>(
        slf: &Bound<'py, Self>,
        keys: ArrayRef<'_>,
        values: ArrayRef<'_>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let (keys, values) = slf.as_super().get().change_kv(|cache| cache.update(&keys, &values))?;
        Ok((tensor_to_python(slf.py(), keys)?, tensor_to_python(slf.py(), values)?))
    }

    /// Tokens seen so far: the position of the next one.
    #[getter]
    fn offset(slf: &Bound<'_, Self>) -> PyResult<usize> {
        slf.as_super().get().read_kv(KvCache::offset)
    }

    #[setter]
    fn set_offset(slf: &Bound<'_, Self>, offset: i64) -> PyResult<()> {
        slf.as_super().get().change_kv(|cache| cache.set_offset(count("offset", "offset", offset)?))
    }

    /// Buffer of the keys, padding included; None before the first update.
    #[getter]
    fn keys<'py>(slf: &Bound<'py, Self>) -> PyResult<Option<Bound<'py, PyAny>>> {
        slf.as_super().get().read_kv(KvCache::keys)?.map(|keys| tensor_to_python(slf.py(), keys)).transpose()
    }

    #[setter]
    fn set_keys(slf: &Bound<'_, Self>, keys: &Bound<'_, PyAny>) -> PyResult<()> {
        let keys = tensor_from_python(keys)?;
        slf.as_super().get().change_kv(|cache| cache.set_keys(keys))
    }

    /// Buffer of the values, padding included; None before the first update.
    #[getter]
    fn values<'py>(slf: &Bound<'py, Self>) -> PyResult<Option<Bound<'py, PyAny>>> {
        slf.as_super().get().read_kv(KvCache::values)?.map(|values| tensor_to_python(slf.py(), values)).transpose()
    }

    #[setter]
    fn set_values(slf: &Bound<'_, Self>, values: &Bound<'_, PyAny>) -> PyResult<()> {
        let values = tensor_from_python(values)?;
        slf.as_super().get().change_kv(|cache| cache.set_values(values))
    }

    /// The valid rows of keys and values.
    fn keys_and_values<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let (keys, values) = slf.as_super().get().read_kv(KvCache::keys_and_values)??;
        Ok((tensor_to_python(slf.py(), keys)?, tensor_to_python(slf.py(), values)?))
    }

    /// Takes back up to `n` of the newest tokens and gives how many.
    fn trim(slf: &Bound<'_, Self>, n: i64) -> PyResult<usize> {
        slf.as_super().get().change_kv(|cache| cache.trim(count("trim", "n", n)?))
    }
}

#[pymethods]
impl PyMaskingCache {
    /// The mask for `N` tokens that are about to be updated: None, "causal", or a bool array that is True where a
    /// token may look.
    #[pyo3(signature = (N, window_size = None, return_array = false))]
    #[allow(non_snake_case)]
    fn make_mask<'py>(
        slf: &Bound<'py, Self>,
        N: i64,
        window_size: Option<i64>,
        return_array: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let op = "make_mask";
        let n_tokens = count(op, "N", N)?;
        let window = window_size.map(|window| count(op, "window_size", window)).transpose()?;
        mask_to_python(
            slf.py(),
            slf.as_super().as_super().get().read_kv(|cache| cache.make_mask(n_tokens, window, return_array))??,
        )
    }
}
