//! How much memory MLX's arrays hold, and when what it keeps goes back to the system.

#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::ffi::memory;

/// Unused buffers are returned once they take more than this part of the memory limit.
pub(super) const SHARE: usize = 4;

/// Returns MLX's unused buffers to the system if they take more than a quarter of its memory limit, or if with the
/// arrays they take more than all of it. Below that the next arrays get them, which asks no system and no device.
///
/// # Errors
/// [`Error::Mlx`] if MLX fails.
pub fn bound_memory_cache() -> Result<()> {
    let (cached, limit) = (memory::cached()?, memory::limit()?);
    if cached > limit / SHARE || cached + memory::active()? > limit {
        memory::clear_cache()?;
    }
    Ok(())
}

/// Bytes that arrays may hold while [`bound_memory_cache`] keeps as many unused ones as it ever does.
///
/// # Errors
/// [`Error::Mlx`] if MLX fails.
pub fn ceiling() -> Result<usize> {
    let limit = memory::limit()?;
    Ok(limit - limit / SHARE)
}

/// Bytes that MLX's arrays hold now.
///
/// # Errors
/// [`Error::Mlx`] if MLX fails.
pub fn active_memory() -> Result<usize> {
    memory::active()
}

/// Most bytes that MLX's arrays held at once since the start or the last [`reset_peak_memory`].
///
/// # Errors
/// [`Error::Mlx`] if MLX fails.
pub fn peak_memory() -> Result<usize> {
    memory::peak()
}

/// Starts counting the peak anew.
///
/// # Errors
/// [`Error::Mlx`] if MLX fails.
pub fn reset_peak_memory() -> Result<()> {
    memory::reset_peak()
}
