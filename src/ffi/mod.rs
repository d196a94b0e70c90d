//! L0: mlx-c behind owned handles. Every raw pointer of the crate lives in this folder.

mod array_handle;
pub(crate) mod cuda;
mod error_handler;
mod fresh;
mod kept;
mod lazy;
pub(crate) mod memory;
mod page_cache;
mod rows;
mod vector;

/// Bindgen's output, as it comes.
#[allow(
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks
)]
mod raw {
    include!(concat!(env!("OUT_DIR"), "/mlx_c.rs"));
}

#[cfg(feature = "python")]
pub(crate) use array_handle::RawArray;
pub(crate) use array_handle::{ArrayHandle, live_handles};
pub(crate) use error_handler::check;
pub(crate) use fresh::FreshHandle;
pub(crate) use kept::{DeviceBytes, HostBytes};
pub(crate) use lazy::LazyTensors;
pub(crate) use page_cache::{is_cached_and_clean, start_writeback};
pub(crate) use raw::{mlx_device_type_, mlx_dtype, mlx_dtype_};
pub(crate) use vector::{async_eval, concatenate, eval, marks, quantize};

use crate::error::{Error, Result};
use std::ffi::{CStr, c_int};

/// Process in which the crate was first used. MLX's worker threads exist only there.
static HOME_PROCESS: std::sync::OnceLock<u32> = std::sync::OnceLock::new();

#[cfg(feature = "python")]
/// Remembers this process as the one in which MLX can evaluate.
pub(crate) fn remember_process() {
    HOME_PROCESS.get_or_init(std::process::id);
}

/// Fails in a forked child, where MLX would wait forever for threads that the fork did not copy.
pub(crate) fn check_not_forked(op: &'static str) -> Result<()> {
    let home = *HOME_PROCESS.get_or_init(std::process::id);
    if std::process::id() == home {
        return Ok(());
    }
    let message = "MLX cannot evaluate in a forked child; start the process with the `spawn` method".to_owned();
    Err(Error::Mlx { op, message })
}

/// The stream that this thread's operations go to now.
fn current_stream(op: &'static str) -> Result<raw::mlx_stream> {
    error_handler::install();
    // SAFETY: takes nothing; the handle points to a thread-local of this thread and is used in this call only.
    let stream = unsafe { raw::mlxrs_current_stream() };
    if stream.ctx.is_null() { Err(error_handler::last_error(op)) } else { Ok(stream) }
}

/// Version of the libmlx that the process loaded.
pub(crate) fn mlx_version() -> String {
    // SAFETY: MLX returns a pointer to a string of static lifetime.
    unsafe { CStr::from_ptr(raw::mlxrs_mlx_version()) }.to_string_lossy().into_owned()
}

/// True if MLX has a CUDA device, whose allocator then serves all arrays.
pub(crate) fn has_cuda() -> bool {
    let mut available = false;
    // SAFETY: writes one bool through a pointer to a local.
    let status = unsafe { raw::mlx_cuda_is_available(&raw mut available) };
    status == 0 && available
}

/// True if arrays live on a CUDA device by default: host reads would move them off it.
pub(crate) fn on_cuda() -> bool {
    has_cuda() && default_device().is_some_and(|(kind, _)| kind == mlx_device_type_::MLX_GPU)
}

/// Kind and index of this thread's default device.
pub(crate) fn default_device() -> Option<(mlx_device_type_::Type, c_int)> {
    error_handler::install();
    let (mut kind, mut index) = (0, 0);
    // SAFETY: `device` is made and freed here; the getters write through pointers to locals.
    unsafe {
        let mut device = raw::mlx_device_new();
        let ok = raw::mlx_get_default_device(&raw mut device) == 0
            && raw::mlx_device_get_type(&raw mut kind, device) == 0
            && raw::mlx_device_get_index(&raw mut index, device) == 0;
        raw::mlx_device_free(device);
        ok.then_some((kind, index))
    }
}
