//! The smaller functions of the module.

use super::attention::mask_to_python;
use super::base::count;
use super::batch::numbers_array;
use super::bridge::PyArray;
use super::cache_to_python;
use crate::cache::{CacheConfig, make_prompt_cache, mask};
use crate::error::Error;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::path::PathBuf;

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(create_attention_mask, module)?)?;
    module.add_function(wrap_pyfunction!(create_causal_mask, module)?)?;
    module.add_function(wrap_pyfunction!(super::files::save_prompt_cache, module)?)?;
    module.add_function(wrap_pyfunction!(super::files::save_prompt_cache_with_size, module)?)?;
    module.add_function(wrap_pyfunction!(super::files::check_save, module)?)?;
    module.add_function(wrap_pyfunction!(super::files::load_prompt_cache, module)?)?;
    module.add_function(wrap_pyfunction!(super::inspect::inspect_file, module)?)?;
    module.add_function(wrap_pyfunction!(super::inspect::verify_file, module)?)?;
    module.add_function(wrap_pyfunction!(super::inspect::convert_file, module)?)?;
    module.add_function(wrap_pyfunction!(blake3_hex, module)?)?;
    module.add_function(wrap_pyfunction!(blake3_file, module)?)?;
    module.add_function(wrap_pyfunction!(build_info, module)?)?;
    module.add_function(wrap_pyfunction!(live_handles, module)?)?;
    module.add_function(wrap_pyfunction!(make_prompt_cache_from_config, module)?)?;
    module.add_function(wrap_pyfunction!(super::foreign::adopt, module)?)?;
    module.add_function(wrap_pyfunction!(super::registry::register, module)?)?;
    module.add_function(wrap_pyfunction!(super::list::trim_prompt_cache, module)?)?;
    module.add_function(wrap_pyfunction!(super::prefill::prefill, module)?)?;
    module.add_function(wrap_pyfunction!(super::recording::prefill_recorded, module)?)
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

/// The causal mask (N, offset + N), with a padding (B, 1, N, offset + N): True where a token may look.
#[pyfunction]
#[pyo3(signature = (N, offset = 0, window_size = None, right_padding = None, left_padding = None))]
#[allow(non_snake_case)]
fn create_causal_mask(
    N: i64,
    offset: i64,
    window_size: Option<i64>,
    right_padding: Option<&Bound<'_, PyAny>>,
    left_padding: Option<&Bound<'_, PyAny>>,
) -> PyResult<PyArray> {
    let op = "create_causal_mask";
    let (n_tokens, offset) = (count(op, "N", N)?, count(op, "offset", offset)?);
    let window = window_size.map(|window| count(op, "window_size", window)).transpose()?;
    let padding =
        |name: &str, value: Option<&Bound<'_, PyAny>>| value.map(|value| numbers_array(op, name, value)).transpose();
    let (right, left) = (padding("right_padding", right_padding)?, padding("left_padding", left_padding)?);
    Ok(PyArray(mask::padded(n_tokens, offset, window, right.as_ref(), left.as_ref())?))
}

/// One fresh cache per layer: RotatingKVCache(sliding_window, keep=0) if there is a window, else KVCache.
#[pyfunction]
fn make_prompt_cache_from_config(
    py: Python<'_>,
    num_hidden_layers: i64,
    sliding_window: Option<i64>,
) -> PyResult<Bound<'_, PyList>> {
    let op = "CacheConfig";
    let config = CacheConfig {
        num_hidden_layers: count(op, "num_hidden_layers", num_hidden_layers)?,
        sliding_window: sliding_window.map(|window| count(op, "sliding_window", window)).transpose()?,
    };
    let caches = make_prompt_cache(&config)?.into_iter().map(|cache| cache_to_python(py, cache));
    PyList::new(py, caches.collect::<PyResult<Vec<_>>>()?)
}

/// BLAKE3 of some bytes, as 64 hex digits.
#[pyfunction]
fn blake3_hex(py: Python<'_>, data: &[u8]) -> String {
    py.detach(|| blake3::hash(data).to_hex().to_string())
}

/// BLAKE3 of a file, as hexadecimal digits.
#[pyfunction]
fn blake3_file(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    let hash = py.detach(|| blake3::Hasher::new().update_mmap_rayon(&path).map(|hasher| hasher.finalize()));
    Ok(hash.map_err(|source| Error::io("hash", &path, source))?.to_hex().to_string())
}

/// What the core was built from, and the device that it runs on now.
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", crate::VERSION)?;
    info.set_item("mlx", crate::ffi::mlx_version())?;
    info.set_item("mlx_c", env!("MLXRS_MLX_C_VERSION"))?;
    info.set_item("compiler", env!("MLXRS_COMPILER"))?;
    info.set_item("features", ["python"])?;
    info.set_item("debug", cfg!(debug_assertions))?;
    info.set_item("blas", py.import("mlxrs_py._blas")?.getattr("active")?)?;
    info.set_item("device", py.import("mlx.core")?.call_method0("default_device")?.str()?)?;
    Ok(info)
}

/// Array handles alive now; counted in debug builds only.
#[pyfunction]
#[pyo3(name = "_live_handles")]
fn live_handles() -> usize {
    crate::live_handles()
}
