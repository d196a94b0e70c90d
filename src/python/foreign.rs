//! Caches of other Python classes: read for files, adopted as ours, put back after an interrupted prefill.

use super::base::{PyCache, own};
use super::batch::check_finalized;
use super::bridge::PyArray;
use super::cache_to_python;
use super::list::{PyCacheList, children};
use super::registry;
use super::tree::from_python;
use crate::array::Array;
use crate::cache::{Cache, CacheState, Checkpoint, State};
use pyo3::exceptions::{PyAttributeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple, PyType};

/// The module whose classes we stand for.
const REFERENCE: &str = "mlx_lm.models.cache";

/// True if the class of `cache` is exactly mlx-lm's class of that name.
pub(super) fn is_reference(class: &Bound<'_, PyType>, names: &[&str]) -> PyResult<bool> {
    let name = class.name()?;
    Ok(names.contains(&name.to_str()?) && class.module()? == REFERENCE)
}

/// Class name and state of any cache that has mlx-lm's `state`: a registered class's own, and of a subclass of ours that
/// is not registered those of the class that it extends.
pub(super) fn cache_state(cache: &Bound<'_, PyAny>) -> PyResult<CacheState<Array>> {
    if let Some(registered) = registry::cache_state(cache)? {
        return Ok(registered);
    }
    if cache.is_instance_of::<PyCache>() {
        let class = cache.get_type();
        // What Python code puts in the place of ours is no such descriptor.
        if class.getattr("state")?.get_type().name()? != "getset_descriptor" {
            let message = format!("expected a class that is registered or has the state of its base, got {class}");
            return Err(PyValueError::new_err(message));
        }
    }
    if let Ok(list) = cache.cast::<PyCacheList>() {
        let pair = |child: Bound<'_, PyAny>| {
            let CacheState { class, state } = cache_state(&child)?;
            Ok(State::List(vec![state, State::Str(class)]))
        };
        let state = State::List(children(list).into_iter().map(pair).collect::<PyResult<_>>()?);
        return Ok(CacheState { class: "CacheList".to_owned(), state });
    }
    if let Some(own) = own(cache) {
        return own.cache_state();
    }
    Ok(CacheState { class: cache.get_type().name()?.extract()?, state: foreign_state(cache)? })
}

/// The state of a cache of another class.
fn foreign_state(cache: &Bound<'_, PyAny>) -> PyResult<State<Array>> {
    let state = cache.getattr("state").map_err(|error| {
        if !error.is_instance_of::<PyAttributeError>(cache.py()) {
            return error;
        }
        PyTypeError::new_err(format!("expected a cache with a state, got {}", cache.get_type()))
    })?;
    from_python(&state)
}

/// The name of a cache's class, as states and files have it.
pub(super) fn class_name(cache: &Bound<'_, PyAny>) -> PyResult<String> {
    if let Some(name) = registry::name_of(cache)? {
        return Ok(name);
    }
    match cache.cast::<PyCache>() {
        Ok(own) => own.get().read(|cache| cache.reference_class_name().to_owned()),
        Err(_) => Ok(cache.get_type().name()?.to_str()?.to_owned()),
    }
}

/// Replaces mlx-lm's caches by ours with the same parameters, tokens and buffers, which are shared until one of the
/// two writes; the children of CacheLists too. Caches of other classes stay. Gives a new list.
#[pyfunction]
pub(super) fn adopt<'py>(caches: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyList>> {
    let adopted = caches.try_iter()?.map(|cache| adopt_one(cache?)).collect::<PyResult<Vec<_>>>()?;
    PyList::new(caches.py(), adopted)
}

pub(super) fn adopt_one(cache: Bound<'_, PyAny>) -> PyResult<Bound<'_, PyAny>> {
    let class = cache.get_type();
    if is_reference(&class, &["CacheList"])? {
        let children = adopt(&cache.getattr("caches")?)?.into_iter().map(Bound::unbind).collect();
        return Bound::new(cache.py(), PyCacheList::around(children)).map(Bound::into_any);
    }
    let name = class.name()?;
    let name = name.to_str()?;
    if class.module()? != REFERENCE || Cache::of_class(name).is_none() {
        return Ok(cache);
    }
    check_finalized(&cache)?;
    let ours = Cache::from_state(CacheState { class: name.to_owned(), state: from_python(&cache.getattr("state")?)? })?;
    let step = cache.getattr("step").and_then(|step| step.extract()).unwrap_or(crate::cache::STEP);
    let ours = cache_to_python(cache.py(), ours)?;
    if step != crate::cache::STEP {
        ours.setattr("step", step)?;
    }
    Ok(ours)
}

/// Every array that `cache` holds: what the memory barrier evaluates.
pub(super) fn collect_arrays(cache: &Bound<'_, PyAny>, arrays: &mut Vec<Array>) -> PyResult<()> {
    if let Some(own) = own(cache) {
        return own.read(|cache| arrays.extend(cache.buffers().into_iter().cloned()));
    }
    if let Ok(children) = cache.getattr("caches") {
        return children.try_iter()?.try_for_each(|child| collect_arrays(&child?, arrays));
    }
    foreign_state(cache)?.for_each_array(&mut |array| arrays.push(array.clone()));
    Ok(())
}

/// The way back to where a cache stood before a window.
pub(super) enum Snapshot<'py> {
    /// One of ours: the core knows.
    Own(Checkpoint),
    /// One of ours, all of it.
    Copy(Cache),
    /// A growing cache of mlx-lm: rows below the offset outlive the window, and holding its buffer would copy it.
    Offset(Bound<'py, PyDict>, Bound<'py, PyAny>),
    /// A list of caches.
    Children(Vec<(Bound<'py, PyAny>, Snapshot<'py>)>),
    /// Any other: its attributes, and what they were, arrays as new objects, since mlx-lm writes into the old ones.
    Attributes(Bound<'py, PyDict>, Vec<(Bound<'py, PyAny>, Bound<'py, PyAny>)>),
    /// No attributes that could be put back.
    Nothing,
}

impl<'py> Snapshot<'py> {
    pub(super) fn take(cache: &Bound<'py, PyAny>, n_tokens: usize) -> PyResult<Self> {
        if let Some(own) = own(cache) {
            return own.read(|cache| Self::Own(cache.checkpoint(n_tokens)));
        }
        let class = cache.get_type();
        if is_list(cache)? {
            return Self::children(cache, |child| Self::take(child, n_tokens));
        }
        if is_reference(&class, &["KVCache", "QuantizedKVCache"])? && is_scheduled(cache)? {
            let attributes = cache.getattr("__dict__")?.cast_into::<PyDict>()?;
            return Ok(Self::Offset(attributes, cache.getattr("offset")?));
        }
        Self::attributes(cache)
    }

    /// The way back from any change, not from a window alone.
    pub(super) fn whole(cache: &Bound<'py, PyAny>) -> PyResult<Self> {
        match own(cache) {
            Some(own) => own.read(|cache| Self::Copy(cache.copy())),
            None if is_list(cache)? => Self::children(cache, Self::whole),
            None => Self::attributes(cache),
        }
    }

    fn children(list: &Bound<'py, PyAny>, take: impl Fn(&Bound<'py, PyAny>) -> PyResult<Self>) -> PyResult<Self> {
        let children = list.getattr("caches")?.try_iter()?;
        let children = children.map(|child| child.and_then(|child| Ok((child.clone(), take(&child)?))));
        Ok(Self::Children(children.collect::<PyResult<_>>()?))
    }

    fn attributes(cache: &Bound<'py, PyAny>) -> PyResult<Self> {
        let Ok(attributes) = cache.getattr("__dict__").and_then(|dict| Ok(dict.cast_into::<PyDict>()?)) else {
            return Ok(Self::Nothing);
        };
        let before = attributes.iter().map(|(name, value)| Ok((name, renew(&value)?))).collect::<PyResult<_>>()?;
        Ok(Self::Attributes(attributes, before))
    }

    /// Puts the cache back. Attributes are set in its dict, past Python code in which a second Ctrl-C could strike.
    pub(super) fn put_back(self, cache: &Bound<'py, PyAny>) -> PyResult<()> {
        match self {
            Self::Own(checkpoint) => {
                cache.cast::<PyCache>()?.get().lock()?.as_dyn_mut().rollback(checkpoint);
                Ok(())
            }
            Self::Copy(before) => {
                *cache.cast::<PyCache>()?.get().lock()? = before;
                Ok(())
            }
            Self::Offset(attributes, offset) => {
                restore_buffers(&attributes)?;
                attributes.set_item("offset", offset)
            }
            Self::Children(children) => {
                children.into_iter().try_for_each(|(child, snapshot)| snapshot.put_back(&child))
            }
            Self::Attributes(attributes, before) => {
                attributes.clear();
                before.into_iter().try_for_each(|(name, value)| attributes.set_item(name, value))
            }
            Self::Nothing => Ok(()),
        }
    }
}

/// True for a CacheList, ours or mlx-lm's.
fn is_list(cache: &Bound<'_, PyAny>) -> PyResult<bool> {
    Ok(cache.is_instance_of::<PyCacheList>() || is_reference(&cache.get_type(), &["CacheList"])?)
}

/// The same tree with new array objects around the same data.
fn renew<'py>(state: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = state.py();
    if let Ok(array) = state.extract::<PyArray>() {
        return array.into_pyobject(py);
    }
    if state.is_instance_of::<PyList>() {
        let items = state.try_iter()?.map(|item| renew(&item?)).collect::<PyResult<Vec<_>>>()?;
        return PyList::new(py, items).map(Bound::into_any);
    }
    if state.is_instance_of::<PyTuple>() {
        let items = state.try_iter()?.map(|item| renew(&item?)).collect::<PyResult<Vec<_>>>()?;
        return PyTuple::new(py, items).map(Bound::into_any);
    }
    Ok(state.clone())
}

/// True if the cache has buffers and nothing of them is left to compute.
fn is_scheduled(cache: &Bound<'_, PyAny>) -> PyResult<bool> {
    let mut buffers = Vec::new();
    collect_arrays(cache, &mut buffers)?;
    Ok(!buffers.is_empty() && buffers.iter().all(Array::is_scheduled))
}

/// Takes updates that were never computed off the buffers. mlx-lm's cache may have been interrupted between growing its
/// keys and its values: both are cut to the shorter.
fn restore_buffers(attributes: &Bound<'_, PyDict>) -> PyResult<()> {
    let buffers = |name: &str| {
        let state = attributes.get_item(name)?.map_or(Ok(State::None), |buffer| from_python(&buffer))?;
        state.try_map(&mut |array: Array| Ok::<_, PyErr>(array.before_unscheduled_updates()))
    };
    let (keys, values) = (buffers("keys")?, buffers("values")?);
    let mut shortest = usize::MAX;
    let mut measure = |array: &Array| shortest = shortest.min(array.dim_or(2));
    keys.for_each_array(&mut measure);
    values.for_each_array(&mut measure);
    for (name, buffer) in [("keys", keys), ("values", values)] {
        let cut = buffer.try_map(&mut |array: Array| array.rows(0, shortest))?;
        attributes.set_item(name, super::tree::to_python(attributes.py(), cut)?)?;
    }
    Ok(())
}
