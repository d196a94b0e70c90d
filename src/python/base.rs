//! `Cache`: what every Python cache class has. The four classes below it add only their own names.

use super::bridge::{ArrayRef, PyArray, set_plain_attribute};
use super::tree::{from_python, to_python};
use crate::cache::{Cache, CacheState, KvCache, KvTensor, MaskMode};
use crate::error::{Error, Result};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple, PyType};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// Keys and values of one attention layer. Use a subclass: `KVCache`, `RotatingKVCache`, `QuantizedKVCache`,
/// `ConcatenateKVCache`.
#[pyclass(name = "Cache", module = "mlxrs_py.cache", subclass, dict, weakref, frozen)]
pub(super) struct PyCache {
    /// Locked only while Rust runs; Python, evaluation and files are reached with clones.
    inner: Mutex<Cache>,
}

impl PyCache {
    pub(super) const fn new(cache: Cache) -> Self {
        Self { inner: Mutex::new(cache) }
    }

    /// The cache. Never waits: with the GIL held nobody else can be inside, but a destructor that calls back.
    pub(super) fn lock(&self) -> PyResult<MutexGuard<'_, Cache>> {
        match self.inner.try_lock() {
            Ok(guard) => Ok(guard),
            // A panic inside cannot leave it half changed: every operation assigns once, at its end.
            Err(TryLockError::Poisoned(poisoned)) => Ok(PoisonError::into_inner(poisoned)),
            Err(TryLockError::WouldBlock) => Err(PyRuntimeError::new_err("the cache is in use by the caller")),
        }
    }

    /// Runs `read` with the cache behind the trait.
    pub(super) fn read<T>(&self, read: impl FnOnce(&(dyn KvCache + 'static)) -> T) -> PyResult<T> {
        Ok(read(self.lock()?.as_dyn()))
    }

    /// Runs `change` with the cache behind the trait; what fails there leaves the cache as it was.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut (dyn KvCache + 'static)) -> Result<T>) -> PyResult<T> {
        Ok(change(self.lock()?.as_dyn_mut())?)
    }

    /// Name of the mlx-lm class and the state, as files know them.
    pub(super) fn cache_state(&self) -> PyResult<CacheState<crate::array::Array>> {
        self.read(|cache| CacheState { class: cache.reference_class_name().to_owned(), state: cache.state() })
    }

    /// Takes over a class's `step`, which a subclass may have set.
    pub(super) fn set_step(&self, step: &Bound<'_, PyAny>) -> PyResult<()> {
        let step: usize = step.extract()?;
        if step == 0 {
            return Err(PyValueError::new_err("step: expected at least 1 row, got 0"));
        }
        self.lock()?.set_step(step);
        Ok(())
    }
}

/// The start of every class's `__new__`: an empty cache of the class `name` with the `step` of the Python class.
pub(super) fn new_base(class: &Bound<'_, PyType>, name: &'static str) -> PyResult<PyCache> {
    let cache = Cache::of_class(name).ok_or_else(|| PyTypeError::new_err(name))?;
    let base = PyCache::new(cache);
    base.set_step(&class.getattr("step")?)?;
    Ok(base)
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

/// A count that must not be negative.
pub(super) fn count(op: &'static str, name: &str, value: i64) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::value(op, format!("{name} of at least 0"), value))
}

#[pymethods]
impl PyCache {
    /// Rows by which the buffers grow. May be set on a subclass or an instance.
    #[classattr]
    fn step() -> usize {
        crate::cache::STEP
    }

    #[new]
    #[pyo3(signature = (*_args, **_kwargs))]
    fn py_new(_args: &Bound<'_, PyTuple>, _kwargs: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        Err(PyTypeError::new_err("Cache has no constructor; use KVCache or another subclass"))
    }

    /// Takes `keys` (B, H, S, D) and `values` (B, H, S, Dv) of S new tokens and gives all that attention shall see.
    fn update_and_fetch<'py>(
        &self,
        py: Python<'py>,
        keys: ArrayRef<'_>,
        values: ArrayRef<'_>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let (keys, values) = self.change(|cache| cache.update(&keys, &values))?;
        Ok((tensor_to_python(py, keys)?, tensor_to_python(py, values)?))
    }

    /// Tokens seen so far: the position of the next one.
    #[getter]
    fn offset(&self) -> PyResult<usize> {
        self.read(KvCache::offset)
    }

    #[setter]
    fn set_offset(&self, offset: i64) -> PyResult<()> {
        self.change(|cache| cache.set_offset(count("offset", "offset", offset)?))
    }

    /// Buffer of the keys, padding included; None before the first update.
    #[getter]
    fn keys<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.read(KvCache::keys)?.map(|keys| tensor_to_python(py, keys)).transpose()
    }

    #[setter]
    fn set_keys(&self, keys: &Bound<'_, PyAny>) -> PyResult<()> {
        let keys = tensor_from_python(keys)?;
        self.change(|cache| cache.set_keys(keys))
    }

    /// Buffer of the values, padding included; None before the first update.
    #[getter]
    fn values<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.read(KvCache::values)?.map(|values| tensor_to_python(py, values)).transpose()
    }

    #[setter]
    fn set_values(&self, values: &Bound<'_, PyAny>) -> PyResult<()> {
        let values = tensor_from_python(values)?;
        self.change(|cache| cache.set_values(values))
    }

    /// The valid rows of keys and values.
    fn keys_and_values<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let (keys, values) = self.read(KvCache::keys_and_values)??;
        Ok((tensor_to_python(py, keys)?, tensor_to_python(py, values)?))
    }

    /// All that makes up the cache, in the order of mlx-lm 0.32.2: a snapshot that later updates do not change.
    #[getter]
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, self.read(KvCache::state)?)
    }

    #[setter]
    fn set_state(&self, state: &Bound<'_, PyAny>) -> PyResult<()> {
        let state = from_python(state)?;
        self.change(|cache| cache.set_state(state))
    }

    /// Builds a cache from a `state`, without running the constructor.
    #[classmethod]
    fn from_state<'py>(class: &Bound<'py, PyType>, state: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let cache = class.call_method1("__new__", (class,))?;
        cache.setattr("state", state)?;
        Ok(cache)
    }

    /// Tokens whose rows are held.
    fn size(&self) -> PyResult<usize> {
        self.read(KvCache::size)
    }

    /// True before the first update.
    fn empty(&self) -> PyResult<bool> {
        self.read(KvCache::is_empty)
    }

    /// Bytes of the buffers, padding included.
    #[getter]
    fn nbytes(&self) -> PyResult<usize> {
        self.read(KvCache::nbytes)
    }

    /// True if the newest tokens can be taken back.
    fn is_trimmable(&self) -> PyResult<bool> {
        self.read(KvCache::is_trimmable)
    }

    /// Takes back up to `n` of the newest tokens and gives how many.
    fn trim(&self, n: i64) -> PyResult<usize> {
        self.change(|cache| cache.trim(count("trim", "n", n)?))
    }

    /// The mask for `N` tokens that are about to be updated: None, "causal", or a bool array that is True where a
    /// token may look.
    #[pyo3(signature = (N, window_size = None, return_array = false))]
    #[allow(non_snake_case)]
    fn make_mask<'py>(
        &self,
        py: Python<'py>,
        N: i64,
        window_size: Option<i64>,
        return_array: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let op = "make_mask";
        let n_tokens = count(op, "N", N)?;
        let window = window_size.map(|window| count(op, "window_size", window)).transpose()?;
        mask_to_python(py, self.read(|cache| cache.make_mask(n_tokens, window, return_array))??)
    }

    /// An independent cache of the same class; the arrays are shared until one of the two writes.
    fn copy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        Self::__copy__(slf)
    }

    fn __copy__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        duplicate(slf, None)
    }

    fn __deepcopy__<'py>(slf: &Bound<'py, Self>, memo: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        duplicate(slf, Some(memo))
    }

    fn __reduce_ex__<'py>(slf: &Bound<'py, Self>, _protocol: i32) -> PyResult<Bound<'py, PyTuple>> {
        let py = slf.py();
        let make = slf.get_type().getattr("from_state")?;
        let state = slf.get().state(py)?;
        (make, (state,), slf.getattr("__dict__")?).into_pyobject(py)
    }

    fn __setstate__(slf: &Bound<'_, Self>, attributes: &Bound<'_, PyDict>) -> PyResult<()> {
        attributes.iter().try_for_each(|(name, value)| slf.setattr(name.cast::<PyString>()?, value))
    }

    fn __setattr__<'py>(
        slf: &Bound<'py, Self>,
        name: &Bound<'py, PyString>,
        value: &Bound<'py, PyAny>,
    ) -> PyResult<()> {
        if name == "step" {
            slf.get().set_step(value)?;
        }
        set_plain_attribute(slf.as_any(), name, Some(value))
    }

    fn __delattr__(slf: &Bound<'_, Self>, name: &Bound<'_, PyString>) -> PyResult<()> {
        set_plain_attribute(slf.as_any(), name, None)?;
        if name == "step" { slf.get().set_step(&slf.get_type().getattr("step")?) } else { Ok(()) }
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let name = slf.get_type().qualname()?;
        let cache = slf.get().lock()?;
        let keys = cache.as_dyn().keys().map(|keys| format!(", keys={:?}", keys.arrays()[0])).unwrap_or_default();
        Ok(format!("{name}(offset={}{keys})", cache.as_dyn().offset()))
    }
}

/// A new object of the same Python class with the same arrays and attributes; deep if there is a memo.
fn duplicate<'py>(slf: &Bound<'py, PyCache>, memo: Option<&Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyAny>> {
    let py = slf.py();
    let class = slf.get_type();
    let twin = class.call_method1("__new__", (&class,))?;
    let copy = slf.get().lock()?.as_dyn().copy();
    *twin.cast::<PyCache>()?.get().lock()? = copy;
    let attributes = slf.getattr("__dict__")?;
    let attributes = match memo {
        None => attributes,
        Some(memo) => {
            memo.set_item(slf.as_ptr() as usize, &twin)?;
            py.import("copy")?.call_method1("deepcopy", (attributes, memo))?
        }
    };
    twin.getattr("__dict__")?.call_method1("update", (attributes,))?;
    Ok(twin)
}
