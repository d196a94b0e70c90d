//! `BatchCache`: what the caches of several sequences share.

use super::attention::PyAttentionCache;
use super::base::{PyCache, base};
use super::bridge::PyArray;
use super::foreign::adopt_one;
use super::tree::from_python;
use crate::array::Array;
use crate::cache::plan::Sequences;
use crate::cache::{BatchCache, Cache, LayerCache, State, batch};
use crate::error::{Error, Result};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};

/// Keys and values of several sequences, padded on the left. Use a subclass.
#[pyclass(name = "BatchCache", module = "mlxrs_py.cache", extends = PyAttentionCache, subclass, frozen)]
pub(super) struct PyBatchCache;

impl PyBatchCache {
    /// The start of every class's `__new__`: an empty cache of the class `name` with the `step` of the Python class.
    pub(super) fn new(class: &Bound<'_, PyType>, name: &'static str) -> PyResult<PyClassInitializer<Self>> {
        Ok(PyAttentionCache::new(class, name)?.add_subclass(Self))
    }

    /// An object around `cache`, to be given a subclass.
    pub(super) fn around(cache: Cache) -> PyClassInitializer<Self> {
        PyClassInitializer::from(PyCache::new(cache)).add_subclass(PyAttentionCache).add_subclass(Self)
    }
}

/// Whole numbers, one per sequence: an mlx array, which is evaluated, a list, or anything else that can be iterated.
pub(super) fn numbers(op: &'static str, name: &str, value: &Bound<'_, PyAny>) -> PyResult<Vec<i32>> {
    if let Ok(PyArray(array)) = value.extract() {
        check_numbers(op, name, &array)?;
        return Ok(value.py().detach(move || array.to_i32())?);
    }
    let items = value.try_iter().map_err(|_| {
        let got = value.get_type().to_string();
        PyErr::from(Error::type_(op, format!("{name} as an array or a list of integers"), got))
    })?;
    items.map(|item| item?.extract()).collect()
}

/// Checks that an array holds integers (n,); MLX's array of nothing is one of floats.
fn check_numbers(op: &'static str, name: &str, array: &Array) -> Result<()> {
    if array.shape().len() == 1 && (array.dtype().is_integer() || array.dim(0) == 0) {
        return Ok(());
    }
    Err(Error::value(op, format!("{name} as integers (n,)"), format!("{array:?}")))
}

/// Whole numbers (n,) as an array: one that comes as an mlx array stays lazy.
pub(super) fn numbers_array(op: &'static str, name: &str, value: &Bound<'_, PyAny>) -> PyResult<Array> {
    let Ok(PyArray(array)) = value.extract() else { return Ok(Array::from_i32(&numbers(op, name, value)?)?) };
    check_numbers(op, name, &array)?;
    Ok(array)
}

/// Places of sequences; a negative one counts from the end.
fn places(op: &'static str, indices: Vec<i32>, n_sequences: usize) -> Result<Vec<usize>> {
    let place = |index: i32| {
        let place = if index < 0 { i64::from(index) + n_sequences as i64 } else { i64::from(index) };
        let out_of_range =
            || Error::Index { op, expected: format!("one of {n_sequences} sequences"), got: index.to_string() };
        usize::try_from(place).ok().filter(|&place| place < n_sequences).ok_or_else(out_of_range)
    };
    indices.into_iter().map(place).collect()
}

/// Runs `f` with the batch inside `slf`.
pub(super) fn with_batch<T>(
    slf: &Bound<'_, PyBatchCache>,
    f: impl FnOnce(&mut (dyn BatchCache + 'static)) -> Result<T>,
) -> PyResult<T> {
    Ok(f(base(slf.as_any())?.lock()?.as_batch_mut()?)?)
}

/// Copies of the caches behind Python objects, mlx-lm's too.
fn adopted(caches: &Bound<'_, PyAny>) -> PyResult<Vec<Cache>> {
    let copy = |cache: PyResult<Bound<'_, PyAny>>| {
        let cache = adopt_one(cache?)?;
        let Ok(own) = cache.cast::<PyCache>() else {
            let got = cache.get_type().qualname()?;
            return Err(PyTypeError::new_err(format!("expected caches of mlxrs_py or mlx-lm, got {got}")));
        };
        own.get().read(LayerCache::copy)
    };
    caches.try_iter()?.map(copy).collect()
}

/// A batch of the sequences in `caches`, which are ours or mlx-lm's.
pub(super) fn merged(caches: &Bound<'_, PyAny>) -> PyResult<Cache> {
    let caches = adopted(caches)?;
    Ok(batch::merge(&caches.iter().collect::<Vec<_>>())?)
}

#[pymethods]
impl PyBatchCache {
    /// A batch of the sequences in `caches`; the shorter ones get padding on the left.
    #[classmethod]
    fn merge<'py>(class: &Bound<'py, PyType>, caches: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let batch = class.call_method1("__new__", (class,))?;
        let mut merged = merged(caches)?;
        {
            let mut inner = base(&batch)?.lock()?;
            let (own, got) = (inner.as_dyn().reference_class_name(), merged.as_dyn().reference_class_name());
            if own != got {
                return Err(Error::type_("merge", format!("caches that form a {own}"), got).into());
            }
            merged.set_step(inner.step());
            *inner = merged;
        }
        Ok(batch)
    }

    /// Tokens seen by each sequence, int32 (B,): the positions of the next ones.
    #[getter]
    fn offset<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let offsets = with_batch(slf, |batch| Array::from_i32(&batch.sequences().offsets))?;
        PyArray(offsets).into_pyobject(slf.py())
    }

    #[setter]
    fn set_offset(slf: &Bound<'_, Self>, offset: &Bound<'_, PyAny>) -> PyResult<()> {
        let offsets = numbers("offset", "offset", offset)?;
        with_batch(slf, |batch| batch.set_sequences(Sequences { offsets, ..batch.sequences().clone() }))
    }

    /// Columns before the first token of each sequence, int32 (B,).
    #[getter]
    fn left_padding<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let left_padding = with_batch(slf, |batch| Array::from_i32(&batch.sequences().left_padding))?;
        PyArray(left_padding).into_pyobject(slf.py())
    }

    #[setter]
    fn set_left_padding(slf: &Bound<'_, Self>, left_padding: &Bound<'_, PyAny>) -> PyResult<()> {
        let left_padding = numbers("left_padding", "left_padding", left_padding)?;
        with_batch(slf, |batch| batch.set_sequences(Sequences { left_padding, ..batch.sequences().clone() }))
    }

    /// Keeps the sequences at `batch_indices`, in that order.
    fn filter(slf: &Bound<'_, Self>, batch_indices: &Bound<'_, PyAny>) -> PyResult<()> {
        let indices = numbers("filter", "batch_indices", batch_indices)?;
        with_batch(slf, |batch| batch.filter(&places("filter", indices, batch.sequences().len())?))
    }

    /// Appends the sequences of another batch, which does not change.
    fn extend(slf: &Bound<'_, Self>, other: &Bound<'_, PyAny>) -> PyResult<()> {
        let other = adopted(PyTuple::new(slf.py(), [other])?.as_any())?.remove(0);
        with_batch(slf, |batch| batch.extend(&other))
    }

    /// One sequence alone, without padding.
    fn extract<'py>(slf: &Bound<'py, Self>, idx: i32) -> PyResult<Bound<'py, PyAny>> {
        let one = with_batch(slf, |batch| batch.extract(places("extract", vec![idx], batch.sequences().len())?[0]))?;
        super::cache_to_python(slf.py(), one)
    }

    /// Says which of the columns to come are padding.
    #[pyo3(signature = (*, left_padding = None, lengths = None, right_padding = None))]
    fn prepare(
        slf: &Bound<'_, Self>,
        left_padding: Option<&Bound<'_, PyAny>>,
        lengths: Option<&Bound<'_, PyAny>>,
        right_padding: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let read = |name: &str, value: Option<&Bound<'_, PyAny>>| {
            value.map(|value| numbers("prepare", name, value)).transpose()
        };
        let (left, lengths, right) =
            (read("left_padding", left_padding)?, read("lengths", lengths)?, read("right_padding", right_padding)?);
        let mut cache = base(slf.as_any())?.lock()?;
        // On a copy: what fails in the second half undoes the first.
        let mut prepared = cache.clone();
        let batch = prepared.as_batch_mut()?;
        left.map_or(Ok(()), |left| batch.pad_left(&left))?;
        right.map_or(Ok(()), |right| batch.pad_right(lengths.as_deref(), &right))?;
        *cache = prepared;
        Ok(())
    }

    /// Moves the padding that was announced to the left of the tokens.
    fn finalize(slf: &Bound<'_, Self>) -> PyResult<()> {
        with_batch(slf, BatchCache::finalize)
    }

    /// What `prepare` has announced and `finalize` has not done yet, for pickles.
    #[getter]
    fn _pending(slf: &Bound<'_, Self>) -> PyResult<Option<Vec<i32>>> {
        with_batch(slf, |batch| Ok(batch.pending()))
    }

    #[setter(_pending)]
    fn set_pending(slf: &Bound<'_, Self>, pending: Option<Vec<i32>>) -> PyResult<()> {
        with_batch(slf, |batch| batch.set_pending(pending))
    }

    fn __reduce_ex__<'py>(slf: &Bound<'py, Self>, _protocol: i32) -> PyResult<Bound<'py, PyTuple>> {
        let py = slf.py();
        let attributes = slf.getattr("__dict__")?.cast_into::<PyDict>()?.copy()?;
        if let Some(pending) = Self::_pending(slf)? {
            attributes.set_item("_pending", pending)?;
        }
        (slf.get_type().getattr("from_state")?, (slf.getattr("state")?,), attributes).into_pyobject(py)
    }
}

/// Refuses a batch of mlx-lm that waits for `finalize`: its state does not tell.
pub(super) fn check_finalized(cache: &Bound<'_, PyAny>) -> PyResult<()> {
    for name in ["_right_padding", "_lengths"] {
        if let Ok(pending) = cache.getattr(name)
            && !matches!(from_python(&pending), Ok(State::None))
        {
            return Err(Error::value("adopt", "a batch whose right padding is finalized", "one that waits").into());
        }
    }
    Ok(())
}
