//! `Cache`: what every Python cache class has.

use super::bridge::set_plain_attribute;
use super::list::PyCacheList;
use super::tree::{from_python, to_python};
use crate::cache::{Cache, CacheState, KvCache, LayerCache};
use crate::error::{Error, Result};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple, PyType};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// What one layer keeps between tokens. Use a subclass, such as `KVCache`.
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
    pub(super) fn read<T>(&self, read: impl FnOnce(&(dyn LayerCache + 'static)) -> T) -> PyResult<T> {
        Ok(read(self.lock()?.as_dyn()))
    }

    /// Runs `change` with the cache behind the trait; what fails there leaves the cache as it was.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut (dyn LayerCache + 'static)) -> Result<T>) -> PyResult<T> {
        Ok(change(self.lock()?.as_dyn_mut())?)
    }

    /// Runs `read` with the keys and values.
    pub(super) fn read_kv<T>(&self, read: impl FnOnce(&(dyn KvCache + 'static)) -> T) -> PyResult<T> {
        Ok(read(self.lock()?.as_kv()?))
    }

    /// Runs `change` with the keys and values; what fails there leaves the cache as it was.
    pub(super) fn change_kv<T>(&self, change: impl FnOnce(&mut (dyn KvCache + 'static)) -> Result<T>) -> PyResult<T> {
        Ok(change(self.lock()?.as_kv_mut()?)?)
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

/// The cache inside an object of a subclass.
pub(super) fn base<'a>(object: &'a Bound<'_, PyAny>) -> PyResult<&'a PyCache> {
    Ok(object.cast::<PyCache>()?.get())
}

/// The cache inside an object of ours; None for other classes, and for a list, whose children are Python's.
pub(super) fn own<'a>(object: &'a Bound<'_, PyAny>) -> Option<&'a PyCache> {
    if object.is_instance_of::<PyCacheList>() { None } else { object.cast::<PyCache>().ok().map(Bound::get) }
}

/// A count that must not be negative.
pub(super) fn count(op: &'static str, name: &str, value: i64) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::value(op, format!("{name} of at least 0"), value))
}

#[pymethods]
impl PyCache {
    #[new]
    #[pyo3(signature = (*_args, **_kwargs))]
    fn py_new(_args: &Bound<'_, PyTuple>, _kwargs: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        Err(PyTypeError::new_err("Cache has no constructor; use KVCache or another subclass"))
    }

    /// All that makes up the cache, in the order of mlx-lm 0.32.2: a snapshot that later updates do not change.
    #[getter]
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, self.read(LayerCache::state)?)
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
        self.read(LayerCache::size)
    }

    /// True before the first update.
    fn empty(&self) -> PyResult<bool> {
        self.read(LayerCache::is_empty)
    }

    /// Bytes of the buffers, padding included.
    #[getter]
    fn nbytes(&self) -> PyResult<usize> {
        self.read(LayerCache::nbytes)
    }

    /// True if the newest tokens can be taken back.
    fn is_trimmable(&self) -> PyResult<bool> {
        self.read(LayerCache::is_trimmable)
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
        let Ok(kv) = cache.as_kv() else { return Ok(format!("{name}({:?})", cache.as_dyn().buffers())) };
        let keys = kv.keys().map(|keys| format!(", keys={:?}", keys.arrays()[0])).unwrap_or_default();
        Ok(format!("{name}(offset={}{keys})", kv.offset()))
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
