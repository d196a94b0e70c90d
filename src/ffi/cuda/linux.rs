//! The driver's calls, each behind an owner of what it makes.

use crate::error::{Error, Result};
use crate::ffi::{ArrayHandle, raw};
use cudarc::driver::sys::{
    self, CUDA_MEMCPY2D_st, CUcontext, CUdeviceptr, CUevent, CUevent_flags_enum, CUmemorytype_enum, CUresult, CUstream,
    CUstream_flags_enum,
};
use std::ffi::c_void;
use std::ops::Range;
use std::sync::{Mutex, OnceLock, PoisonError};

const UPLOAD: &str = "upload";
/// Pinned slots that are kept for the next load; pinning takes longer than a copy.
const KEPT_SLOTS: usize = 16;

fn check(status: CUresult) -> Result<()> {
    status.result().map_err(|error| Error::Mlx { op: UPLOAD, message: format!("CUDA: {error}") })
}

/// True if the driver can be loaded and MLX's device has a context.
pub(crate) fn is_there() -> bool {
    context().is_ok()
}

/// The primary context of a device, which MLX uses too. It is never given back: MLX keeps it for the process.
#[derive(Clone, Copy)]
struct Context(CUcontext);

// SAFETY: a context may be current on any number of threads.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks.
unsafe impl Sync for Context {}

/// The context of MLX's default device.
fn context() -> Result<Context> {
    static CONTEXT: OnceLock<Option<Context>> = OnceLock::new();
    let found = CONTEXT.get_or_init(|| {
        let ordinal = crate::ffi::default_device().map_or(0, |(_, index)| index);
        // SAFETY: asks the loader only.
        if !unsafe { sys::is_culib_present() } {
            return None;
        }
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: the driver is there; out-parameters are locals; retain takes the device that the call before gave.
        let retained = unsafe {
            check(sys::cuInit(0))
                .and_then(|()| check(sys::cuDeviceGet(&raw mut device, ordinal)))
                .and_then(|()| check(sys::cuDevicePrimaryCtxRetain(&raw mut context, device)))
        };
        retained.ok().map(|()| Context(context))
    });
    found.ok_or_else(|| Error::Mlx { op: UPLOAD, message: "CUDA's driver cannot be used".to_owned() })
}

/// Device memory of an evaluated array.
pub(crate) struct Memory {
    start: CUdeviceptr,
    n_bytes: usize,
}

impl Memory {
    /// Where the `n_bytes` of `array`, a computed one that owns its whole buffer, lie.
    pub(crate) fn of(array: &ArrayHandle, n_bytes: usize) -> Result<Self> {
        let (mut data, mut size) = (std::ptr::null_mut::<c_void>(), 0);
        // SAFETY: a live array on a CUDA device; out-parameters are locals.
        let found = unsafe { raw::mlxrs_cuda_memory(array.raw(), &raw mut data, &raw mut size) };
        if !found || size < n_bytes {
            let message = format!("expected device memory of {n_bytes} bytes, got {size}");
            return Err(Error::Mlx { op: UPLOAD, message });
        }
        Ok(Self { start: data.addr() as CUdeviceptr, n_bytes })
    }
}

/// Host memory that the device reads by itself.
struct Pinned {
    data: *mut u8,
    n_bytes: usize,
}

// SAFETY: plain memory with one owner; CUDA pins it for all contexts and threads.
unsafe impl Send for Pinned {}

static KEPT: Mutex<Vec<Pinned>> = Mutex::new(Vec::new());

impl Pinned {
    /// A kept slot, or a new one. The context is current.
    fn new(n_bytes: usize) -> Result<Self> {
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = kept.iter().position(|slot| slot.n_bytes == n_bytes) {
            return Ok(kept.swap_remove(at));
        }
        drop(kept);
        let mut data = std::ptr::null_mut();
        // SAFETY: an out-parameter; portable memory is pinned for every context.
        check(unsafe { sys::cuMemHostAlloc(&raw mut data, n_bytes, sys::CU_MEMHOSTALLOC_PORTABLE) })?;
        Ok(Self { data: data.cast(), n_bytes })
    }

    fn keep(self) {
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT_SLOTS {
            kept.push(self);
        } else {
            drop(kept);
            // SAFETY: this slot's own memory, which no copy reads any more.
            unsafe { sys::cuMemFreeHost(self.data.cast()) };
        }
    }
}

/// A pinned slot, and the event that says that the device has read it.
struct Slot {
    pinned: Pinned,
    read: CUevent,
}

/// See [`crate::array::Uploader`].
pub(crate) struct Uploader {
    stream: CUstream,
    slots: Vec<Slot>,
    /// The slot that is filled next.
    next: usize,
}

impl Uploader {
    pub(crate) fn new(slot_bytes: usize) -> Result<Self> {
        let Context(context) = context()?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: a live context becomes this thread's; the out-parameter is a local.
        unsafe {
            check(sys::cuCtxSetCurrent(context))?;
            check(sys::cuStreamCreate(&raw mut stream, CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32))?;
        }
        let mut uploader = Self { stream, slots: Vec::new(), next: 0 };
        for _ in 0..2 {
            let pinned = Pinned::new(slot_bytes)?;
            let mut read = std::ptr::null_mut();
            // SAFETY: the context is current; the out-parameter is a local.
            let made = unsafe { sys::cuEventCreate(&raw mut read, CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32) };
            match check(made) {
                Ok(()) => uploader.slots.push(Slot { pinned, read }),
                Err(error) => {
                    pinned.keep();
                    return Err(error);
                }
            }
        }
        Ok(uploader)
    }

    pub(crate) fn slot(&mut self) -> Result<&mut [u8]> {
        let Slot { pinned, read } = &self.slots[self.next];
        // SAFETY: a live event; one that was never recorded is done.
        check(unsafe { sys::cuEventSynchronize(*read) })?;
        // SAFETY: the slot's own memory, zeroed by the system when it was made; the device has read it.
        Ok(unsafe { std::slice::from_raw_parts_mut(pinned.data, pinned.n_bytes) })
    }

    pub(crate) fn upload(
        &mut self,
        memory: &Memory,
        range: &Range<usize>,
        [n_heads, valid]: [usize; 2],
        pitch: usize,
    ) -> Result<()> {
        let Slot { pinned, read } = &self.slots[self.next];
        let in_memory = range.len() / n_heads;
        let end = range.start + (n_heads - 1) * in_memory + valid;
        assert!(end <= memory.n_bytes && valid <= in_memory, "the parts lie in the buffer");
        assert!((n_heads - 1) * pitch + valid <= pinned.n_bytes, "the runs lie in the slot");
        let to = memory.start + range.start as CUdeviceptr;
        let copy = CUDA_MEMCPY2D_st {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: CUmemorytype_enum::CU_MEMORYTYPE_HOST,
            srcHost: pinned.data.cast_const().cast(),
            srcDevice: 0,
            srcArray: std::ptr::null_mut(),
            srcPitch: pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: CUmemorytype_enum::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: to,
            dstArray: std::ptr::null_mut(),
            dstPitch: in_memory,
            WidthInBytes: valid,
            Height: n_heads,
        };
        // SAFETY: by the checks above source and target lie in live memory, which `finish` or `drop` waits for before it
        // can go; the context is this thread's, since an uploader does not leave its thread.
        unsafe {
            if n_heads == 1 {
                check(sys::cuMemcpyHtoDAsync_v2(to, pinned.data.cast_const().cast(), valid, self.stream))?;
            } else {
                check(sys::cuMemcpy2DAsync_v2(&raw const copy, self.stream))?;
            }
            check(sys::cuEventRecord(*read, self.stream))?;
        }
        self.next = (self.next + 1) % self.slots.len();
        Ok(())
    }

    pub(crate) fn finish(self) -> Result<()> {
        // SAFETY: a live stream.
        check(unsafe { sys::cuStreamSynchronize(self.stream) })
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        // SAFETY: what this uploader made, once the device is done with it. A failure here was, or will be, told by the
        // calls that matter.
        unsafe {
            sys::cuStreamSynchronize(self.stream);
            sys::cuStreamDestroy_v2(self.stream);
        }
        for Slot { pinned, read } in self.slots.drain(..) {
            // SAFETY: as above.
            unsafe { sys::cuEventDestroy_v2(read) };
            pinned.keep();
        }
    }
}
