//! The memory that the system keeps of the file to be replaced, for the file that replaces it.

use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{Advice, Mode, OFlags, fadvise, openat};

use super::place::Place;

/// The open file to be replaced, whose pages may go: they are on the disk.
///
/// Fresh pages are dear in virtual machines, which give free memory back to their host within seconds. What the old file
/// gives up piece by piece is used again at once, and memory does not hold both.
#[derive(Debug)]
pub(super) struct OldPages(OwnedFd);

impl OldPages {
    /// None if nothing is there to be had: no file, none in memory, or one that the disk does not have yet.
    pub(super) fn find(place: &Place) -> Option<Self> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = openat(&place.folder, &place.name, flags, Mode::empty()).ok()?;
        crate::ffi::is_cached_and_clean(file.as_fd()).then_some(Self(file))
    }

    /// Gives up those between bytes `at` and `at + n_bytes`. The file keeps its content, and is read from the disk.
    pub(super) fn give_up(&self, at: u64, n_bytes: usize) {
        if let Some(n_bytes) = std::num::NonZero::new(n_bytes as u64)
            && let Err(error) = fadvise(&self.0, at, Some(n_bytes), Advice::DontNeed)
        {
            tracing::debug!(%error, "a replaced file keeps its pages");
        }
    }
}
