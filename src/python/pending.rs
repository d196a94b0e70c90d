//! `PendingSave`: a save that goes on in the background.

use crate::error::Error;
use crate::persist::background::{self, PendingSave, WaitingSave};
use pyo3::exceptions::{PyRuntimeWarning, PyTimeoutError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyAny;
use std::ffi::CString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long signals wait while Python does.
const TICK: Duration = Duration::from_millis(50);

/// A save that goes on in the background; dropping this does not stop it.
#[pyclass(name = "PendingSave", module = "mlxrs_py.cache", frozen)]
pub(super) struct PyPendingSave {
    save: PendingSave,
    file: PathBuf,
}

#[pymethods]
impl PyPendingSave {
    /// True once the save is over, well or not.
    fn done(&self) -> bool {
        self.save.is_done()
    }

    /// Waits until the save is over, and raises what it failed with.
    #[pyo3(signature = (timeout = None))]
    fn result(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<()> {
        self.wait(py, timeout)?;
        match self.save.result() {
            Some(Err(error)) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Waits until the save is over, and gives what it failed with, or None.
    #[pyo3(signature = (timeout = None))]
    fn exception(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<PyErr>> {
        self.wait(py, timeout)?;
        Ok(self.save.result().and_then(Result::err).map(PyErr::from))
    }

    fn __repr__(&self) -> String {
        let state = if self.save.is_done() { "done" } else { "pending" };
        format!("<PendingSave of '{}', {state}>", self.file.display())
    }
}

impl PyPendingSave {
    /// Runs a save that waits for nothing but room, which it gets when others end.
    pub(super) fn start(py: Python<'_>, mut save: WaitingSave) -> PyResult<Self> {
        while !py.detach(|| save.wait_for_room(TICK)) {
            py.check_signals()?;
        }
        let file = save.path().to_owned();
        let save = py.detach(|| save.start())?;
        Ok(Self { save, file })
    }

    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<()> {
        if in_ticks(py, timeout, |tick| self.save.wait(tick))? {
            return Ok(());
        }
        let message = format!("the save of '{}' goes on after {} s", self.file.display(), timeout.unwrap_or_default());
        Err(PyTimeoutError::new_err(message))
    }
}

/// Waits until the saves in the background are over; False if they are not within `timeout` seconds.
#[pyfunction]
#[pyo3(signature = (timeout = None))]
pub(super) fn wait_for_saves(py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
    in_ticks(py, timeout, |tick| Ok(background::wait_for_all(tick)))
}

/// What the end of the process does: it waits, and warns of errors that nobody asked for.
#[pyfunction]
#[pyo3(name = "_end_saves")]
pub(super) fn end_saves(py: Python<'_>) -> PyResult<()> {
    wait_for_saves(py, None)?;
    for error in background::untold_errors() {
        let message = format!("a save in the background failed: {error}");
        PyErr::warn(py, &py.get_type::<PyRuntimeWarning>(), &CString::new(message)?, 1)?;
    }
    Ok(())
}

/// Has the end of the process wait for saves.
pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyPendingSave>()?;
    module.add_function(wrap_pyfunction!(wait_for_saves, module)?)?;
    let end: Bound<'_, PyAny> = wrap_pyfunction!(end_saves, module)?.into_any();
    module.py().import("atexit")?.call_method1("register", (end,)).map(|_| ())
}

/// Calls `wait` for a tick at a time, signals in between, until it gives true; false if `timeout` seconds are over.
fn in_ticks(
    py: Python<'_>,
    timeout: Option<f64>,
    wait: impl Fn(Duration) -> Result<bool, Error> + Sync,
) -> PyResult<bool> {
    let limit = match timeout {
        None => None,
        // None also for more than fits.
        Some(seconds) if !seconds.is_nan() => Duration::try_from_secs_f64(seconds.max(0.0)).ok(),
        Some(_) => return Err(PyValueError::new_err("timeout: expected seconds or None, got nan")),
    };
    let end = limit.and_then(|limit| Instant::now().checked_add(limit));
    loop {
        let left = end.map_or(TICK, |end| end.saturating_duration_since(Instant::now()).min(TICK));
        if py.detach(|| wait(left))? {
            return Ok(true);
        }
        py.check_signals()?;
        if end.is_some_and(|end| end <= Instant::now()) {
            return Ok(false);
        }
    }
}
