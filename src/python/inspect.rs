//! Looking into cache files, checking and converting them; no cache is built.

use crate::cache::schema::Class;
use crate::cache::{CacheState, State};
use crate::error::Error;
use crate::persist::{CacheFile, Format, TensorInfo, convert};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::path::PathBuf;

/// What a cache file holds, from its header alone: format, metadata, and per layer class, offset and tensors.
#[pyfunction]
pub(super) fn inspect_file(py: Python<'_>, file_name: PathBuf) -> PyResult<Bound<'_, PyDict>> {
    describe(py, &py.detach(|| CacheFile::open(&file_name))?)
}

/// As `inspect_file`, after every byte of every tensor has been read: the data is there.
#[pyfunction]
pub(super) fn verify_file(py: Python<'_>, file_name: PathBuf) -> PyResult<Bound<'_, PyDict>> {
    let file = py.detach(|| {
        let file = CacheFile::open(&file_name)?;
        file.read_through()?;
        Ok::<_, Error>(file)
    })?;
    describe(py, &file)
}

/// Writes what a cache file holds into another file, in one of the formats; gives that file and its size in bytes.
#[pyfunction]
#[pyo3(signature = (file_name, new_file_name, format, *, durable = true))]
pub(super) fn convert_file(
    py: Python<'_>,
    file_name: PathBuf,
    new_file_name: PathBuf,
    format: &str,
    durable: bool,
) -> PyResult<(PathBuf, u64)> {
    let format = format.parse::<Format>()?;
    let saved = py.detach(|| convert(&file_name, &new_file_name, format, durable))?;
    Ok((saved.path, saved.n_bytes))
}

fn describe<'py>(py: Python<'py>, file: &CacheFile) -> PyResult<Bound<'py, PyDict>> {
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
