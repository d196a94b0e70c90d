//! `ConcatenateKVCache`.

use super::attention::PyMaskingCache;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};

/// Exactly the rows, joined anew at each update. `ConcatenateKVCache()`
#[pyclass(name = "ConcatenateKVCache", module = "mlxrs_py.cache", extends = PyMaskingCache, subclass, frozen)]
pub(super) struct PyConcatenateKvCache;

#[pymethods]
impl PyConcatenateKvCache {
    #[new]
    #[classmethod]
    #[pyo3(signature = (*_args, **_kwargs), text_signature = "()")]
    fn py_new(
        class: &Bound<'_, PyType>,
        _args: &Bound<'_, PyTuple>,
        _kwargs: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        Ok(PyMaskingCache::new(class, "ConcatenateKVCache")?.add_subclass(Self))
    }

    #[pyo3(signature = ())]
    #[expect(clippy::unused_self, reason = "the constructor takes nothing")]
    fn __init__(&self) {}
}
