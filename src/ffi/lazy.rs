//! Arrays of a file that MLX reads when it computes them.

use super::array_handle::ArrayHandle;
use super::{check, error_handler, raw};
use crate::error::{Error, Result};
use std::ffi::CString;
use std::os::fd::{IntoRawFd, OwnedFd};

/// An owned map from names to lazy arrays; freed on drop.
pub(crate) struct LazyTensors(raw::mlx_map_string_to_array);

impl LazyTensors {
    /// Those of a safetensors file of this size and time of change, as seconds and nanoseconds.
    pub(crate) fn new(op: &'static str, file: OwnedFd, path: &[u8], size: u64, changed: [i64; 2]) -> Result<Self> {
        error_handler::install();
        // For messages only; a path without end would be none.
        let path = CString::new(path).unwrap_or_default();
        // SAFETY: mlx-c allocates an empty map, which `tensors` owns at once.
        let mut tensors = Self(unsafe { raw::mlx_map_string_to_array_new() });
        let [seconds, nanoseconds] = changed;
        // SAFETY: an owned map to be filled, an open file that is handed over, a string that lives through the call.
        check(op, unsafe {
            let file = file.into_raw_fd();
            raw::mlxrs_lazy_tensors(&raw mut tensors.0, file, path.as_ptr(), size as i64, seconds, nanoseconds)
        })?;
        Ok(tensors)
    }

    /// The array of that name.
    pub(crate) fn get(&self, op: &'static str, name: &str) -> Result<ArrayHandle> {
        let Ok(key) = CString::new(name) else {
            return Err(Error::value(op, "a tensor name without a zero byte", format!("{name:?}")));
        };
        // SAFETY: a live map and a string; `produced` owns the result. A name that is not there is a status.
        ArrayHandle::produced(op, |out| unsafe { raw::mlx_map_string_to_array_get(out, self.0, key.as_ptr()) })
    }
}

impl Drop for LazyTensors {
    fn drop(&mut self) {
        // SAFETY: `self` owns the map and is gone after this; arrays that were got live on.
        unsafe { raw::mlx_map_string_to_array_free(self.0) };
    }
}
