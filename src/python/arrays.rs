//! `ArraysCache`.

use super::base::{PyCache, base, count};
use super::bridge::{PyArray, integers, places};
use super::foreign::adopt_one;
use crate::array::Array;
use crate::cache::{ArraysCache, Cache};
use crate::error::Result;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple, PyType};

const PADDING: &str = "left_padding (B,)";
const LENGTHS: &str = "lengths (B,)";

/// Recurrent states of a layer, one per slot. `ArraysCache(size, left_padding=None)`
#[pyclass(name = "ArraysCache", module = "mlxrs_py.cache", extends = PyCache, subclass, frozen)]
pub(super) struct PyArraysCache;

#[pymethods]
impl PyArraysCache {
    #[new]
    #[pyo3(signature = (*_args, **_kwargs), text_signature = "(size, left_padding=None)")]
    fn py_new(_args: &Bound<'_, PyTuple>, _kwargs: Option<&Bound<'_, PyDict>>) -> PyClassInitializer<Self> {
        Self::around(Cache::Arrays(ArraysCache::default()))
    }

    #[pyo3(signature = (size, left_padding = None))]
    fn __init__(slf: &Bound<'_, Self>, size: i64, left_padding: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let op = "ArraysCache";
        let mut cache = ArraysCache::new(count(op, "size", size)?);
        // No padding at all is how callers spell that there is none.
        let left_padding = left_padding.map(|padding| integers(op, PADDING, padding)).transpose()?;
        cache.set_left_padding(left_padding.filter(|padding| padding.dim_or(0) > 0))?;
        *base(slf.as_any())?.lock()? = Cache::Arrays(cache);
        Ok(())
    }

    /// mlx-lm's class once that is imported: a model of mlx-lm that asks `isinstance` writes no state into another one.
    #[getter(__class__)]
    fn class<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let modules = slf.py().import("sys")?.getattr("modules")?;
        let theirs = modules.get_item("mlx_lm.models.cache").and_then(|module| module.getattr("ArraysCache"));
        Ok(theirs.unwrap_or_else(|_| slf.get_type().into_any()))
    }

    fn __getitem__<'py>(slf: &Bound<'py, Self>, index: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        Self::cache(slf)?.as_any().get_item(index)
    }

    fn __setitem__(slf: &Bound<'_, Self>, index: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let slots = Self::cache(slf)?;
        slots.as_any().set_item(index, value)?;
        Self::set_cache(slf, slots.as_any())
    }

    /// The slots: arrays, or None where nothing was put yet.
    #[getter]
    fn cache<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyList>> {
        PyList::new(slf.py(), with(slf, |cache| Ok(cache.slots.clone()))?.into_iter().map(|slot| slot.map(PyArray)))
    }

    #[setter]
    fn set_cache(slf: &Bound<'_, Self>, slots: &Bound<'_, PyAny>) -> PyResult<()> {
        let slots = slots.try_iter()?.map(|slot| slot_from_python(&slot?)).collect::<PyResult<_>>()?;
        with(slf, |cache| {
            cache.slots = slots;
            Ok(())
        })
    }

    /// Tokens that each sequence must not see at its start, an integer array (B,), or None.
    #[getter]
    fn left_padding(slf: &Bound<'_, Self>) -> PyResult<Option<PyArray>> {
        with(slf, |cache| Ok(cache.left_padding.clone().map(PyArray)))
    }

    #[setter]
    fn set_left_padding(slf: &Bound<'_, Self>, left_padding: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let left_padding = left_padding.map(|padding| integers("left_padding", PADDING, padding)).transpose()?;
        with(slf, |cache| cache.set_left_padding(left_padding))
    }

    /// Tokens that each sequence has, an integer array (B,), or None.
    #[getter]
    fn lengths(slf: &Bound<'_, Self>) -> PyResult<Option<PyArray>> {
        with(slf, |cache| Ok(cache.lengths.clone().map(PyArray)))
    }

    #[setter]
    fn set_lengths(slf: &Bound<'_, Self>, lengths: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let lengths = lengths.map(|lengths| integers("lengths", LENGTHS, lengths)).transpose()?;
        with(slf, |cache| cache.set_lengths(lengths))
    }

    /// Sequences that are held.
    #[getter]
    fn batch_size(slf: &Bound<'_, Self>) -> PyResult<usize> {
        with(slf, |cache| Ok(cache.batch_size()))
    }

    /// The bool mask (B, N) that is True for tokens and False for padding; None if nothing is padded.
    #[allow(non_snake_case)]
    fn make_mask(slf: &Bound<'_, Self>, N: i64) -> PyResult<Option<PyArray>> {
        with(slf, |cache| Ok(cache.make_mask(count("make_mask", "N", N)?)?.map(PyArray)))
    }

    /// Says how many tokens each sequence has in what comes next; other arguments are for other caches.
    #[pyo3(signature = (lengths = None, **_others))]
    fn prepare(
        slf: &Bound<'_, Self>,
        lengths: Option<&Bound<'_, PyAny>>,
        _others: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<()> {
        let lengths = lengths.ok_or_else(|| PyTypeError::new_err("ArraysCache.prepare: expected lengths, got none"))?;
        let lengths = integers("ArraysCache.prepare", LENGTHS, lengths)?;
        with(slf, |cache| cache.set_lengths(Some(lengths)))
    }

    /// Forgets padding and lengths.
    fn finalize(slf: &Bound<'_, Self>) -> PyResult<()> {
        with(slf, |cache| {
            cache.finalize();
            Ok(())
        })
    }

    /// Counts `N` tokens that went through the layer.
    #[allow(non_snake_case)]
    fn advance(slf: &Bound<'_, Self>, N: i64) -> PyResult<()> {
        with(slf, |cache| cache.advance(count("advance", "N", N)?))
    }

    /// Keeps the sequences at these places, in that order.
    fn filter(slf: &Bound<'_, Self>, batch_indices: &Bound<'_, PyAny>) -> PyResult<()> {
        let places = places("ArraysCache.filter", batch_indices)?;
        with(slf, |cache| cache.filter(&places))
    }

    /// Appends the sequences of another one.
    fn extend(slf: &Bound<'_, Self>, other: &Bound<'_, PyAny>) -> PyResult<()> {
        let other = copy_of(other)?;
        with(slf, |cache| cache.extend(&other))
    }

    /// The sequence at this place alone.
    fn extract<'py>(slf: &Bound<'py, Self>, idx: i64) -> PyResult<Bound<'py, PyAny>> {
        let one = with(slf, |cache| cache.extract(idx))?;
        Bound::new(slf.py(), Self::around(Cache::Arrays(one))).map(Bound::into_any)
    }

    /// One batch of caches of one sequence each.
    #[classmethod]
    fn merge<'py>(class: &Bound<'py, PyType>, caches: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let caches = caches.try_iter()?.map(|cache| copy_of(&cache?)).collect::<PyResult<Vec<_>>>()?;
        let merged = class.call_method1("__new__", (class,))?;
        *base(&merged)?.lock()? = Cache::Arrays(ArraysCache::merge(&caches)?);
        Ok(merged)
    }
}

impl PyArraysCache {
    /// An object around `cache`.
    pub(super) fn around(cache: Cache) -> PyClassInitializer<Self> {
        PyClassInitializer::from(PyCache::new(cache)).add_subclass(Self)
    }
}

fn slot_from_python(slot: &Bound<'_, PyAny>) -> PyResult<Option<Array>> {
    slot.extract::<Option<PyArray>>().map(|slot| slot.map(|array| array.0)).map_err(|_| {
        PyTypeError::new_err(format!("ArraysCache: expected an mlx.core.array or None in a slot, got {slot:?}"))
    })
}

fn with<T>(slf: &Bound<'_, PyArraysCache>, act: impl FnOnce(&mut ArraysCache) -> Result<T>) -> PyResult<T> {
    match &mut *base(slf.as_any())?.lock()? {
        Cache::Arrays(cache) => Ok(act(cache)?),
        other => Err(PyTypeError::new_err(format!("expected an ArraysCache, got {other:?}"))),
    }
}

/// What an ArraysCache, ours or mlx-lm's, holds.
fn copy_of(cache: &Bound<'_, PyAny>) -> PyResult<ArraysCache> {
    with(adopt_one(cache.clone())?.cast::<PyArraysCache>()?, |cache| Ok(cache.clone()))
}
