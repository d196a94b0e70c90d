//! CUDA's driver, found at run time: copies from pinned host memory into the memory of MLX's arrays.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(not(target_os = "linux"))]
mod none;

#[cfg(target_os = "linux")]
pub(crate) use linux::{Memory, Uploader, is_there};
#[cfg(not(target_os = "linux"))]
pub(crate) use none::{Memory, Uploader, is_there};
