//! Python objects that MLX and CPython own: arrays through nanobind, and the few CPython calls that PyO3 lacks.

use crate::array::Array;
use crate::ffi::{ArrayHandle, RawArray};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyString;
use pyo3::{Borrowed, ffi};
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::Deref;

unsafe extern "C" {
    fn mlxrs_bridge_register(module: *mut ffi::PyObject) -> bool;
    fn mlxrs_bridge_peek(object: *mut ffi::PyObject) -> *mut std::ffi::c_void;
    fn mlxrs_bridge_wrap(owned: *mut std::ffi::c_void) -> *mut ffi::PyObject;
}

/// Joins the world of `mlx.core`, which must have been imported.
pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    // SAFETY: called once, from the module's init, with the GIL and a live module.
    if unsafe { mlxrs_bridge_register(module.as_ptr()) } { Ok(()) } else { Err(PyErr::fetch(module.py())) }
}

/// An array that a Python object owns, borrowed for as long as the object is.
pub(super) struct ArrayRef<'a>(ManuallyDrop<Array>, PhantomData<&'a PyAny>);

impl Deref for ArrayRef<'_> {
    type Target = Array;

    fn deref(&self) -> &Array {
        &self.0
    }
}

impl<'a, 'py> FromPyObject<'a, 'py> for ArrayRef<'a> {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        // SAFETY: the GIL is held and `object` lives.
        let ctx = unsafe { mlxrs_bridge_peek(object.as_ptr()) };
        if ctx.is_null() {
            let got = object.get_type().qualname()?;
            return Err(PyTypeError::new_err(format!("expected an mlx.core.array, got {got}")));
        }
        // SAFETY: `ctx` is the C++ array inside `object`, which outlives 'a; ManuallyDrop leaves it to its owner.
        let handle = unsafe { ArrayHandle::own(RawArray { ctx }) };
        #[cfg(debug_assertions)]
        ArrayHandle::uncount();
        Ok(Self(ManuallyDrop::new(Array(handle)), PhantomData))
    }
}

/// An array on its way into or out of Python; its data is never copied.
pub(super) struct PyArray(pub Array);

impl<'a, 'py> FromPyObject<'a, 'py> for PyArray {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        ArrayRef::extract(object).map(|array| Self((*array).clone()))
    }
}

impl<'py> IntoPyObject<'py> for PyArray {
    type Target = PyAny;
    type Output = Bound<'py, PyAny>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let raw = self.0.0.into_raw();
        // SAFETY: the GIL is held; the C++ object is handed over, and what comes back is a new reference or null with
        // a Python error set.
        unsafe { Bound::from_owned_ptr_or_err(py, mlxrs_bridge_wrap(raw.ctx)) }
    }
}

/// An array of one axis and no floats, or of nothing: an mlx array, or what `mlx.core.array` makes of anything else.
pub(super) fn integers(op: &str, what: &str, object: &Bound<'_, PyAny>) -> PyResult<Array> {
    let array = match object.extract::<PyArray>() {
        Ok(array) => array.0,
        Err(_) => object.py().import("mlx.core")?.call_method1("array", (object,))?.extract::<PyArray>()?.0,
    };
    if array.shape().len() != 1 || (array.dtype().is_float() && array.dim(0) > 0) {
        let message = format!("{op}: expected {what} of an integer type, got {array:?}");
        return Err(PyValueError::new_err(message));
    }
    Ok(array)
}

/// The places in a batch that a list or an array names; an array is evaluated.
pub(super) fn places(op: &str, object: &Bound<'_, PyAny>) -> PyResult<Vec<i64>> {
    if let Ok(places) = object.extract() {
        return Ok(places);
    }
    let array = integers(op, "indices (n,)", object)?;
    let places = object.py().detach(move || array.to_i32())?;
    Ok(places.into_iter().map(i64::from).collect())
}

/// What `object.__setattr__` does, for a class that has its own `__setattr__`. `value` None deletes.
pub(super) fn set_plain_attribute(
    object: &Bound<'_, PyAny>,
    name: &Bound<'_, PyString>,
    value: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let value = value.map_or(std::ptr::null_mut(), Bound::as_ptr);
    // SAFETY: live objects and the GIL; a null value is how CPython spells deletion.
    match unsafe { ffi::PyObject_GenericSetAttr(object.as_ptr(), name.as_ptr(), value) } {
        0 => Ok(()),
        _ => Err(PyErr::fetch(object.py())),
    }
}
