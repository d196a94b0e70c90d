//! Writes a cache file: the header first, then the tensors from where they lie in memory.

use super::Metadata;
use super::atomic::{AtomicFile, effective_safetensors_path};
use super::header;
use super::wire::{self, Encoded, Format, Leaf};
use crate::array::{self, Array};
use crate::cache::schema::{self, Described, Rows};
use crate::cache::{Cache, CacheState, zero_rows};
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// The operation that errors name.
const SAVE: &str = "save_prompt_cache";

/// How a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SaveOptions {
    /// The dialect: which mlx-lm can read the file.
    pub format: Format,
    /// Whole buffers with their padding zeroed, as mlx-lm 0.32 writes them, instead of the valid rows only. Format 0.31
    /// cannot say it.
    pub padded: bool,
    /// The file survives a crash of the machine from the moment the save returns.
    pub durable: bool,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self { format: Format::V032, padded: false, durable: true }
    }
}

/// What a save left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The file, with its ending.
    pub path: PathBuf,
    /// Its size in bytes.
    pub n_bytes: u64,
}

/// Saves caches, atomically; see [`write_states`].
///
/// # Errors
/// As [`write_states`].
pub fn save_prompt_cache(path: &Path, caches: &[Cache], metadata: &Metadata, options: &SaveOptions) -> Result<Saved> {
    write_states(path, caches.iter().map(Cache::cache_state).collect(), metadata, options)
}

/// Saves states of any class, atomically. Only valid rows leave memory: trimmed tokens do not.
///
/// Evaluates lazy arrays on the calling thread, before any file is touched. `.safetensors` is added to a name without.
///
/// # Errors
/// [`Error::Value`] if the format cannot say the states or the metadata, [`Error::Mlx`] if a computation fails,
/// [`Error::Io`] if the system refuses; an older file then stays as it was.
pub fn write_states(
    path: &Path,
    caches: Vec<CacheState<Array>>,
    metadata: &Metadata,
    options: &SaveOptions,
) -> Result<Saved> {
    // Before anything is computed: a state that no file can hold, or that is no state of its class.
    wire::check_metadata(metadata)?;
    if options.padded && options.format == Format::V031 {
        let expected = "padded only with format 0.32: in 0.31 the number of rows is the number of tokens";
        return Err(Error::value(SAVE, expected, "format 0.31"));
    }
    schema::check_layers(&caches)
        .map_err(|fault| Error::value(SAVE, format!("layer {}: {}", fault.key, fault.expected), fault.got))?;
    let mut buffers = Vec::new();
    for cache in &caches {
        cache.state.for_each_array(&mut |array| buffers.push(array));
    }
    array::eval(SAVE, buffers)?;

    let mut cut = |array: Array, rows: Option<Rows>| valid_rows(array, rows, options.padded);
    let caches = caches.into_iter().map(|cache| schema::map_arrays(cache, &mut cut)).collect::<Result<Vec<_>>>()?;
    let encoded = wire::encode(options.format, caches, metadata)?;
    write_file(path, &encoded, options.durable, &mut Array::for_each_run)
}

/// Where bytes go.
pub(super) type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

/// Puts a file in place, atomically; `copy` hands the bytes of an array on.
pub(super) fn write_file<T: Described>(
    path: &Path,
    encoded: &Encoded<T>,
    durable: bool,
    copy: &mut dyn FnMut(&T, Sink<'_>) -> Result<()>,
) -> Result<Saved> {
    let head = header::build(&encoded.tensors, &encoded.metadata)?;
    let path = effective_safetensors_path(path);
    let mut file = AtomicFile::create(&path)?;
    let mut n_bytes = head.len() as u64;
    file.write_all(&head)?;
    for (_, leaf) in &encoded.tensors {
        let mut write = |bytes: &[u8]| {
            n_bytes += bytes.len() as u64;
            file.write_all(bytes)
        };
        match leaf {
            Leaf::Array(array) => copy(array, &mut write)?,
            Leaf::Scalar { bytes, .. } => write(bytes)?,
        }
    }
    file.commit(durable)?;
    Ok(Saved { path, n_bytes })
}

/// The rows of `array` that hold tokens, followed by as many zeros as there was padding if that is wanted.
fn valid_rows(array: Array, rows: Option<Rows>, padded: bool) -> Result<Array> {
    let Some(rows) = rows.filter(|rows| rows.valid < array.dim_or(2)) else { return Ok(array) };
    let valid = array.rows(0, rows.valid)?;
    if padded {
        Array::concatenate(&[&valid, &zero_rows(&array, array.dim(2) - rows.valid, array.dtype())?], 2)
    } else {
        Ok(valid)
    }
}
