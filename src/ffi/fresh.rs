//! The handle of an array that nobody has seen yet, and its memory on the host.

use super::array_handle::ArrayHandle;
use super::{error_handler, raw};
use crate::error::Result;
use std::ffi::c_int;
use std::mem::MaybeUninit;

/// From this size on, huge pages are asked for: faulting small ones in takes longer than reading the file.
const HUGE_FROM: usize = 4 << 20;

/// An array over memory of MLX's allocator that has not been written.
pub(crate) struct FreshHandle {
    handle: ArrayHandle,
    data: *mut MaybeUninit<u8>,
    n_bytes: usize,
}

impl FreshHandle {
    /// `n_bytes` is what shape and dtype take.
    pub(crate) fn new(op: &'static str, shape: &[i32], dtype: raw::mlx_dtype, n_bytes: usize) -> Result<Self> {
        error_handler::install();
        let mut data = std::ptr::null_mut();
        // SAFETY: shape has the length that is passed; `data` is an out-parameter.
        let raw = unsafe { raw::mlxrs_host_array(shape.as_ptr(), shape.len() as c_int, dtype, n_bytes, &raw mut data) };
        if raw.ctx.is_null() {
            return Err(error_handler::last_error(op));
        }
        // SAFETY: just made for us.
        let handle = unsafe { ArrayHandle::own(raw) };
        // SAFETY: a live array.
        debug_assert_eq!(unsafe { raw::mlx_array_nbytes(handle.raw()) }, n_bytes);
        let fresh = Self { handle, data: data.cast(), n_bytes };
        fresh.advise();
        Ok(fresh)
    }

    /// The memory. Nothing but `self` knows it until [`finish`](Self::finish).
    pub(crate) fn bytes(&mut self) -> &mut [MaybeUninit<u8>] {
        if self.n_bytes == 0 {
            return &mut [];
        }
        // SAFETY: the allocator gave `n_bytes` at `data`, which live while the handle does; the borrow is `self`'s.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.n_bytes) }
    }

    /// The memory, zeroed.
    pub(crate) fn zeroed(&mut self) -> &mut [u8] {
        let bytes = self.bytes();
        bytes.fill(MaybeUninit::new(0));
        // SAFETY: every byte was just written, and the borrow stays that of `self`.
        unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len()) }
    }

    pub(crate) fn finish(self) -> ArrayHandle {
        self.handle
    }

    /// Asks for huge pages; a refusal costs time only.
    #[cfg(target_os = "linux")]
    fn advise(&self) {
        let page = rustix::param::page_size();
        let skipped = self.data.addr().next_multiple_of(page) - self.data.addr();
        if self.n_bytes < HUGE_FROM || super::on_cuda() {
            return;
        }
        let whole = (self.n_bytes - skipped) / page * page;
        // SAFETY: whole pages inside the allocation; the advice changes no byte.
        let advised =
            unsafe { rustix::mm::madvise(self.data.add(skipped).cast(), whole, rustix::mm::Advice::LinuxHugepage) };
        if let Err(error) = advised {
            tracing::debug!(%error, "no huge pages");
        }
    }

    #[cfg(not(target_os = "linux"))]
    #[expect(clippy::unused_self, reason = "there is no such advice elsewhere")]
    fn advise(&self) {}
}
