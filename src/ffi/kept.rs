//! Memory of arrays that threads read which call no MLX.

use super::array_handle::ArrayHandle;
use super::{cuda, error_handler, raw};
use crate::error::{Error, Result};

/// The bytes from the first element of a computed array to its last. They stay as they are for as long as this lives:
/// MLX writes into no buffer that another node holds.
pub(crate) struct HostBytes {
    data: *const u8,
    n_bytes: usize,
    /// Nothing but the owner of the memory; never evaluated or handed out.
    _array: ArrayHandle,
}

// SAFETY: the memory is only read; the handle may be dropped on any thread.
unsafe impl Send for HostBytes {}
// SAFETY: as above; a shared reference gives bytes, and never the handle.
unsafe impl Sync for HostBytes {}

impl HostBytes {
    /// `n_bytes` is the extent of `array`, which was computed and lies in memory that the host reads: on CUDA the memory
    /// of the device would be moved.
    pub(crate) fn new(op: &'static str, array: ArrayHandle, n_bytes: usize) -> Result<Self> {
        debug_assert!(array.is_available());
        // SAFETY: a live array; mlx-c catches what MLX throws and returns null then.
        let data = unsafe { raw::mlx_array_data_uint8(array.raw()) };
        if data.is_null() && n_bytes > 0 {
            return Err(error_handler::last_error(op));
        }
        Ok(Self { data, n_bytes, _array: array })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        if self.n_bytes == 0 {
            return &[];
        }
        // SAFETY: first and last element, and so all between, lie in the one buffer, which the handle keeps alive and
        // as it is.
        unsafe { std::slice::from_raw_parts(self.data, self.n_bytes) }
    }
}

/// The same of an array in CUDA device memory, for copies by CUDA's driver.
pub(crate) struct DeviceBytes {
    memory: cuda::Memory,
    n_bytes: usize,
    /// Nothing but the owner of the memory; never evaluated or handed out.
    array: ArrayHandle,
}

// SAFETY: an address and a handle that may be dropped on any thread.
unsafe impl Send for DeviceBytes {}
// SAFETY: as above; a shared reference gives the address, and asks MLX's description of the buffer for it again.
unsafe impl Sync for DeviceBytes {}

impl DeviceBytes {
    /// `n_bytes` is the extent of `array`, which was computed; `Err` gives the array back if it lies in unified memory.
    pub(crate) fn new(op: &'static str, array: ArrayHandle, n_bytes: usize) -> Result<Result<Self, ArrayHandle>> {
        let memory = cuda::Memory::of(op, &array, n_bytes)?;
        Ok(if memory.is_on_device { Ok(Self { memory, n_bytes, array }) } else { Err(array) })
    }

    pub(crate) const fn memory(&self) -> &cuda::Memory {
        &self.memory
    }

    /// Fails if the buffer was moved since: whoever reads an array on the host makes MLX move it to unified memory.
    pub(crate) fn check_in_place(&self, op: &'static str) -> Result<()> {
        if cuda::Memory::of(op, &self.array, self.n_bytes)? == self.memory {
            return Ok(());
        }
        let message = "an array was read on the host, and so moved, while its bytes were copied".to_owned();
        Err(Error::Mlx { op, message })
    }
}
