//! From the host into device memory.

use super::pinned::Ring;
use super::stream::Side;
use super::{Memory, Runs};
use crate::error::Result;
use std::ops::Range;

const UPLOAD: &str = "upload";

/// See [`crate::array::Uploader`].
pub(crate) struct Uploader {
    ring: Ring,
    /// The slot that is filled next.
    next: usize,
}

impl Uploader {
    pub(crate) fn new(slot_bytes: usize) -> Result<Self> {
        Ok(Self { ring: Ring::new(UPLOAD, 2, slot_bytes)?, next: 0 })
    }

    pub(crate) fn slot(&mut self) -> Result<&mut [u8]> {
        self.ring.bytes(self.next)
    }

    /// Begins to copy runs of the slot into parts of `range`; see [`crate::array::Uploader::upload`].
    pub(crate) fn upload(
        &mut self,
        memory: &Memory,
        range: &Range<usize>,
        [n_heads, valid]: [usize; 2],
        [from, pitch]: [usize; 2],
    ) -> Result<()> {
        let in_memory = range.len() / n_heads;
        let from = Runs { from, n: n_heads, run: valid, pitch };
        let to = Runs { from: range.start, n: n_heads, run: valid, pitch: in_memory };
        assert!(to.end() <= memory.n_bytes && valid <= in_memory, "the parts lie in the buffer");
        assert!(from.end() <= self.ring.n_bytes(self.next), "the runs lie in the slot");
        // SAFETY: by the checks above source and target lie in live memory, which `finish` or the ring's drop waits for
        // before it can go; `slot` gives the bytes out again only when the mark of `send` is reached.
        unsafe { self.ring.stream.copy(self.ring.side(self.next), from, Side::Device(memory.start), to) }
    }

    /// Nothing more is copied from the slot: the next one comes.
    pub(crate) fn send(&mut self) -> Result<()> {
        self.ring.mark(self.next)?;
        self.next = (self.next + 1) % self.ring.len();
        Ok(())
    }

    pub(crate) fn finish(self) -> Result<()> {
        self.ring.stream.wait()
    }
}
