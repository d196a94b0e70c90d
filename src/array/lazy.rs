//! Arrays that are read from a file when they are computed.

use super::Array;
use crate::error::Result;
use crate::ffi;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The tensors of a safetensors file by name, none of them read.
///
/// Computing one fails if the file is short by then, or was written since.
pub struct LazyTensors(ffi::LazyTensors);

impl LazyTensors {
    /// Those of an open file; `path` is for messages. The header is read now.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if the file cannot be looked at, [`Error::Mlx`](crate::Error::Mlx) if MLX refuses
    /// its header.
    pub fn open(op: &'static str, file: &File, path: &Path) -> Result<Self> {
        let fail = |source| crate::Error::io("read", path, source);
        let meta = file.metadata().map_err(fail)?;
        let own = OwnedFd::from(file.try_clone().map_err(fail)?);
        let changed = [meta.mtime(), meta.mtime_nsec()];
        ffi::LazyTensors::new(op, own, path.as_os_str().as_bytes(), meta.len(), changed).map(Self)
    }

    /// The array of that name.
    ///
    /// # Errors
    /// [`Error::Mlx`](crate::Error::Mlx) if there is none.
    pub fn get(&self, op: &'static str, name: &str) -> Result<Array> {
        self.0.get(op, name).map(Array)
    }
}
