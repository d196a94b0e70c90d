//! Module-level functions of the caches.
use super::base::{count, mask_to_python};
use crate::cache::mask;
use pyo3::prelude::*;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(create_attention_mask, module)?)
}

/// The mask of a cache that keeps every row: None, "causal", or a bool array (N, offset + N).
#[pyfunction]
#[pyo3(signature = (N, offset, return_array, window_size))]
#[allow(non_snake_case)]
fn create_attention_mask(
    py: Python<'_>,
    N: i64,
    offset: i64,
    return_array: bool,
    window_size: Option<i64>,
) -> PyResult<Bound<'_, PyAny>> {
    let op = "create_attention_mask";
    let (n_tokens, offset) = (count(op, "N", N)?, count(op, "offset", offset)?);
    let window = window_size.map(|window| count(op, "window_size", window)).transpose()?;
    mask_to_python(py, mask::growing(n_tokens, offset, window, return_array)?)
}
