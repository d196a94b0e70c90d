//! A computation under way, to wait for without holding what it computes.

use super::Array;
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::ffi::{self, ArrayHandle};
use std::fmt;

/// The end of a computation that [`async_eval`](super::async_eval) started. Holds no buffer, so that a later update may
/// still write in place.
#[must_use]
pub struct Pending(Vec<ArrayHandle>);

impl Pending {
    /// What `arrays` still wait for.
    ///
    /// # Errors
    /// [`Error::Mlx`] if memory is short.
    pub fn of<'a>(op: &'static str, arrays: impl IntoIterator<Item = &'a Array>) -> Result<Self> {
        ffi::marks(op, arrays.into_iter().map(|array| &array.0)).map(Self)
    }

    /// Waits for all of it, on any thread.
    ///
    /// # Errors
    /// [`Error::Mlx`] if it failed and nobody was told before: MLX tells of a failure once.
    pub fn wait(self, op: &'static str) -> Result<()> {
        // All are waited for: what is left must not fail behind the caller's back.
        self.0.into_iter().map(|mark| mark.wait(op)).fold(Ok(()), Result::and)
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pending({})", self.0.len())
    }
}
