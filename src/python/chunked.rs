//! `ChunkedKVCache`.

use super::attention::PyAttentionCache;
use super::base::{base, count};
use crate::cache::{Cache, ChunkedKvCache};
use crate::error::Result;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};

/// The newest `chunk_size` tokens, once the front is trimmed. `ChunkedKVCache(chunk_size)`
#[pyclass(name = "ChunkedKVCache", module = "mlxrs_py.cache", extends = PyAttentionCache, subclass, frozen)]
pub(super) struct PyChunkedKvCache;

#[pymethods]
impl PyChunkedKvCache {
    #[new]
    #[classmethod]
    #[pyo3(signature = (*_args, **_kwargs), text_signature = "(chunk_size)")]
    fn py_new(
        class: &Bound<'_, PyType>,
        _args: &Bound<'_, PyTuple>,
        _kwargs: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        Ok(PyAttentionCache::new(class, "ChunkedKVCache")?.add_subclass(Self))
    }

    #[pyo3(signature = (chunk_size))]
    fn __init__(slf: &Bound<'_, Self>, chunk_size: i64) -> PyResult<()> {
        let mut cache = ChunkedKvCache::new(count("ChunkedKVCache", "chunk_size", chunk_size)?)?;
        let mut inner = base(slf.as_any())?.lock()?;
        cache.step = inner.step();
        *inner = Cache::Chunked(cache);
        Ok(())
    }

    /// Drops the oldest rows, so that at most `chunk_size` are left.
    fn maybe_trim_front(slf: &Bound<'_, Self>) -> PyResult<()> {
        with(slf, ChunkedKvCache::maybe_trim_front)
    }

    /// Rows that `maybe_trim_front` leaves at most.
    #[getter]
    fn chunk_size(slf: &Bound<'_, Self>) -> PyResult<usize> {
        with(slf, |cache| Ok(cache.chunk_size()))
    }

    #[setter]
    fn set_chunk_size(slf: &Bound<'_, Self>, chunk_size: i64) -> PyResult<()> {
        with(slf, |cache| cache.set_chunk_size(count("chunk_size", "chunk_size", chunk_size)?))
    }

    /// Position of the first row.
    #[getter]
    fn start_position(slf: &Bound<'_, Self>) -> PyResult<usize> {
        with(slf, |cache| Ok(cache.start_position))
    }

    #[setter]
    fn set_start_position(slf: &Bound<'_, Self>, position: i64) -> PyResult<()> {
        with(slf, |cache| {
            cache.start_position = count("start_position", "start_position", position)?;
            Ok(())
        })
    }
}

fn with<T>(slf: &Bound<'_, PyChunkedKvCache>, act: impl FnOnce(&mut ChunkedKvCache) -> Result<T>) -> PyResult<T> {
    match &mut *base(slf.as_any())?.lock()? {
        Cache::Chunked(cache) => Ok(act(cache)?),
        other => Err(PyTypeError::new_err(format!("expected a ChunkedKVCache, got {other:?}"))),
    }
}
