//! L6: the Python module `_core`, the only user of PyO3. It converts; it decides nothing about caches or files.

#![allow(clippy::doc_markdown, reason = "Python reads these docstrings")]
#![allow(clippy::needless_pass_by_value, reason = "PyO3 hands arguments over by value")]

#[expect(unsafe_code, reason = "meets nanobind and CPython")]
mod bridge;

mod arrays;
mod attention;
mod base;
mod batch;
mod batch_kv;
mod batch_rotating;
mod chunked;
mod concatenate;
mod errors;
mod files;
mod foreign;
mod functions;
mod inspect;
mod kv;
mod list;
mod lru;
mod models;
mod pending;
mod prefill;
mod quantized;
mod quantized_rotating;
mod recording;
mod registry;
mod rotating;
mod store;
mod token_buffer;
mod tokens;
mod tree;
mod trie;

use crate::cache::Cache;
use arrays::PyArraysCache;
use attention::{PyAttentionCache, PyMaskingCache};
use base::PyCache;
use batch::PyBatchCache;
use batch_kv::{PyBatchKvCache, PyBatchQuantizedKvCache};
use batch_rotating::PyBatchRotatingKvCache;
use chunked::PyChunkedKvCache;
use concatenate::PyConcatenateKvCache;
use kv::PyKvCache;
use list::PyCacheList;
use lru::PyLruPromptCache;
use pyo3::PyClass;
use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;
use quantized::PyQuantizedKvCache;
use quantized_rotating::PyQuantizedRotatingKvCache;
use rotating::PyRotatingKvCache;
use token_buffer::PyTokenBuffer;

/// The Rust core of mlxrs_py. Import `mlxrs_py` instead.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    let loaded = crate::ffi::mlx_version();
    let built = env!("MLXRS_MLX_VERSION");
    if loaded != built {
        return Err(PyImportError::new_err(format!("mlxrs_py was built for MLX {built}, but MLX {loaded} is loaded")));
    }
    py.import("mlx.core")?;
    bridge::register(module)?;
    crate::ffi::remember_process();
    errors::register(module)?;
    module.add("__version__", crate::VERSION)?;
    module.add_class::<PyCache>()?;
    module.add_class::<PyAttentionCache>()?;
    module.add_class::<PyMaskingCache>()?;
    module.add_class::<PyKvCache>()?;
    module.add_class::<PyRotatingKvCache>()?;
    module.add_class::<PyQuantizedKvCache>()?;
    module.add_class::<PyQuantizedRotatingKvCache>()?;
    module.add_class::<PyConcatenateKvCache>()?;
    module.add_class::<PyChunkedKvCache>()?;
    module.add_class::<PyArraysCache>()?;
    module.add_class::<PyCacheList>()?;
    module.add_class::<PyBatchCache>()?;
    module.add_class::<PyBatchKvCache>()?;
    module.add_class::<PyBatchQuantizedKvCache>()?;
    module.add_class::<PyBatchRotatingKvCache>()?;
    module.add_class::<PyTokenBuffer>()?;
    module.add_class::<PyLruPromptCache>()?;
    store::register(module)?;
    trie::register(module)?;
    pending::register(module)?;
    functions::register(module)
}

/// A Python object of the class that stands for `cache`.
fn cache_to_python(py: Python<'_>, cache: Cache) -> PyResult<Bound<'_, PyAny>> {
    match cache {
        Cache::Standard(_) => wrap(py, cache, PyKvCache),
        Cache::Rotating(ref ring) if ring.scheme().is_some() => wrap(py, cache, PyQuantizedRotatingKvCache),
        Cache::Rotating(_) => wrap(py, cache, PyRotatingKvCache),
        Cache::Quantized(_) => wrap(py, cache, PyQuantizedKvCache),
        Cache::Concatenate(_) => wrap(py, cache, PyConcatenateKvCache),
        Cache::Chunked(_) => {
            let chunked = PyAttentionCache::around(cache).add_subclass(PyChunkedKvCache);
            Bound::new(py, chunked).map(Bound::into_any)
        }
        Cache::Arrays(_) => Bound::new(py, PyArraysCache::around(cache)).map(Bound::into_any),
        Cache::List(_) => Bound::new(py, PyCacheList::around(list::to_python(py, cache)?)).map(Bound::into_any),
        Cache::Batch(ref batch) if batch.scheme().is_some() => wrap_batch(py, cache, PyBatchQuantizedKvCache),
        Cache::Batch(_) => wrap_batch(py, cache, PyBatchKvCache),
        Cache::BatchRotating(_) => wrap_batch(py, cache, PyBatchRotatingKvCache),
    }
}

/// An object of the class `subclass` around `cache`.
fn wrap<C: PyClass<BaseType = PyMaskingCache>>(
    py: Python<'_>,
    cache: Cache,
    subclass: C,
) -> PyResult<Bound<'_, PyAny>> {
    Bound::new(py, PyMaskingCache::around(cache).add_subclass(subclass)).map(Bound::into_any)
}

/// As [`wrap`], for a batch.
fn wrap_batch<C: PyClass<BaseType = PyBatchCache>>(
    py: Python<'_>,
    cache: Cache,
    subclass: C,
) -> PyResult<Bound<'_, PyAny>> {
    Bound::new(py, PyBatchCache::around(cache).add_subclass(subclass)).map(Bound::into_any)
}
