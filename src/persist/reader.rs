//! Reads a cache file: everything is checked before anything is built.

use super::Metadata;
use super::header::{self, Header, TensorInfo};
use super::wire::{self, Decoded, Format};
use crate::array::Array;
use crate::cache::schema::{self, Rows};
use crate::cache::{Cache, CacheState, STEP, plan};
use crate::error::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes of padding that a load may add beyond the size of the file; a buffer that would need more grows later.
const MAX_PADDING: u64 = 1 << 30;
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
        let mut data = Data { path, file, start: 0, size: meta.len() };
        let header = data.read_header()?;
        let mut read = |info: &TensorInfo| {
            let mut bytes = vec![0; info.n_bytes() as usize];
            data.read(&mut bytes, info.start)?;
            Ok(bytes)
        };
        let Decoded { format, layers: caches, metadata } = wire::decode(&data.path, &header, &mut read)?;
        Ok(Self { data, format, metadata, caches })
    }

    /// The file's own path, with the ending that it turned out to have.
    pub fn path(&self) -> &Path {
        &self.data.path
    }

    /// Reads all tensors into buffers as the caches want them: rows are padded to whole steps where they grow.
    ///
    /// # Errors
    /// [`Error::Io`] if reading fails, [`Error::Format`] if the file became shorter, [`Error::Mlx`] if memory is short.
    pub fn read(self) -> Result<(Vec<CacheState<Array>>, Metadata)> {
        let Self { data, caches, metadata, .. } = self;
        let mut padding = data.size.saturating_add(MAX_PADDING);
        let mut read = |info, rows| data.read_tensor(&info, rows, &mut padding);
        let mut read_one = |cache| schema::map_arrays(cache, &mut read);
        Ok((caches.into_iter().map(&mut read_one).collect::<Result<_>>()?, metadata))
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
}

impl Data {
    /// Fills `bytes` with those at `at` of the data.
    fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        let at = self.start + at;
        self.file.read_exact_at(bytes, at).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                Error::format(&self.path, "data", format!("{} bytes at {at}", bytes.len()), "the end of the file")
            }
            _ => Error::io("read", &self.path, error),
        })
    }

    /// Hands `sink` the `n_bytes` at `at` of the data, block by block.
    pub fn copy(&self, at: u64, n_bytes: u64, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut block = vec![0; n_bytes.min(BLOCK) as usize];
        let mut done = 0;
        while done < n_bytes {
            let block = &mut block[..(n_bytes - done).min(BLOCK) as usize];
            self.read(block, at + done)?;
            sink(block)?;
            done += block.len() as u64;
        }
        Ok(())
    }

    /// Reads one tensor. Of a buffer that its class pads, only the valid rows are read; zeros follow up to a whole
    /// step, as long as all of them together stay within `padding` bytes.
    fn read_tensor(&self, info: &TensorInfo, rows: Option<Rows>, padding: &mut u64) -> Result<Array> {
        let mut shape: Vec<i32> = info.shape.iter().map(|&dim| dim as i32).collect();
        let Some(rows) = rows.filter(|rows| rows.padded) else {
            return Array::from_host(&shape, info.dtype, |bytes| self.read(bytes, info.start));
        };
        let row = info.shape[3] * info.dtype.size();
        let zero_rows = (plan::round_up(rows.valid, STEP) - rows.valid) as u64;
        let n_zeros =
            [info.shape[0], info.shape[1], row].iter().try_fold(zero_rows, |n, &dim| n.checked_mul(dim as u64));
        let padded = match n_zeros.and_then(|n| padding.checked_sub(n)) {
            Some(left) => {
                *padding = left;
                rows.valid + zero_rows as usize
            }
            None => rows.valid,
        };
        let (in_file, valid, in_memory) = (info.shape[2] * row, rows.valid * row, padded * row);
        shape[2] = padded as i32;
        Array::from_host(&shape, info.dtype, |bytes| {
            if valid == 0 {
                return Ok(());
            }
            // Small heads are read many at a time.
            let (group, mut block) = ((BLOCK as usize / in_file).max(1), Vec::new());
            for (at, heads) in bytes.chunks_mut(group.saturating_mul(in_memory)).enumerate() {
                let start = info.start + (at * group * in_file) as u64;
                if group == 1 {
                    self.read(&mut heads[..valid], start)?;
                    continue;
                }
                block.resize(heads.len() / in_memory * in_file, 0);
                self.read(&mut block, start)?;
                for (head, rows) in heads.chunks_exact_mut(in_memory).zip(block.chunks_exact(in_file)) {
                    head[..valid].copy_from_slice(&rows[..valid]);
                }
            }
            Ok(())
        })
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
    let (states, metadata) = CacheFile::open(path)?.read()?;
    Ok((states.into_iter().map(Cache::from_state).collect::<Result<_>>()?, metadata))
}
