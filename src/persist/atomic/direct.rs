//! Writing past the system's page cache: the disk reads the program's memory itself.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::Place;

/// What places in the file, lengths and addresses of memory are multiples of; enough for every common disk.
const ALIGNMENT: usize = 4096;

/// The temporary file, opened once more.
#[derive(Debug)]
pub(super) struct Direct(File);

impl Direct {
    /// None where the system or the file system has no such way.
    #[cfg(target_os = "linux")]
    pub(super) fn open(place: &Place, temp: &OsStr) -> Option<Self> {
        use rustix::fs::{Mode, OFlags, openat};
        let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = openat(&place.folder, temp, flags, Mode::empty());
        opened
            .inspect_err(|error| tracing::debug!(%error, "written through the page cache"))
            .ok()
            .map(File::from)
            .map(Self)
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn open(_: &Place, _: &OsStr) -> Option<Self> {
        None
    }

    pub(super) const fn file(&self) -> &File {
        &self.0
    }

    /// Writes as many of `bytes`, from the front, as can go this way, and tells how many.
    pub(super) fn write(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
        if !bytes.as_ptr().addr().is_multiple_of(ALIGNMENT) || !at.is_multiple_of(ALIGNMENT as u64) {
            return Ok(0);
        }
        let aligned = bytes.len() / ALIGNMENT * ALIGNMENT;
        match self.0.write_all_at(&bytes[..aligned], at) {
            // A disk that wants more than this alignment.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(0),
            written => written.map(|()| aligned),
        }
    }
}

/// `n_bytes` zeros in `memory` that begin at a multiple of [`ALIGNMENT`].
pub fn aligned_zeros(memory: &mut Vec<u8>, n_bytes: usize) -> &mut [u8] {
    memory.clear();
    memory.resize(n_bytes + ALIGNMENT, 0);
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    &mut memory[start..][..n_bytes]
}
