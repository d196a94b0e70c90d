//! What MLX's allocator tells of itself.

use super::{check, raw};
use crate::error::Result;
use std::ffi::c_int;

/// A number that mlx-c writes through its argument.
fn read(op: &'static str, call: unsafe extern "C" fn(*mut usize) -> c_int) -> Result<usize> {
    let mut bytes = 0;
    // SAFETY: the callers pass mlx-c's getters, which write one number through a pointer to a local.
    check(op, unsafe { call(&raw mut bytes) })?;
    Ok(bytes)
}

/// Bytes that arrays hold now.
pub(crate) fn active() -> Result<usize> {
    read("active_memory", raw::mlx_get_active_memory)
}

/// Bytes of buffers that are kept for the next arrays.
pub(crate) fn cached() -> Result<usize> {
    read("cache_memory", raw::mlx_get_cache_memory)
}

/// Most bytes that arrays held at once.
pub(crate) fn peak() -> Result<usize> {
    read("peak_memory", raw::mlx_get_peak_memory)
}

/// Bytes that arrays shall not exceed.
pub(crate) fn limit() -> Result<usize> {
    read("memory_limit", raw::mlx_get_memory_limit)
}

/// Sets how many bytes of buffers may be kept for the next arrays, and gives what was set before. Waits for what CPU
/// streams compute now; kept buffers beyond `bytes` are returned to the system, the oldest first.
pub(crate) fn set_cache_limit(bytes: usize) -> Result<usize> {
    let mut before = 0;
    // SAFETY: writes one number through a pointer to a local; MLX locks its allocator.
    check("set_cache_limit", unsafe { raw::mlx_set_cache_limit(&raw mut before, bytes) })?;
    Ok(before)
}

/// Starts counting the peak anew.
pub(crate) fn reset_peak() -> Result<()> {
    // SAFETY: takes nothing.
    check("reset_peak_memory", unsafe { raw::mlx_reset_peak_memory() })
}

/// Returns the buffers that are kept to the system.
pub(crate) fn clear_cache() -> Result<()> {
    // SAFETY: takes nothing; MLX locks its allocator.
    check("clear_cache", unsafe { raw::mlx_clear_cache() })
}
