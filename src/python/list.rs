//! `CacheList`, and what else acts on several caches at once. Its children are Python objects, of any class.

use super::base::{PyCache, count, own};
use super::cache_to_python;
use super::files::build_children;
use super::foreign::{Snapshot, class_name};
use super::tree::from_python;
use crate::cache::schema::{self, MAX_DEPTH};
use crate::cache::{Cache, CacheState, LayerCache, ListCache, Member, State, cannot_trim, trim_all};
use crate::error::Error;
use pyo3::exceptions::PyTypeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple, PyType};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Several caches of one layer. `CacheList(*caches)`
#[pyclass(name = "CacheList", module = "mlxrs_py.cache", extends = PyCache, subclass, frozen)]
pub(super) struct PyCacheList {
    /// Locked only to read or replace them. The cache of the base class stays a list without children.
    children: Mutex<Vec<Py<PyAny>>>,
}

#[pymethods]
impl PyCacheList {
    #[new]
    #[pyo3(signature = (*_args, **_kwargs), text_signature = "(*caches)")]
    fn py_new(_args: &Bound<'_, PyTuple>, _kwargs: Option<&Bound<'_, PyDict>>) -> PyClassInitializer<Self> {
        Self::around(Vec::new())
    }

    #[pyo3(signature = (*caches))]
    fn __init__(slf: &Bound<'_, Self>, caches: &Bound<'_, PyTuple>) -> PyResult<()> {
        Self::set_caches(slf, caches.as_any())
    }

    /// The children.
    #[getter]
    fn caches<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(slf.py(), children(slf))
    }

    #[setter]
    fn set_caches(slf: &Bound<'_, Self>, caches: &Bound<'_, PyAny>) -> PyResult<()> {
        let children = caches.try_iter()?.collect::<PyResult<Vec<_>>>()?;
        check_nesting(slf, &children, 1)?;
        replace(slf.get(), children.into_iter().map(Bound::unbind).collect());
        Ok(())
    }

    fn __getitem__<'py>(slf: &Bound<'py, Self>, index: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        Self::caches(slf)?.as_any().get_item(index)
    }

    /// Each child's state and the name of its class.
    #[getter]
    fn state<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyList>> {
        let pairs = children(slf).into_iter().map(|child| Ok((child.getattr("state")?, class_name(&child)?)));
        PyList::new(slf.py(), pairs.collect::<PyResult<Vec<_>>>()?)
    }

    #[setter]
    fn set_state(slf: &Bound<'_, Self>, state: &Bound<'_, PyAny>) -> PyResult<()> {
        let whole = CacheState { class: "CacheList".to_owned(), state: from_python(state)? };
        schema::check(&whole)
            .map_err(|fault| Error::value("state", format!("{}: {}", fault.key, fault.expected), fault.got))?;
        if let State::List(children) = whole.state {
            replace(slf.get(), build_children(slf.py(), Path::new("state"), "children", children)?);
        }
        Ok(())
    }

    /// The largest of the children's.
    fn size(slf: &Bound<'_, Self>) -> PyResult<usize> {
        let sizes = children(slf).into_iter().map(|child| child.call_method0("size")?.extract());
        Ok(sizes.collect::<PyResult<Vec<_>>>()?.into_iter().max().unwrap_or(0))
    }

    /// The first child's answer; True without children.
    fn empty(slf: &Bound<'_, Self>) -> PyResult<bool> {
        children(slf).first().map_or(Ok(true), |child| child.call_method0("empty")?.is_truthy())
    }

    /// Bytes of all children.
    #[getter]
    fn nbytes(slf: &Bound<'_, Self>) -> PyResult<usize> {
        children(slf).into_iter().map(|child| child.getattr("nbytes")?.extract::<usize>()).sum()
    }

    /// True if all children can take back tokens.
    fn is_trimmable(slf: &Bound<'_, Self>) -> PyResult<bool> {
        all_trimmable(&children(slf))
    }

    /// Takes back up to `n` of the newest tokens of every child, and gives how many.
    fn trim(slf: &Bound<'_, Self>, n: i64) -> PyResult<usize> {
        let n = count("CacheList.trim", "n", n)?;
        match trim_together(children(slf), n)? {
            None if n > 0 => Err(cannot_trim(n).into()),
            trimmed => Ok(trimmed.unwrap_or(0)),
        }
    }

    /// Keeps the sequences at these places.
    fn filter(slf: &Bound<'_, Self>, batch_indices: &Bound<'_, PyAny>) -> PyResult<()> {
        each_or_none(&children(slf), |_, child| child.call_method1("filter", (batch_indices,)))
    }

    /// Appends the sequences of another list, child by child.
    fn extend(slf: &Bound<'_, Self>, other: &Bound<'_, PyAny>) -> PyResult<()> {
        let (children, others) = (children(slf), children_of(other)?);
        check_number("CacheList.extend", children.len(), others.len())?;
        each_or_none(&children, |at, child| child.call_method1("extend", (&others[at],)))
    }

    /// The sequence at this place alone.
    fn extract<'py>(slf: &Bound<'py, Self>, idx: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let one = children(slf).into_iter().map(|child| child.call_method1("extract", (idx,)).map(Bound::unbind));
        Bound::new(slf.py(), Self::around(one.collect::<PyResult<_>>()?)).map(Bound::into_any)
    }

    /// Hands the arguments to every child.
    #[pyo3(signature = (**arguments))]
    fn prepare(slf: &Bound<'_, Self>, arguments: Option<&Bound<'_, PyDict>>) -> PyResult<()> {
        each_or_none(&children(slf), |_, child| child.call_method("prepare", (), arguments))
    }

    /// Tells every child that what was prepared is done.
    fn finalize(slf: &Bound<'_, Self>) -> PyResult<()> {
        each_or_none(&children(slf), |_, child| child.call_method0("finalize"))
    }

    /// A list of the children merged, each with its like.
    #[classmethod]
    fn merge<'py>(class: &Bound<'py, PyType>, caches: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let op = "CacheList.merge";
        let lists = caches.try_iter()?.map(|list| children_of(&list?)).collect::<PyResult<Vec<_>>>()?;
        let first = lists.first().ok_or_else(|| Error::value(op, "at least one list", "none"))?;
        lists.iter().try_for_each(|list| check_number(op, first.len(), list.len()))?;
        let merge = |at: usize| {
            let alike = PyList::new(class.py(), lists.iter().map(|list| &list[at]))?;
            first[at].call_method1("merge", (alike,)).map(Bound::unbind)
        };
        let merged = class.call_method1("__new__", (class,))?;
        replace(merged.cast::<Self>()?.get(), (0..first.len()).map(merge).collect::<PyResult<_>>()?);
        Ok(merged)
    }

    /// A list of copies, of the same class.
    fn copy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        Self::__copy__(slf)
    }

    fn __copy__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let copy = slf.py().import("copy")?;
        let twin = slf.get_type().call_method1("__new__", (slf.get_type(),))?;
        let copies = children(slf).into_iter().map(|child| {
            // A plain copy of another class would write into the same arrays.
            let way = if child.is_instance_of::<PyCache>() { "copy" } else { "deepcopy" };
            copy.call_method1(way, (child,)).map(Bound::unbind)
        });
        replace(twin.cast::<Self>()?.get(), copies.collect::<PyResult<_>>()?);
        twin.getattr("__dict__")?.call_method1("update", (slf.getattr("__dict__")?,))?;
        Ok(twin)
    }

    fn __deepcopy__<'py>(slf: &Bound<'py, Self>, memo: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let deepcopy = slf.py().import("copy")?.getattr("deepcopy")?;
        let twin = slf.get_type().call_method1("__new__", (slf.get_type(),))?;
        memo.set_item(slf.as_ptr() as usize, &twin)?;
        let copies = children(slf).into_iter().map(|child| deepcopy.call1((child, memo)).map(Bound::unbind));
        replace(twin.cast::<Self>()?.get(), copies.collect::<PyResult<_>>()?);
        twin.getattr("__dict__")?.call_method1("update", (deepcopy.call1((slf.getattr("__dict__")?, memo))?,))?;
        Ok(twin)
    }

    fn __reduce_ex__<'py>(slf: &Bound<'py, Self>, _protocol: i32) -> PyResult<Bound<'py, PyTuple>> {
        let py = slf.py();
        let attributes = slf.getattr("__dict__")?.cast_into::<PyDict>()?.copy()?;
        attributes.set_item("caches", Self::caches(slf)?)?;
        let make = py.import("copyreg")?.getattr("__newobj__")?;
        (make, (slf.get_type(),), attributes).into_pyobject(py)
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let parts = children(slf).into_iter().map(|child| Ok(child.repr()?.to_str()?.to_owned()));
        Ok(format!("{}({})", slf.get_type().qualname()?, parts.collect::<PyResult<Vec<_>>>()?.join(", ")))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Nothing of Python's runs while they are locked, so nobody holds the lock here.
        self.children.try_lock().map_or(Ok(()), |children| children.iter().try_for_each(|child| visit.call(child)))
    }

    fn __clear__(&self) {
        replace(self, Vec::new());
    }
}

impl PyCacheList {
    /// An object around these children.
    pub(super) fn around(children: Vec<Py<PyAny>>) -> PyClassInitializer<Self> {
        let base = PyCache::new(Cache::List(ListCache::default()));
        PyClassInitializer::from(base).add_subclass(Self { children: Mutex::new(children) })
    }
}

/// The children as they are now.
pub(super) fn children<'py>(list: &Bound<'py, PyCacheList>) -> Vec<Bound<'py, PyAny>> {
    let children = list.get().children.lock().unwrap_or_else(PoisonError::into_inner);
    children.iter().map(|child| child.bind(list.py()).clone()).collect()
}

/// Puts other children in. The old ones go after the lock does: their destructors may run Python.
fn replace(list: &PyCacheList, children: Vec<Py<PyAny>>) {
    let old = std::mem::replace(&mut *list.children.lock().unwrap_or_else(PoisonError::into_inner), children);
    drop(old);
}

/// Objects for the children of a list in Rust.
pub(super) fn to_python(py: Python<'_>, list: Cache) -> PyResult<Vec<Py<PyAny>>> {
    let Cache::List(list) = list else { return Err(PyTypeError::new_err("expected a CacheList")) };
    list.children.into_iter().map(|child| cache_to_python(py, child).map(Bound::unbind)).collect()
}

/// The children of a list of ours or of mlx-lm's.
fn children_of<'py>(list: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let Ok(caches) = list.getattr("caches") else {
        let got = list.get_type().qualname()?;
        return Err(PyTypeError::new_err(format!("expected a CacheList, got {got}")));
    };
    caches.try_iter()?.collect()
}

fn check_number(op: &'static str, expected: usize, got: usize) -> PyResult<()> {
    if expected == got { Ok(()) } else { Err(Error::value(op, format!("a list of {expected} caches"), got).into()) }
}

/// Refuses a list inside of itself, and more levels than files have.
fn check_nesting(list: &Bound<'_, PyCacheList>, inside: &[Bound<'_, PyAny>], depth: usize) -> PyResult<()> {
    for child in inside.iter().filter_map(|child| child.cast::<PyCacheList>().ok()) {
        if child.is(list) || depth >= MAX_DEPTH {
            let expected = format!("at most {MAX_DEPTH} CacheLists in each other, none in itself");
            return Err(Error::value("CacheList", expected, "more").into());
        }
        check_nesting(list, &children(child), depth + 1)?;
    }
    Ok(())
}

/// Calls each child. If one fails, all are as they were.
fn each_or_none<'py>(
    children: &[Bound<'py, PyAny>],
    mut act: impl FnMut(usize, &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>>,
) -> PyResult<()> {
    or_as_before(children, || children.iter().enumerate().try_for_each(|(at, child)| act(at, child).map(|_| ())))
}

/// Runs `act`. If it fails, the caches are as they were.
fn or_as_before<T>(caches: &[Bound<'_, PyAny>], act: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    let before = caches.iter().map(Snapshot::whole).collect::<PyResult<Vec<_>>>()?;
    act().inspect_err(|_| {
        for (cache, snapshot) in caches.iter().zip(before) {
            if let Err(error) = snapshot.put_back(cache) {
                error.write_unraisable(cache.py(), Some(cache));
            }
        }
    })
}

/// A Python cache among others.
struct PyMember<'py>(Bound<'py, PyAny>);

impl Member for PyMember<'_> {
    type Error = PyErr;

    fn is_trimmable(&self) -> PyResult<bool> {
        self.0.call_method0("is_trimmable")?.is_truthy()
    }

    fn n_held(&self) -> PyResult<usize> {
        n_held(&self.0)
    }

    fn trim(&mut self, n: usize) -> PyResult<()> {
        self.0.call_method1("trim", (n,)).map(|_| ())
    }
}

/// Tokens that a cache of any class could take back.
fn n_held(cache: &Bound<'_, PyAny>) -> PyResult<usize> {
    if let Some(own) = own(cache) {
        return own.read(LayerCache::n_held);
    }
    if let Ok(children) = cache.getattr("caches") {
        let held = children.try_iter()?.map(|child| n_held(&child?)).collect::<PyResult<Vec<_>>>()?;
        return Ok(held.into_iter().min().unwrap_or(usize::MAX));
    }
    // A batch has one offset per sequence, and a chunk has dropped what comes before its start.
    match cache.getattr("offset").and_then(|offset| offset.extract::<usize>()) {
        Ok(offset) => {
            let start = cache.getattr("start_position").and_then(|start| start.extract()).unwrap_or(0);
            Ok(offset.saturating_sub(start))
        }
        Err(_) => cache.call_method0("size")?.extract(),
    }
}

/// True if every cache can take back tokens.
fn all_trimmable(caches: &[Bound<'_, PyAny>]) -> PyResult<bool> {
    for cache in caches {
        if !cache.call_method0("is_trimmable")?.is_truthy()? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// As [`trim_all`]; what fails leaves all caches as they were.
fn trim_together(caches: Vec<Bound<'_, PyAny>>, n: usize) -> PyResult<Option<usize>> {
    let mut members: Vec<_> = caches.iter().cloned().map(PyMember).collect();
    or_as_before(&caches, || trim_all(&mut members, n))
}

/// Takes back up to `num_tokens` of the newest tokens of every cache and gives how many: the same number for all.
#[pyfunction]
pub(super) fn trim_prompt_cache(cache: &Bound<'_, PyAny>, num_tokens: i64) -> PyResult<usize> {
    let n = count("trim_prompt_cache", "num_tokens", num_tokens)?;
    Ok(trim_together(cache.try_iter()?.collect::<PyResult<_>>()?, n)?.unwrap_or(0))
}
