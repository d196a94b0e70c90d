//! A stream of copies of its own, beside MLX's.

use super::{Runs, check, context};
use crate::error::Result;
use cudarc::driver::sys::{self, CUDA_MEMCPY2D_st, CUdeviceptr, CUmemorytype_enum, CUstream, CUstream_flags_enum};

/// One side of a copy.
#[derive(Clone, Copy)]
pub(super) enum Side {
    Host(*mut u8),
    Device(CUdeviceptr),
}

/// Does not leave the thread that made it: there its context is current.
pub(super) struct Stream {
    op: &'static str,
    raw: CUstream,
}

impl Stream {
    /// The context of MLX's device becomes this thread's.
    pub fn new(op: &'static str) -> Result<Self> {
        let super::Context(context) = context(op)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a live context becomes this thread's; the out-parameter is a local.
        unsafe {
            check(op, sys::cuCtxSetCurrent(context))?;
            check(op, sys::cuStreamCreate(&raw mut raw, CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32))?;
        }
        Ok(Self { op, raw })
    }

    pub const fn op(&self) -> &'static str {
        self.op
    }

    pub const fn raw(&self) -> CUstream {
        self.raw
    }

    /// Starts copying the runs of `from` to those of `to`, as many and as long.
    ///
    /// # Safety
    /// Both lie in live memory, pinned on the host, until the stream was waited for; nobody writes the one or touches
    /// the other meanwhile.
    pub unsafe fn copy(&self, from: Side, from_runs: Runs, to: Side, to_runs: Runs) -> Result<()> {
        let Runs { n, run, .. } = from_runs;
        let is_whole = n == 1 || (from_runs.pitch == run && to_runs.pitch == run);
        let [width, height] = if is_whole { [n * run, 1] } else { [run, n] };
        let (from_type, from_host, from_device) = from.at(from_runs.from);
        let (to_type, to_host, to_device) = to.at(to_runs.from);
        let copy = CUDA_MEMCPY2D_st {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: from_type,
            srcHost: from_host.cast_const().cast(),
            srcDevice: from_device,
            srcArray: std::ptr::null_mut(),
            srcPitch: if height == 1 { width } else { from_runs.pitch },
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: to_type,
            dstHost: to_host.cast(),
            dstDevice: to_device,
            dstArray: std::ptr::null_mut(),
            dstPitch: if height == 1 { width } else { to_runs.pitch },
            WidthInBytes: width,
            Height: height,
        };
        // SAFETY: memory that lives and is left alone, by this function's contract; the context is this thread's.
        let started = unsafe {
            match (from, to) {
                (Side::Host(_), Side::Device(_)) if height == 1 => {
                    sys::cuMemcpyHtoDAsync_v2(to_device, from_host.cast_const().cast(), width, self.raw)
                }
                (Side::Device(_), Side::Host(_)) if height == 1 => {
                    sys::cuMemcpyDtoHAsync_v2(to_host.cast(), from_device, width, self.raw)
                }
                (Side::Device(_), Side::Device(_)) if height == 1 => {
                    sys::cuMemcpyDtoDAsync_v2(to_device, from_device, width, self.raw)
                }
                _ => sys::cuMemcpy2DAsync_v2(&raw const copy, self.raw),
            }
        };
        check(self.op, started)
    }

    /// Waits for all copies.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: a live stream.
        check(self.op, unsafe { sys::cuStreamSynchronize(self.raw) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: what `new` made, once the device is done with it. A failure here was, or will be, told by the calls
        // that matter.
        unsafe {
            sys::cuStreamSynchronize(self.raw);
            sys::cuStreamDestroy_v2(self.raw);
        }
    }
}

impl Side {
    /// The place `bytes` behind this one, as CUDA wants to be told it.
    fn at(self, bytes: usize) -> (CUmemorytype_enum, *mut u8, CUdeviceptr) {
        match self {
            Self::Host(data) => (CUmemorytype_enum::CU_MEMORYTYPE_HOST, data.wrapping_add(bytes), 0),
            Self::Device(start) => {
                let start = start + bytes as CUdeviceptr;
                (CUmemorytype_enum::CU_MEMORYTYPE_DEVICE, std::ptr::null_mut(), start)
            }
        }
    }
}
