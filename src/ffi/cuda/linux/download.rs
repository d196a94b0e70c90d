//! From device memory to the host.

use super::pinned::Ring;
use super::stream::Side;
use super::{Memory, Runs};
use crate::error::Result;

const DOWNLOAD: &str = "download";

/// See [`crate::array::Downloader`].
pub(crate) struct Downloader {
    ring: Ring,
    /// The slot that is filled next.
    next: usize,
    /// True if the device writes into that one already.
    is_begun: bool,
    /// How many slots before it are on their way.
    n_pending: usize,
}

impl Downloader {
    pub(crate) fn new(slot_bytes: usize) -> Result<Self> {
        Ok(Self { ring: Ring::new(DOWNLOAD, 2, slot_bytes)?, next: 0, is_begun: false, n_pending: 0 })
    }

    pub(crate) const fn is_full(&self) -> bool {
        self.n_pending == self.ring.len()
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.n_pending == 0
    }

    pub(crate) fn slot(&mut self) -> Result<&mut [u8]> {
        assert!(!self.is_full() && !self.is_begun, "a slot is free");
        self.ring.bytes(self.next)
    }

    pub(crate) fn download(&mut self, memory: &Memory, from: Runs, to: Runs) -> Result<()> {
        assert!(!self.is_full(), "a slot is free");
        assert!(from.n == to.n && from.run == to.run, "as much is read as written");
        assert!(from.end() <= memory.n_bytes, "the runs lie in the array");
        assert!(to.end() <= self.ring.n_bytes(self.next), "the runs lie in the slot");
        self.is_begun = true;
        // SAFETY: by the checks above source and target lie in live memory, which `take` or the ring's drop waits for
        // before it can go; the slot's bytes are given out again only when its mark is reached.
        unsafe { self.ring.stream.copy(Side::Device(memory.start), from, self.ring.side(self.next), to) }
    }

    pub(crate) fn send(&mut self) -> Result<()> {
        self.ring.mark(self.next)?;
        self.is_begun = false;
        self.next = (self.next + 1) % self.ring.len();
        self.n_pending += 1;
        Ok(())
    }

    pub(crate) fn take(&mut self) -> Result<&[u8]> {
        assert!(!self.is_empty(), "a slot is on its way");
        let oldest = (self.next + self.ring.len() - self.n_pending) % self.ring.len();
        self.n_pending -= 1;
        Ok(&*self.ring.bytes(oldest)?)
    }
}
