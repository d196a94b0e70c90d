//! The bytes of an open record's file.

use super::file::{self, Contents, Packed, Place};
use super::pack;
use super::reading::Lease;
use crate::error::{Error, Result};
use crate::store::prompt_store::open_record::OpenRecord;
use crate::store::prompt_store::record::checksum;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// Files of records that are open in this process.
static N_OPEN: AtomicUsize = AtomicUsize::new(0);

/// Files of records that may stay open: a quarter of what the process may have. More are opened for each read.
fn max_open() -> usize {
    static MAX: OnceLock<usize> = OnceLock::new();
    *MAX.get_or_init(|| {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        usize::try_from(limit.unwrap_or(4096) / 4).unwrap_or(1024)
    })
}

/// A file that stays open while it counts.
#[derive(Debug)]
struct Kept(File);

impl Kept {
    fn new(file: File) -> Option<Self> {
        if N_OPEN.fetch_add(1, Ordering::Relaxed) < max_open() {
            return Some(Self(file));
        }
        N_OPEN.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        N_OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The bytes of a record in its file.
#[derive(Debug)]
pub(in super::super) struct FileSource {
    path: PathBuf,
    file: Option<Kept>,
    data_start: u64,
    n_bytes: u64,
    /// Where its tensors lie, in their order; empty if the data is as it was put.
    places: Vec<Place>,
    _lease: Option<Arc<Lease>>,
}

impl FileSource {
    /// The record that `file` holds.
    pub(super) fn open(path: PathBuf, file: File, contents: Contents, lease: Option<Arc<Lease>>) -> OpenRecord {
        let Contents { entry, layout, tensors, places, data_start, .. } = contents;
        let source = Self { path, file: Kept::new(file), data_start, n_bytes: entry.n_bytes, places, _lease: lease };
        OpenRecord::in_file(layout, tensors, source)
    }

    /// Fills `buffer` with the bytes that were put, from `at` on.
    pub fn read_into(&self, buffer: &mut [u8], at: u64) -> Result<()> {
        let Some(end) = at.checked_add(buffer.len() as u64).filter(|end| *end <= self.n_bytes) else {
            return Err(self.too_short(buffer.len(), at));
        };
        if self.places.is_empty() {
            return self.read_file(buffer, at);
        }
        for place in &self.places {
            let (from, to) = (at.max(place.start), end.min(place.start + place.n_bytes));
            if from >= to {
                continue;
            }
            let own = &mut buffer[(from - at) as usize..(to - at) as usize];
            match &place.packed {
                None => self.read_file(own, place.at + (from - place.start))?,
                Some(packed) if own.len() as u64 == place.n_bytes => self.unpack(packed, place.at, own)?,
                Some(packed) => {
                    let mut whole = vec![0; place.n_bytes as usize];
                    self.unpack(packed, place.at, &mut whole)?;
                    own.copy_from_slice(&whole[(from - place.start) as usize..(to - place.start) as usize]);
                }
            }
        }
        Ok(())
    }

    /// Fills `bytes` with all of a tensor, of which the data has another form at `at`.
    fn unpack(&self, packed: &Packed, at: u64, bytes: &mut [u8]) -> Result<()> {
        // No more than the file has: its header was checked against its size.
        let mut stored = vec![0; packed.n_bytes as usize];
        self.read_file(&mut stored, at)?;
        let damaged = |got: String| Error::format(&self.path, "data", format!("a tensor at {at}"), got);
        if checksum(&stored) != packed.checksum {
            return Err(damaged("bytes with another checksum".into()));
        }
        pack::unpack(&stored, packed.width, bytes).map_err(|error| damaged(error.to_string()))
    }

    /// Fills `buffer` with the file's data from `at` on. It is never changed: its name belongs to it alone.
    fn read_file(&self, buffer: &mut [u8], at: u64) -> Result<()> {
        let read = |file: &File, buffer: &mut [u8]| file.read_exact_at(buffer, self.data_start + at);
        let outcome = match &self.file {
            Some(kept) => read(&kept.0, buffer),
            None => file::open(&self.path).and_then(|file| read(&file, buffer)),
        };
        outcome.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.too_short(buffer.len(), at),
            _ => Error::io("read", &self.path, error),
        })
    }

    fn too_short(&self, n_bytes: usize, at: u64) -> Error {
        Error::format(&self.path, "data", format!("{n_bytes} bytes at {at}"), "the end of the record")
    }
}
