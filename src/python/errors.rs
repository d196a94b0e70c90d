//! The one mapping of errors to Python: builtin types first, own types only where Python has no word.

use crate::error::Error;
use pyo3::exceptions::{PyException, PyIndexError, PyOSError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{IntoPyDict, PyTuple, PyType};

static MLXRS_ERROR: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static MLX_ERROR: PyOnceLock<Py<PyType>> = PyOnceLock::new();
static CACHE_FORMAT_ERROR: PyOnceLock<Py<PyType>> = PyOnceLock::new();

/// Makes the exception types and adds them to the module.
pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    let base = new_type(py, "MlxrsError", "Base of the exceptions of mlxrs_py.", &[&py.get_type::<PyException>()])?;
    let mlx = new_type(
        py,
        "MlxError",
        "A failure inside MLX: the operation and MLX's own words.",
        &[&base, &py.get_type::<PyRuntimeError>()],
    )?;
    let format = new_type(
        py,
        "CacheFormatError",
        "A cache file that is damaged or lies: the file, the key, what the format asks for and what was found.",
        &[&base, &py.get_type::<PyValueError>()],
    )?;
    for (name, slot, object) in [
        ("MlxrsError", &MLXRS_ERROR, base),
        ("MlxError", &MLX_ERROR, mlx),
        ("CacheFormatError", &CACHE_FORMAT_ERROR, format),
    ] {
        module.add(name, &object)?;
        // A second import of the module in one process keeps the first types.
        let _ = slot.set(py, object.unbind());
    }
    Ok(())
}

/// A class statement: PyO3 makes exception types with one base only.
fn new_type<'py>(
    py: Python<'py>,
    name: &str,
    doc: &str,
    bases: &[&Bound<'py, PyType>],
) -> PyResult<Bound<'py, PyType>> {
    let body = [("__doc__", doc), ("__module__", "mlxrs_py")].into_py_dict(py)?;
    let class = py.get_type::<PyType>().call1((name, PyTuple::new(py, bases)?, body))?;
    Ok(class.cast_into::<PyType>()?)
}

/// An exception of the type in `slot`, or a RuntimeError before the module is set up.
fn own(slot: &PyOnceLock<Py<PyType>>, message: String) -> PyErr {
    Python::attach(|py| match slot.get(py).map(|class| class.bind(py).call1((&message,))) {
        Some(Ok(exception)) => PyErr::from_value(exception),
        Some(Err(error)) => error,
        None => PyRuntimeError::new_err(message),
    })
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Value { .. } => PyValueError::new_err(message),
            Error::Type { .. } => PyTypeError::new_err(message),
            Error::Index { .. } => PyIndexError::new_err(message),
            Error::Order { .. } => PyRuntimeError::new_err(message),
            Error::Mlx { .. } => own(&MLX_ERROR, message),
            Error::Format { .. } => own(&CACHE_FORMAT_ERROR, message),
            Error::Io { op, path, source } => match source.raw_os_error() {
                // OSError itself picks FileNotFoundError, PermissionError and so on by errno.
                Some(errno) => {
                    let text = std::io::Error::from_raw_os_error(errno).to_string();
                    let text = text.split(" (os error").next().unwrap_or_default().to_owned();
                    PyOSError::new_err((errno, format!("{text} ({op})"), path.into_os_string()))
                }
                None => PyOSError::new_err(format!("{op} {}: {source}", path.display())),
            },
        }
    }
}
