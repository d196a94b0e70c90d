//! Bytes of arrays on the host, for files: in by filling fresh memory, out without a copy where the layout allows.

use super::{Array, Dtype, HostBuffer};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::ffi;

impl Array {
    /// A new array whose row-major bytes `fill` writes. They are zero before.
    ///
    /// # Errors
    /// [`Error::Value`] for a negative or overflowing shape, [`Error::Mlx`] if memory is short, or `fill`'s own.
    pub fn from_host(shape: &[i32], dtype: Dtype, fill: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<Self> {
        let mut buffer = HostBuffer::new(shape, dtype)?;
        fill(buffer.zeroed())?;
        Ok(buffer.finish())
    }

    /// Hands `sink` the row-major bytes of an array, piece by piece and in order, evaluating it first. Pieces are the
    /// longest runs that lie together in memory, so a slice of a buffer is not copied.
    ///
    /// # Errors
    /// [`Error::Mlx`] if evaluating fails, or the first error of `sink`.
    pub fn for_each_run(&self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let op = "read array";
        super::eval(op, [self])?;
        // On CUDA a host pointer moves its whole buffer to unified memory: read a copy, leave the buffer on the device.
        if ffi::on_cuda() {
            let copy = self.copied()?;
            super::eval(op, [&copy])?;
            return copy.runs(op, sink);
        }
        if self.inner_run().is_none() {
            let copy = Self(self.0.contiguous()?);
            super::eval(op, [&copy])?;
            return copy.runs(op, sink);
        }
        self.runs(op, sink)
    }

    /// The same elements in memory of their own, row-major. Lazy.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    pub fn copied(&self) -> Result<Self> {
        Ok(Self(self.0.stop_gradient()?.contiguous()?))
    }

    /// The row-major bytes of an array, evaluated and copied.
    ///
    /// # Errors
    /// [`Error::Mlx`] if evaluating fails.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(self.n_bytes());
        self.for_each_run(&mut |run| {
            bytes.extend_from_slice(run);
            Ok(())
        })?;
        Ok(bytes)
    }

    /// How many trailing axes lie together, and the elements in one such run; None if not even the last axis does.
    fn inner_run(&self) -> Option<(usize, usize)> {
        let (shape, strides) = (self.shape(), self.0.strides());
        if strides.iter().any(|&stride| isize::try_from(stride).is_err()) {
            return None; // backwards
        }
        let mut run = 1;
        let mut axis = shape.len();
        while axis > 0 && (strides[axis - 1] == run || shape[axis - 1] == 1) {
            axis -= 1;
            run *= shape[axis] as usize;
        }
        (axis < shape.len() || shape.is_empty()).then_some((axis, run))
    }

    fn runs(&self, op: &'static str, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let item = self.dtype().size();
        let (axis, run) = self.inner_run().unwrap_or((self.shape().len(), 1));
        if self.n_bytes() == 0 {
            return Ok(());
        }
        self.0.with_host_data(op, |data| {
            let outer: Vec<_> = self.shape()[..axis].iter().map(|&dim| dim as usize).zip(self.0.strides()).collect();
            let mut index = vec![0; axis];
            loop {
                let first: usize = index.iter().zip(&outer).map(|(i, (_, stride))| i * **stride).sum();
                sink(data.bytes(first * item, run * item))?;
                // The next index in row-major order; the last axis of `outer` turns fastest.
                let Some(turn) = (0..axis).rev().find(|&a| index[a] + 1 < outer[a].0) else { return Ok(()) };
                index[turn] += 1;
                index[turn + 1..].fill(0);
            }
        })?
    }
}
