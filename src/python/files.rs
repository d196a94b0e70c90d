//! Saving and loading cache files.

use super::cache_to_python;
use super::foreign::cache_state;
use super::list::PyCacheList;
use super::pending::PyPendingSave;
use super::registry;
use crate::array::Array;
use crate::cache::{Cache, CacheState, State};
use crate::error::Error;
use crate::persist::background::WaitingSave;
use crate::persist::{CacheFile, Format, Metadata, SaveOptions, Saved, check_metadata, write_states};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};
use std::collections::BTreeMap;
use std::num::NonZero;
use std::path::{Path, PathBuf};

/// Saves caches, ours or mlx-lm's, into one safetensors file.
///
/// The file appears whole or not at all, and holds the valid rows only. In the background it is written after the call.
#[pyfunction]
#[pyo3(signature = (file_name, cache, metadata = None, *, format = "0.32", padded = false, durable = true, direct = false, threads = None, background = false))]
#[expect(clippy::too_many_arguments, clippy::fn_params_excessive_bools, reason = "Python's keywords")]
pub(super) fn save_prompt_cache(
    py: Python<'_>,
    file_name: PathBuf,
    cache: &Bound<'_, PyAny>,
    metadata: Option<&Bound<'_, PyAny>>,
    format: &str,
    padded: bool,
    durable: bool,
    direct: bool,
    threads: Option<i64>,
    background: bool,
) -> PyResult<Option<PyPendingSave>> {
    let threads = at_least_one("save_prompt_cache", threads)?;
    let options = SaveOptions { format: format.parse()?, padded, durable, direct, threads };
    if !background {
        return save(py, &file_name, cache, metadata, &options).map(|_| None);
    }
    let (states, metadata) = to_be_saved(cache, metadata)?;
    let waiting = py.detach(|| WaitingSave::new(&file_name, states, &metadata, &options))?;
    PyPendingSave::start(py, waiting).map(Some)
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
    let options = SaveOptions { format: format.parse()?, padded, durable, direct: false, threads: None };
    let saved = save(py, &file_name, cache, metadata, &options)?;
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
    options: &SaveOptions,
) -> PyResult<Saved> {
    let (states, metadata) = to_be_saved(cache, metadata)?;
    // On this thread, which owns the streams of lazy arrays, but without the GIL: the disk may be slow.
    Ok(py.detach(|| write_states(file_name, states, &metadata, options))?)
}

fn to_be_saved(
    cache: &Bound<'_, PyAny>,
    metadata: Option<&Bound<'_, PyAny>>,
) -> PyResult<(Vec<CacheState<Array>>, Metadata)> {
    let metadata = metadata.map_or_else(|| Ok(BTreeMap::new()), metadata_from_python)?;
    let states = cache.try_iter()?.map(|cache| cache_state(&cache?)).collect::<PyResult<Vec<_>>>()?;
    Ok((states, metadata))
}

fn metadata_from_python(metadata: &Bound<'_, PyAny>) -> PyResult<Metadata> {
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
#[pyo3(signature = (file_name, return_metadata = false, *, threads = None, lazy = false))]
pub(super) fn load_prompt_cache(
    py: Python<'_>,
    file_name: PathBuf,
    return_metadata: bool,
    threads: Option<i64>,
    lazy: bool,
) -> PyResult<Bound<'_, PyAny>> {
    let threads = at_least_one("load_prompt_cache", threads)?;
    let (path, (states, metadata)) = py.detach(|| {
        let file = CacheFile::open(&file_name)?;
        let path = file.path().to_owned();
        Ok::<_, Error>((path, if lazy { file.read_at_first_use()? } else { file.read(threads)? }))
    })?;
    let one = |(layer, state): (usize, _)| build(py, &path, &layer.to_string(), state);
    let caches = states.into_iter().enumerate().map(one).collect::<PyResult<Vec<_>>>()?;
    let caches = PyList::new(py, caches)?;
    if return_metadata {
        let metadata = nested(py, metadata.iter().map(|(key, text)| (key.as_str(), text.as_str())).collect(), 0)?;
        return (caches, metadata).into_bound_py_any(py);
    }
    Ok(caches.into_any())
}

fn at_least_one(op: &str, threads: Option<i64>) -> PyResult<Option<NonZero<usize>>> {
    let Some(threads) = threads else { return Ok(None) };
    let found = usize::try_from(threads).ok().and_then(NonZero::new);
    found.ok_or_else(|| PyValueError::new_err(format!("{op}: expected threads of at least 1, got {threads}"))).map(Some)
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

/// A cache of a registered class, or of ours; a list has children of both kinds.
/// `key` is its place in the file at `path`.
fn build<'py>(py: Python<'py>, path: &Path, key: &str, state: CacheState<Array>) -> PyResult<Bound<'py, PyAny>> {
    let state = match registry::build(py, path, key, state)? {
        Ok(cache) => return Ok(cache),
        Err(state) => state,
    };
    let state = match state {
        CacheState { class, state: State::List(children) } if class == "CacheList" => {
            let children = build_children(py, path, key, children)?;
            return Bound::new(py, PyCacheList::around(children)).map(Bound::into_any);
        }
        state => state,
    };
    let class = state.class.clone();
    let cache = Cache::from_state(state).map_err(|error| match error {
        // Numbers of sequences are only read now.
        Error::Value { .. } => Error::format(path, key, format!("the state of a {class}"), error.to_string()),
        error => error,
    })?;
    cache_to_python(py, cache)
}

/// The children of a list, from their states and class names.
pub(super) fn build_children(
    py: Python<'_>,
    path: &Path,
    key: &str,
    children: Vec<State<Array>>,
) -> PyResult<Vec<Py<PyAny>>> {
    let child = |(at, child)| build_child(py, path, &format!("{key}.{at}"), child).map(Bound::unbind);
    children.into_iter().enumerate().map(child).collect()
}

/// A child of a list, from its state and its class name.
fn build_child<'py>(py: Python<'py>, path: &Path, key: &str, child: State<Array>) -> PyResult<Bound<'py, PyAny>> {
    let parts = if let State::List(parts) = child { <[_; 2]>::try_from(parts).ok() } else { None };
    match parts {
        Some([state, State::Str(class)]) => build(py, path, key, CacheState { class, state }),
        _ => Err(Error::format(path, key, "a child's state and its class name", "something else").into()),
    }
}
