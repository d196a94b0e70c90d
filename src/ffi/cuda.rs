//! CUDA's driver, found at run time: copies between pinned host memory and the memory of MLX's arrays.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(not(target_os = "linux"))]
mod none;

#[cfg(target_os = "linux")]
pub(crate) use linux::{Copy, Downloader, Memory, Uploader, is_there};
#[cfg(not(target_os = "linux"))]
pub(crate) use none::{Copy, Downloader, Memory, Uploader, is_there};

/// Runs of bytes in some memory: `n` of `run` bytes, `pitch` apart, from byte `from` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Runs {
    pub(crate) from: usize,
    pub(crate) n: usize,
    pub(crate) run: usize,
    pub(crate) pitch: usize,
}

#[cfg(target_os = "linux")]
impl Runs {
    /// One past the last byte; there is at least one run.
    fn end(&self) -> usize {
        self.from + (self.n - 1) * self.pitch + self.run
    }
}
