//! Makes a cache file of caches: what its header says, and where in memory its bytes lie.

use super::atomic::{AtomicFile, effective_safetensors_path};
use super::layout::Layout;
use super::save::{Ready, Source};
use super::wire::{self, Format, Leaf};
use super::{Metadata, header, threads};
use crate::array::{self, Array, Dtype};
use crate::cache::schema::{self, Described, Rows};
use crate::cache::{Cache, CacheState};
use crate::error::{Error, Result};
use std::num::NonZero;
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
    /// Past the system's page cache (`O_DIRECT`), where the file system can: the cache is left to others, and the next load
    /// reads from the disk.
    pub direct: bool,
    /// How many threads write at once; None: the environment variable `MLXRS_PY_THREADS`, else the cores, at most 8.
    pub threads: Option<NonZero<usize>>,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self { format: Format::V032, padded: false, durable: true, direct: false, threads: None }
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
    let ready = prepare(path, caches, metadata, options)?;
    let file = AtomicFile::create(&ready.path)?;
    ready.write(file)
}

/// Computes what goes into the file and finds where it lies; no file is touched.
pub(super) fn prepare(
    path: &Path,
    caches: Vec<CacheState<Array>>,
    metadata: &Metadata,
    options: &SaveOptions,
) -> Result<Ready> {
    // Before anything is computed: a state that no file can hold, or that is no state of its class.
    wire::check_metadata(metadata)?;
    if options.padded && options.format == Format::V031 {
        let expected = "padded only with format 0.32: in 0.31 the number of rows is the number of tokens";
        return Err(Error::value(SAVE, expected, "format 0.31"));
    }
    schema::check_layers(&caches)
        .map_err(|fault| Error::value(SAVE, format!("layer {}: {}", fault.key, fault.expected), fault.got))?;
    let threads = threads::number(SAVE, options.threads)?;
    let mut buffers = Vec::new();
    for cache in &caches {
        cache.state.for_each_array(&mut |array| buffers.push(array));
    }
    array::eval(SAVE, buffers)?;

    let mut cut = |array: Array, rows: Option<Rows>| Cut::new(&array, rows, options.padded);
    let caches = caches.into_iter().map(|cache| schema::map_arrays(cache, &mut cut)).collect::<Result<Vec<_>>>()?;
    let encoded = wire::encode(options.format, caches, metadata)?;
    let head = header::build(&encoded.tensors, &encoded.metadata)?;
    array::eval(SAVE, encoded.tensors.iter().filter_map(|(_, leaf)| leaf.array()).map(|cut| &cut.rows))?;
    let mut layouts = vec![Layout::plain(0, head.len())];
    let mut sources = vec![Source::Small(head)];
    for (_, leaf) in encoded.tensors {
        let start = layouts.last().map_or(0, Layout::end);
        let (source, layout) = match leaf {
            Leaf::Array(cut) => cut.place(start)?,
            Leaf::Scalar { bytes, .. } => {
                let layout = Layout::plain(start, bytes.len());
                (Source::Small(bytes), layout)
            }
        };
        sources.push(source);
        layouts.push(layout);
    }
    let path = effective_safetensors_path(path);
    Ok(Ready { path, sources, layouts, durable: options.durable, direct: options.direct, threads })
}

/// Rows of an array, and the shape that the file gives them.
struct Cut {
    rows: Array,
    shape: Vec<usize>,
}

impl Described for Cut {
    fn shape(&self) -> Vec<usize> {
        self.shape.clone()
    }

    fn dtype(&self) -> Dtype {
        self.rows.dtype()
    }
}

impl Cut {
    /// The rows of `array` that hold tokens. In the file as many zeros follow as there was padding if that is wanted.
    fn new(array: &Array, rows: Option<Rows>, padded: bool) -> Result<Self> {
        let rows = match rows.filter(|rows| rows.valid < array.dim_or(2)) {
            Some(rows) => array.rows(0, rows.valid)?,
            None => array.clone(),
        };
        let shape = Described::shape(if padded { array } else { &rows });
        Ok(Self { rows, shape })
    }

    /// Its bytes, computed, and their places in the file from `start` on.
    fn place(self, start: u64) -> Result<(Source, Layout)> {
        let (n_valid, n_bytes) = (self.rows.n_bytes(), self.shape.iter().product::<usize>() * self.dtype().size());
        // Zeros stand behind the rows of each head.
        let n_heads = (n_valid != n_bytes).then(|| self.shape[..2].iter().product::<usize>());
        let bytes = self.rows.bytes(SAVE, n_heads)?;
        let layout = if let Some(n_heads) = n_heads {
            let (in_file, valid) = (n_bytes / n_heads, n_valid / n_heads);
            let in_memory = if bytes.n_runs == 1 { valid } else { bytes.pitch };
            Layout { start, n_heads, in_file, valid, in_memory }
        } else {
            let (n_heads, valid, in_memory) = (bytes.n_runs, bytes.run, bytes.pitch);
            Layout { start, n_heads, in_file: valid, valid, in_memory }
        };
        Ok((Source::Array(bytes), layout))
    }
}
