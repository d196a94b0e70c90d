//! Reads a cache file: everything is checked before anything is built.

use super::Metadata;
use super::header::{self, Header, TensorInfo};
use super::restore::{self, When};
use super::wire::{self, Decoded, Format};
use crate::array::{Array, LazyTensors};
use crate::cache::{Cache, CacheState};
use crate::error::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::num::NonZero;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Bytes that are copied at a time.
const BLOCK: u64 = 1 << 20;

/// A cache file whose header has been checked; no tensor data has been read but the counts.
#[derive(Debug)]
pub struct CacheFile {
    data: Data,
    /// The dialect that the file is written in.
    pub format: Format,
    /// The user's metadata.
    pub metadata: Metadata,
    /// Class and state of every cache; arrays are places in the file.
    pub caches: Vec<CacheState<TensorInfo>>,
}

impl CacheFile {
    /// Opens and checks `path`, or `path` with `.safetensors` added if it does not exist.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::Format`] if it is not a cache file or lies.
    pub fn open(path: &Path) -> Result<Self> {
        let (path, file) = open_either(path)?;
        let fail = |source| Error::io("read", &path, source);
        let meta = file.metadata().map_err(fail)?;
        if meta.is_dir() {
            return Err(fail(io::Error::from_raw_os_error(rustix::io::Errno::ISDIR.raw_os_error())));
        }
        if !meta.is_file() {
            return Err(Error::format(&path, "file", "a regular file", "a pipe or a device"));
        }
        let mut data = Data { stamp: stamp(&path, &meta)?, path, file, start: 0, size: meta.len() };
        let header = data.read_header()?;
        let mut read = |info: &TensorInfo| {
            let mut bytes = vec![0; info.n_bytes() as usize];
            data.read(&mut bytes, data.start + info.start)?;
            Ok(bytes)
        };
        let Decoded { format, layers: caches, metadata } = wire::decode(&data.path, &header, &mut read)?;
        Ok(Self { data, format, metadata, caches })
    }

    /// The file's own path, with the ending that it turned out to have.
    pub fn path(&self) -> &Path {
        &self.data.path
    }

    /// Reads all tensors into buffers as the caches want them: rows are padded to whole steps where they grow. On CUDA
    /// they go into device memory.
    ///
    /// `threads`: how many read at once; None: the environment variable `MLXRS_PY_THREADS`, else the cores, at most 8.
    ///
    /// # Errors
    /// [`Error::Io`] if reading fails, [`Error::Format`] if the file became shorter or changes while it is read,
    /// [`Error::Mlx`] if memory is short.
    pub fn read(self, threads: Option<NonZero<usize>>) -> Result<(Vec<CacheState<Array>>, Metadata)> {
        Ok((restore::read(&self.data, self.caches, When::Now(threads))?, self.metadata))
    }

    /// As [`read`](Self::read), but each tensor is read when it is first computed. The file is kept open for as long. If it
    /// is short or was written by then, the computation fails.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX refuses the header, [`Error::Format`] if the file has changed already.
    pub fn read_at_first_use(self) -> Result<(Vec<CacheState<Array>>, Metadata)> {
        Ok((restore::read(&self.data, self.caches, When::AtFirstUse)?, self.metadata))
    }

    /// Reads every byte of every tensor and keeps none; gives their number.
    ///
    /// # Errors
    /// [`Error::Io`] if reading fails, [`Error::Format`] if the file became shorter.
    pub fn read_through(&self) -> Result<u64> {
        let mut n_bytes = 0;
        let mut read = |info: &TensorInfo| {
            n_bytes += info.n_bytes();
            self.data.copy(info.start, info.n_bytes(), &mut |_| Ok(()))
        };
        let mut all = Ok(());
        for cache in &self.caches {
            cache.state.for_each_array(&mut |info| {
                if all.is_ok() {
                    all = read(info);
                }
            });
        }
        all.map(|()| n_bytes)
    }

    /// What the file says, and its data.
    pub(super) fn into_parts(self) -> (Decoded, Data) {
        let Self { data, format, metadata, caches } = self;
        (Decoded { format, layers: caches, metadata }, data)
    }
}

/// Opens `path`, or else the name that a save would have given it.
fn open_either(path: &Path) -> Result<(PathBuf, File)> {
    // A pipe must not make the caller wait for its writer.
    let open =
        |path: &Path| OpenOptions::new().read(true).custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32).open(path);
    match open(path) {
        Ok(file) => Ok((path.to_owned(), file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let longer = super::effective_safetensors_path(path);
            match open(&longer) {
                Ok(file) => Ok((longer, file)),
                Err(_) => Err(Error::io("open", path, error)),
            }
        }
        Err(error) => Err(Error::io("open", path, error)),
    }
}

/// An open file, whose tensors are counted from `start`.
#[derive(Debug)]
pub(super) struct Data {
    path: PathBuf,
    file: File,
    start: u64,
    size: u64,
    stamp: Stamp,
}

/// Size and time of change of a file.
type Stamp = (u64, SystemTime);

fn stamp(path: &Path, meta: &std::fs::Metadata) -> Result<Stamp> {
    Ok((meta.len(), meta.modified().map_err(|source| Error::io("read", path, source))?))
}

impl Data {
    /// Bytes of the whole file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the data begins in the file.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The tensors, unread.
    pub fn lazy_tensors(&self, op: &'static str) -> Result<LazyTensors> {
        LazyTensors::open(op, &self.file, &self.path)
    }

    /// Fails if somebody wrote into the file since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        let meta = self.file.metadata().map_err(|source| Error::io("read", &self.path, source))?;
        if stamp(&self.path, &meta)? == self.stamp {
            return Ok(());
        }
        let expected = "a file that stays as it is while it is read";
        Err(Error::format(&self.path, "data", expected, "one that changed"))
    }

    /// Fills `bytes` with those at byte `at` of the file.
    pub fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        self.file.read_exact_at(bytes, at).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.too_short(bytes.len(), at),
            _ => Error::io("read", &self.path, error),
        })
    }

    /// As [`read`](Self::read), into memory that was never written.
    pub fn read_uninit(&self, mut bytes: &mut [MaybeUninit<u8>], mut at: u64) -> Result<()> {
        while !bytes.is_empty() {
            match rustix::io::pread(&self.file, &mut *bytes, at) {
                Ok(([], _)) => return Err(self.too_short(bytes.len(), at)),
                Ok((read, _)) => {
                    let n_bytes = read.len();
                    at += n_bytes as u64;
                    bytes = &mut bytes[n_bytes..];
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::io("read", &self.path, error.into())),
            }
        }
        Ok(())
    }

    fn too_short(&self, n_bytes: usize, at: u64) -> Error {
        Error::format(&self.path, "data", format!("{n_bytes} bytes at {at}"), "the end of the file")
    }

    /// Hands `sink` the `n_bytes` at `at` of the data, block by block.
    pub fn copy(&self, at: u64, n_bytes: u64, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut block = vec![0; n_bytes.min(BLOCK) as usize];
        let mut done = 0;
        while done < n_bytes {
            let block = &mut block[..(n_bytes - done).min(BLOCK) as usize];
            self.read(block, self.start + at + done)?;
            sink(block)?;
            done += block.len() as u64;
        }
        Ok(())
    }

    /// Reads the header, and moves `start` behind it.
    fn read_header(&mut self) -> Result<Header> {
        let mut prefix = [0; header::PREFIX_SIZE];
        if self.size < prefix.len() as u64 {
            let expected = format!("at least {} bytes", prefix.len());
            return Err(Error::format(&self.path, "header", expected, format!("{} bytes", self.size)));
        }
        self.read(&mut prefix, 0)?;
        let size = header::json_size(prefix, self.size).map_err(|fault| fault.in_file(&self.path))?;
        let mut json = vec![0; size];
        self.read(&mut json, header::PREFIX_SIZE as u64)?;
        self.start = (header::PREFIX_SIZE + size) as u64;
        header::parse(&json, self.size - self.start).map_err(|fault| fault.in_file(&self.path))
    }
}

/// Loads the caches of a file with its metadata.
///
/// # Errors
/// As [`CacheFile::open`] and [`CacheFile::read`]; [`Error::Value`] for classes that this crate lacks.
pub fn load_prompt_cache(path: &Path) -> Result<(Vec<Cache>, Metadata)> {
    let (states, metadata) = CacheFile::open(path)?.read(None)?;
    Ok((states.into_iter().map(Cache::from_state).collect::<Result<_>>()?, metadata))
}
