//! Classes of the user's that files may hold.

use super::tree::{from_python, to_python};
use crate::array::Array;
use crate::cache::CacheState;
use crate::cache::schema;
use crate::error::Error;
use pyo3::exceptions::{PyAttributeError, PyLookupError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyType;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A class, and where it was defined: what is defined there anew takes its place.
struct Registered {
    class: Py<PyType>,
    origin: (String, String),
}

/// By name. Never locked while Python runs.
static CLASSES: Mutex<BTreeMap<String, Registered>> = Mutex::new(BTreeMap::new());

fn classes() -> MutexGuard<'static, BTreeMap<String, Registered>> {
    // Each change is one insertion.
    CLASSES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets files hold caches of a class, under its own name, and gives the class: it may stand as a decorator.
#[pyfunction]
pub(super) fn register<'py>(cls: &Bound<'py, PyType>) -> PyResult<Bound<'py, PyType>> {
    let name: String = cls.name()?.extract()?;
    // `state` may be an attribute of instances alone.
    if !cls.hasattr("from_state")? {
        return Err(PyTypeError::new_err(format!("register: expected a class with from_state, got {name}")));
    }
    let origin: (String, String) = (cls.module()?.extract()?, cls.qualname()?.extract()?);
    let entry = Registered { class: cls.clone().unbind(), origin };
    let old = {
        let mut classes = classes();
        if let Some(other) = classes.get(&name).filter(|other| other.origin != entry.origin) {
            let (module, qualname) = &other.origin;
            let message = format!("register: expected a name that is free, got {name}, which is {module}.{qualname}");
            return Err(PyValueError::new_err(message));
        }
        schema::register(&name)?;
        classes.insert(name, entry)
    };
    // Dropping a class may run Python.
    drop(old);
    Ok(cls.clone())
}

/// The class that is registered under `name`.
fn find<'py>(py: Python<'py>, name: &str) -> Option<Bound<'py, PyType>> {
    classes().get(name).map(|entry| entry.class.clone_ref(py).into_bound(py))
}

/// The name of a cache's class, if that is registered.
pub(super) fn name_of(cache: &Bound<'_, PyAny>) -> PyResult<Option<String>> {
    let class = cache.get_type();
    let name: String = class.name()?.extract()?;
    match find(cache.py(), &name) {
        None => Ok(None),
        Some(registered) if registered.is(&class) => Ok(Some(name)),
        Some(registered) => {
            let message =
                format!("save_prompt_cache: expected the {name} that is registered, {registered}, got {class}");
            Err(PyValueError::new_err(message))
        }
    }
}

/// Name and state of a cache whose class is registered; None for others.
pub(super) fn cache_state(cache: &Bound<'_, PyAny>) -> PyResult<Option<CacheState<Array>>> {
    let Some(class) = name_of(cache)? else { return Ok(None) };
    Ok(Some(CacheState { class, state: from_python(&cache.getattr("state")?)? }))
}

/// A cache of the class that is registered under the name of `state`; else the state is given back. `key` is its place
/// in the file at `path`.
pub(super) fn build<'py>(
    py: Python<'py>,
    path: &Path,
    key: &str,
    state: CacheState<Array>,
) -> PyResult<Result<Bound<'py, PyAny>, CacheState<Array>>> {
    let Some(class) = find(py, &state.class) else { return Ok(Err(state)) };
    class.call_method1("from_state", (to_python(py, state.state)?,)).map(Ok).map_err(|error| {
        let is_about_state = error.is_instance_of::<PyValueError>(py)
            || error.is_instance_of::<PyTypeError>(py)
            || error.is_instance_of::<PyLookupError>(py)
            || error.is_instance_of::<PyAttributeError>(py);
        if !is_about_state {
            return error;
        }
        let refused: PyErr =
            Error::format(path, key, format!("a state that {}.from_state takes", state.class), error.to_string())
                .into();
        refused.set_cause(py, Some(error));
        refused
    })
}
