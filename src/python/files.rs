//! Saving, loading and looking into cache files.

use super::cache_to_python;
use super::foreign::{adopt_one, cache_state};
use super::tree::to_python;
use crate::array::Array;
use crate::cache::schema::Class;
use crate::cache::{Cache, CacheState, State};
use crate::persist::{CacheFile, Format, SaveOptions, Saved, TensorInfo, check_metadata, write_states};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::{PyImportError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString, PyTuple};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Saves caches, ours or mlx-lm's, into one safetensors file, and gives its path.
///
/// The file appears whole or not at all, and holds the valid rows only.
#[pyfunction]
#[pyo3(signature = (file_name, cache, metadata = None, *, format = "0.32", padded = false, durable = true))]
pub(super) fn save_prompt_cache(
    py: Python<'_>,
    file_name: PathBuf,
    cache: &Bound<'_, PyAny>,
    metadata: Option<&Bound<'_, PyAny>>,
    format: &str,
    padded: bool,
    durable: bool,
) -> PyResult<()> {
    save(py, &file_name, cache, metadata, format, padded, durable).map(|_| ())
}

/// As `save_prompt_cache`, and gives the file and its size in bytes.
#[pyfunction]
#[pyo3(signature = (file_name, cache, metadata = None, *, format = "0.32", padded = false, durable = true))]
pub(super) fn save_prompt_cache_with_size(
    py: Python<'_>,
    file_name: PathBuf,
    cache: &Bound<'_, PyAny>,
    metadata: Option<&Bound<'_, PyAny>>,
    format: &str,
    padded: bool,
    durable: bool,
) -> PyResult<(PathBuf, u64)> {
    let saved = save(py, &file_name, cache, metadata, format, padded, durable)?;
    Ok((saved.path, saved.n_bytes))
}

/// Refuses metadata and a format that a save would refuse.
#[pyfunction]
pub(super) fn check_save(metadata: &Bound<'_, PyAny>, format: &str) -> PyResult<()> {
    format.parse::<Format>()?;
    Ok(check_metadata(&metadata_from_python(metadata)?)?)
}

fn save(
    py: Python<'_>,
    file_name: &Path,
    cache: &Bound<'_, PyAny>,
    metadata: Option<&Bound<'_, PyAny>>,
    format: &str,
    padded: bool,
    durable: bool,
) -> PyResult<Saved> {
    let options = SaveOptions { format: format.parse::<Format>()?, padded, durable };
    let metadata = metadata.map_or_else(|| Ok(BTreeMap::new()), metadata_from_python)?;
    let states = cache.try_iter()?.map(|cache| cache_state(&cache?)).collect::<PyResult<Vec<_>>>()?;
    // On this thread, which owns the streams of lazy arrays, but without the GIL: the disk may be slow.
    Ok(py.detach(|| write_states(file_name, states, &metadata, &options))?)
}

fn metadata_from_python(metadata: &Bound<'_, PyAny>) -> PyResult<BTreeMap<String, String>> {
    let text = |object: Bound<'_, PyAny>, what: &str| -> PyResult<String> {
        let Ok(text) = object.cast::<PyString>() else {
            let message = format!("save_prompt_cache: expected a metadata {what} of type str, got {}", object.repr()?);
            return Err(PyTypeError::new_err(message));
        };
        Ok(text.to_str()?.to_owned())
    };
    let metadata = metadata
        .cast::<PyDict>()
        .map_err(|_| PyTypeError::new_err("save_prompt_cache: expected metadata to be a dict of strings"))?;
    metadata.iter().map(|(key, value)| Ok((text(key, "key")?, text(value, "value")?))).collect()
}

/// Loads the caches of a file that we or mlx-lm wrote, in either format. With `return_metadata` a pair
/// (caches, metadata).
#[pyfunction]
#[pyo3(signature = (file_name, return_metadata = false))]
pub(super) fn load_prompt_cache(
    py: Python<'_>,
    file_name: PathBuf,
    return_metadata: bool,
) -> PyResult<Bound<'_, PyAny>> {
    let (states, metadata) = py.detach(|| CacheFile::open(&file_name)?.read())?;
    let caches = states.into_iter().map(|state| build(py, state)).collect::<PyResult<Vec<_>>>()?;
    let caches = PyList::new(py, caches)?;
    if return_metadata {
        let metadata = nested(py, metadata.iter().map(|(key, text)| (key.as_str(), text.as_str())).collect(), 0)?;
        return (caches, metadata).into_bound_py_any(py);
    }
    Ok(caches.into_any())
}

/// Deepest nesting of metadata; deeper keys stay dotted.
const MAX_NESTING: usize = 16;

/// Strings with dotted keys as the dicts and lists that mlx-lm flattened. The outermost level is always a dict.
fn nested<'py>(py: Python<'py>, flat: BTreeMap<&str, &str>, depth: usize) -> PyResult<Bound<'py, PyAny>> {
    let mut groups: BTreeMap<&str, BTreeMap<&str, &str>> = BTreeMap::new();
    let dict = PyDict::new(py);
    for (&key, &text) in &flat {
        match key.split_once('.').filter(|(head, _)| depth < MAX_NESTING && !flat.contains_key(head)) {
            Some((head, tail)) => {
                groups.entry(head).or_default().insert(tail, text);
            }
            None => dict.set_item(key, text)?,
        }
    }
    for (head, inner) in groups {
        dict.set_item(head, nested(py, inner, depth + 1)?)?;
    }
    // Numbers from 0 on without a gap are places in a list.
    let items: Option<Vec<_>> = (0..dict.len()).map(|place| dict.get_item(place.to_string()).transpose()).collect();
    match items {
        Some(items) if depth > 0 => {
            PyList::new(py, items.into_iter().collect::<PyResult<Vec<_>>>()?).map(Bound::into_any)
        }
        _ => Ok(dict.into_any()),
    }
}

/// A cache of our class of that name, or of mlx-lm's where we have none yet, with children of ours where we have those.
fn build(py: Python<'_>, state: CacheState<Array>) -> PyResult<Bound<'_, PyAny>> {
    if Cache::of_class(&state.class).is_some() {
        return cache_to_python(py, Cache::from_state(state)?);
    }
    let module = py.import("mlx_lm.models.cache").map_err(|error| {
        let message =
            format!("load_prompt_cache: the file holds a {}, which needs mlx-lm: pip install mlx-lm", state.class);
        let import = PyImportError::new_err(message);
        import.set_cause(py, Some(error));
        import
    })?;
    adopt_one(module.getattr(state.class.as_str())?.call_method1("from_state", (to_python(py, state.state)?,))?)
}

/// What a cache file holds, from its header alone: format, metadata, and per layer class, offset and tensors.
#[pyfunction]
pub(super) fn inspect_file(py: Python<'_>, file_name: PathBuf) -> PyResult<Bound<'_, PyDict>> {
    let file = py.detach(|| CacheFile::open(&file_name))?;
    let info = PyDict::new(py);
    info.set_item("file", file.path())?;
    info.set_item("format", file.format.to_string())?;
    info.set_item("metadata", &file.metadata)?;
    let layers = file.caches.iter().map(|cache| inspect_layer(py, cache)).collect::<PyResult<Vec<_>>>()?;
    info.set_item("layers", layers)?;
    Ok(info)
}

fn inspect_layer<'py>(py: Python<'py>, cache: &CacheState<TensorInfo>) -> PyResult<Bound<'py, PyDict>> {
    let layer = PyDict::new(py);
    layer.set_item("class", &cache.class)?;
    layer.set_item("offset", offset(cache))?;
    let mut tensors: Vec<&TensorInfo> = Vec::new();
    cache.state.for_each_array(&mut |tensor| tensors.push(tensor));
    let first = tensors.first();
    layer.set_item("shape", first.map(|tensor| PyTuple::new(py, &tensor.shape)).transpose()?)?;
    layer.set_item("dtype", first.map(|tensor| tensor.dtype.safetensors_name()))?;
    layer.set_item("n_bytes", tensors.iter().map(|tensor| tensor.n_bytes()).sum::<u64>())?;
    Ok(layer)
}

/// The count of tokens, if the class has one for the whole cache.
fn offset(cache: &CacheState<TensorInfo>) -> Option<i64> {
    let State::List(items) = &cache.state else { return None };
    let at = Class::find(&cache.class)?.place("offset");
    match (at.and_then(|at| items.get(at)), items.first()) {
        (Some(State::Int(offset)), _) => Some(*offset),
        // ConcatenateKVCache counts its rows.
        (None, Some(State::Array(keys))) if keys.shape.len() == 4 => keys.shape.get(2).map(|&rows| rows as i64),
        _ => None,
    }
}
