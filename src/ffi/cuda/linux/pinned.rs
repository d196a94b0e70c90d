//! Pinned host memory, kept from one transfer to the next: pinning takes longer than a copy.

use super::check;
use super::stream::{Side, Stream};
use crate::error::Result;
use cudarc::driver::sys::{self, CUevent, CUevent_flags_enum};
use std::sync::{Mutex, PoisonError};

/// Slots that are kept for the next transfer, whichever way it goes.
const KEPT_SLOTS: usize = 16;

/// Host memory that the device reads and writes by itself.
struct Pinned {
    data: *mut u8,
    n_bytes: usize,
}

// SAFETY: plain memory with one owner; CUDA pins it for all contexts and threads.
unsafe impl Send for Pinned {}

static KEPT: Mutex<Vec<Pinned>> = Mutex::new(Vec::new());

impl Pinned {
    /// A kept one, or a new one. The context is current.
    fn new(op: &'static str, n_bytes: usize) -> Result<Self> {
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = kept.iter().position(|slot| slot.n_bytes == n_bytes) {
            return Ok(kept.swap_remove(at));
        }
        drop(kept);
        let mut data = std::ptr::null_mut();
        // SAFETY: an out-parameter; portable memory is pinned for every context.
        check(op, unsafe { sys::cuMemHostAlloc(&raw mut data, n_bytes, sys::CU_MEMHOSTALLOC_PORTABLE) })?;
        Ok(Self { data: data.cast(), n_bytes })
    }

    fn keep(self) {
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT_SLOTS {
            kept.push(self);
        } else {
            drop(kept);
            // SAFETY: this slot's own memory, which no copy touches any more.
            unsafe { sys::cuMemFreeHost(self.data.cast()) };
        }
    }
}

/// A pinned slot, and the event that says that the device is done with it.
struct Slot {
    pinned: Pinned,
    done: CUevent,
}

/// A stream with slots that take turns: the device is busy with one while the host has another.
pub(super) struct Ring {
    pub stream: Stream,
    slots: Vec<Slot>,
}

impl Ring {
    /// `n_slots` of `slot_bytes` each.
    pub fn new(op: &'static str, n_slots: usize, slot_bytes: usize) -> Result<Self> {
        let mut ring = Self { stream: Stream::new(op)?, slots: Vec::with_capacity(n_slots) };
        for _ in 0..n_slots {
            let pinned = Pinned::new(op, slot_bytes)?;
            let mut done = std::ptr::null_mut();
            // SAFETY: the stream made its context current; the out-parameter is a local.
            let made = unsafe { sys::cuEventCreate(&raw mut done, CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32) };
            match check(op, made) {
                Ok(()) => ring.slots.push(Slot { pinned, done }),
                Err(error) => {
                    pinned.keep();
                    return Err(error);
                }
            }
        }
        Ok(ring)
    }

    pub const fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn n_bytes(&self, at: usize) -> usize {
        self.slots[at].pinned.n_bytes
    }

    /// A slot as one side of a copy on this ring's stream.
    pub fn side(&self, at: usize) -> Side {
        Side::Host(self.slots[at].pinned.data)
    }

    /// Says that the copies so far are all that the device does with a slot.
    pub fn mark(&self, at: usize) -> Result<()> {
        // SAFETY: a live event and a live stream of one context, which is this thread's.
        check(self.stream.op(), unsafe { sys::cuEventRecord(self.slots[at].done, self.stream.raw()) })
    }

    /// The bytes of a slot, once the device is done with it.
    pub fn bytes(&mut self, at: usize) -> Result<&mut [u8]> {
        let Slot { pinned, done } = &self.slots[at];
        // SAFETY: a live event; one that was never recorded is done.
        check(self.stream.op(), unsafe { sys::cuEventSynchronize(*done) })?;
        // SAFETY: the slot's own memory, zeroed by the system when it was made; every copy of it was marked, so the
        // device is done with it.
        Ok(unsafe { std::slice::from_raw_parts_mut(pinned.data, pinned.n_bytes) })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // A failure was, or will be, told by the calls that matter.
        let _ = self.stream.wait();
        for Slot { pinned, done } in self.slots.drain(..) {
            // SAFETY: what `new` made, once the device is done with it.
            unsafe { sys::cuEventDestroy_v2(done) };
            pinned.keep();
        }
    }
}
