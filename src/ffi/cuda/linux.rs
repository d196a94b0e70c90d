//! The driver's calls, each behind an owner of what it makes.

mod download;
mod pinned;
mod snapshot;
mod stream;
mod upload;

pub(crate) use download::Downloader;
pub(crate) use snapshot::Copy;
pub(crate) use upload::Uploader;

use crate::error::{Error, Result};
use crate::ffi::cuda::Runs;
use crate::ffi::{ArrayHandle, raw};
use cudarc::driver::sys::{self, CUcontext, CUdeviceptr, CUresult};
use std::ffi::c_void;
use std::sync::OnceLock;

fn check(op: &'static str, status: CUresult) -> Result<()> {
    status.result().map_err(|error| Error::Mlx { op, message: format!("CUDA: {error}") })
}

/// True if the driver can be loaded and MLX's device has a context.
pub(crate) fn is_there() -> bool {
    context("find CUDA").is_ok()
}

/// The primary context of a device, which MLX uses too. It is never given back: MLX keeps it for the process.
#[derive(Clone, Copy)]
struct Context(CUcontext);

// SAFETY: a context may be current on any number of threads.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks.
unsafe impl Sync for Context {}

/// The context of MLX's default device, as it was when this was first asked.
fn context(op: &'static str) -> Result<Context> {
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
            check(op, sys::cuInit(0))
                .and_then(|()| check(op, sys::cuDeviceGet(&raw mut device, ordinal)))
                .and_then(|()| check(op, sys::cuDevicePrimaryCtxRetain(&raw mut context, device)))
        };
        retained.ok().map(|()| Context(context))
    });
    found.ok_or_else(|| Error::Mlx { op, message: "CUDA's driver cannot be used".to_owned() })
}

/// Memory of an evaluated array, from its first element on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    start: CUdeviceptr,
    n_bytes: usize,
    /// False for unified memory, which the host may read as well.
    pub(crate) is_on_device: bool,
}

impl Memory {
    /// Where the `n_bytes` from the first element of `array`, a computed one, to its last lie.
    pub(crate) fn of(op: &'static str, array: &ArrayHandle, n_bytes: usize) -> Result<Self> {
        let (mut data, mut size, mut is_on_device) = (std::ptr::null_mut::<c_void>(), 0, false);
        // SAFETY: a live array on a CUDA device; out-parameters are locals.
        let found = unsafe { raw::mlxrs_cuda_memory(array.raw(), &raw mut data, &raw mut size, &raw mut is_on_device) };
        if !found || size < n_bytes {
            let message = format!("expected device memory of {n_bytes} bytes, got {size}");
            return Err(Error::Mlx { op, message });
        }
        Ok(Self { start: data.addr() as CUdeviceptr, n_bytes, is_on_device })
    }
}
