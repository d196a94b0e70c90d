//! Reads a cache file: everything is checked before anything is built.

use super::Metadata;
use super::header::{self, Header, TensorInfo};
use super::wire::{self, Decoded, Format};
use crate::array::Array;
use crate::cache::schema::{self, Rows};
use crate::cache::{Cache, CacheState, STEP, plan};
use crate::error::{Error, Result};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A cache file whose header has been checked; no tensor data has been read but the counts.
#[derive(Debug)]
pub struct CacheFile {
    path: PathBuf,
    file: File,
    data_start: u64,
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
        let (header, data_start) = read_header(&path, &file, meta.len())?;
        let mut read = |info: &TensorInfo| {
            let mut bytes = vec![0; info.n_bytes() as usize];
            read_at(&path, &file, &mut bytes, data_start + info.start)?;
            Ok(bytes)
        };
        let Decoded { format, layers: caches, metadata } = wire::decode(&path, &header, &mut read)?;
        Ok(Self { path, file, data_start, format, metadata, caches })
    }

    /// The file's own path, with the ending that it turned out to have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads all tensors into buffers as the caches want them: rows are padded to whole steps where they grow.
    ///
    /// # Errors
    /// [`Error::Io`] if reading fails, [`Error::Format`] if the file became shorter, [`Error::Mlx`] if memory is short.
    pub fn read(self) -> Result<(Vec<CacheState<Array>>, Metadata)> {
        let Self { path, file, data_start, caches, metadata, .. } = self;
        let mut read = |info, rows| read_tensor(&path, &file, data_start, &info, rows);
        let mut read_one = |cache| schema::map_arrays(cache, &mut read);
        Ok((caches.into_iter().map(&mut read_one).collect::<Result<_>>()?, metadata))
    }
}

/// Opens `path`, or else the name that a save would have given it.
fn open_either(path: &Path) -> Result<(PathBuf, File)> {
    match File::open(path) {
        Ok(file) => Ok((path.to_owned(), file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let longer = super::effective_safetensors_path(path);
            match File::open(&longer) {
                Ok(file) => Ok((longer, file)),
                Err(_) => Err(Error::io("open", path, error)),
            }
        }
        Err(error) => Err(Error::io("open", path, error)),
    }
}

fn read_at(path: &Path, file: &File, bytes: &mut [u8], at: u64) -> Result<()> {
    file.read_exact_at(bytes, at).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            Error::format(path, "data", format!("{} bytes at {at}", bytes.len()), "the end of the file")
        }
        _ => Error::io("read", path, error),
    })
}

/// Reads one tensor. Of a buffer that its class pads, only the valid rows are read; zeros follow up to a whole step.
fn read_tensor(path: &Path, file: &File, start: u64, info: &TensorInfo, rows: Option<Rows>) -> Result<Array> {
    let mut shape: Vec<i32> = info.shape.iter().map(|&dim| dim as i32).collect();
    let Some(rows) = rows.filter(|rows| rows.padded) else {
        return Array::from_host(&shape, info.dtype, |bytes| read_at(path, file, bytes, start + info.start));
    };
    let row = info.shape[3] * info.dtype.size();
    let padded = plan::round_up(rows.valid, STEP);
    let (in_file, valid, in_memory) = (info.shape[2] * row, rows.valid * row, padded * row);
    shape[2] = padded as i32;
    Array::from_host(&shape, info.dtype, |bytes| {
        if valid == 0 {
            return Ok(());
        }
        for (head, bytes) in bytes.chunks_exact_mut(in_memory).enumerate() {
            read_at(path, file, &mut bytes[..valid], start + info.start + (head * in_file) as u64)?;
        }
        Ok(())
    })
}

fn read_header(path: &Path, file: &File, file_size: u64) -> Result<(Header, u64)> {
    let mut prefix = [0; header::PREFIX_SIZE];
    if file_size < prefix.len() as u64 {
        let expected = format!("at least {} bytes", prefix.len());
        return Err(Error::format(path, "header", expected, format!("{file_size} bytes")));
    }
    read_at(path, file, &mut prefix, 0)?;
    let size = header::json_size(prefix, file_size).map_err(|fault| fault.in_file(path))?;
    let mut json = vec![0; size];
    read_at(path, file, &mut json, header::PREFIX_SIZE as u64)?;
    let data_start = (header::PREFIX_SIZE + size) as u64;
    let header = header::parse(&json, file_size - data_start).map_err(|fault| fault.in_file(path))?;
    Ok((header, data_start))
}

/// Loads the caches of a file with its metadata.
///
/// # Errors
/// As [`CacheFile::open`] and [`CacheFile::read`]; [`Error::Value`] for classes that this crate lacks.
pub fn load_prompt_cache(path: &Path) -> Result<(Vec<Cache>, Metadata)> {
    let (states, metadata) = CacheFile::open(path)?.read()?;
    Ok((states.into_iter().map(Cache::from_state).collect::<Result<_>>()?, metadata))
}
