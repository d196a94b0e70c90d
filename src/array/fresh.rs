//! Arrays whose bytes come from outside: memory that is written before MLX sees it.

use super::{Array, Dtype, spare, to_mlx};
use crate::error::{Error, Result};
use crate::ffi::{FreshHandle, cuda};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A fresh array in host memory, to be written by whoever holds its bytes.
pub struct HostBuffer(FreshHandle);

impl HostBuffer {
    /// Memory for arrays of these shapes, which arrays that were dropped may have had. MLX is told to keep as much when
    /// they are dropped in their turn: see [`spare`].
    ///
    /// # Errors
    /// [`Error::Value`] for a negative or overflowing shape, or a variable that is no number, [`Error::Mlx`] if memory is
    /// short.
    pub fn many<'a>(op: &'static str, shapes: impl Iterator<Item = (&'a [i32], Dtype)> + Clone) -> Result<Vec<Self>> {
        let sizes = shapes.clone().map(|(shape, dtype)| n_bytes(shape, dtype));
        let n_bytes = sizes.sum::<Result<usize>>()?;
        spare::take(op, n_bytes, || shapes.map(|(shape, dtype)| Self::new(shape, dtype)).collect())
    }

    /// Memory for an array of this shape.
    ///
    /// # Errors
    /// [`Error::Value`] for a negative or overflowing shape, [`Error::Mlx`] if memory is short.
    pub fn new(shape: &[i32], dtype: Dtype) -> Result<Self> {
        FreshHandle::new("new array", shape, to_mlx(dtype), n_bytes(shape, dtype)?).map(Self)
    }

    /// All its bytes, row-major. What is never written has any value.
    pub fn bytes(&mut self) -> &mut [MaybeUninit<u8>] {
        self.0.bytes()
    }

    /// All its bytes, zero.
    pub fn zeroed(&mut self) -> &mut [u8] {
        self.0.zeroed()
    }

    /// The array.
    pub fn finish(self) -> Array {
        Array(self.0.finish())
    }
}

/// Bytes of an array of this shape.
fn n_bytes(shape: &[i32], dtype: Dtype) -> Result<usize> {
    let size = shape.iter().try_fold(dtype.size(), |bytes, &dim| bytes.checked_mul(usize::try_from(dim).ok()?));
    size.ok_or_else(|| Error::value("new array", "a shape that fits in memory", format!("{shape:?}")))
}

/// Zeros of these shapes, computed, in CUDA device memory. MLX may hand out a freed buffer that it moved to unified memory
/// once, where copies take many times as long: such ones are returned to the system then, and others are taken.
pub(super) fn device_zeros(op: &'static str, shapes: &[(&[i32], Dtype)]) -> Result<Vec<Array>> {
    let zeros = || {
        let arrays =
            shapes.iter().map(|&(shape, dtype)| n_bytes(shape, dtype).and_then(|_| Array::zeros(shape, dtype)));
        let arrays = arrays.collect::<Result<Vec<_>>>()?;
        super::eval(op, &arrays)?;
        Ok::<_, Error>(arrays)
    };
    let arrays = zeros()?;
    let is_on_device = |array: &Array| {
        Ok::<_, Error>(array.n_bytes() == 0 || cuda::Memory::of(op, &array.0, array.n_bytes())?.is_on_device)
    };
    if arrays.iter().map(is_on_device).collect::<Result<Vec<_>>>()?.contains(&false) {
        drop(arrays);
        crate::ffi::memory::clear_cache()?;
        return zeros();
    }
    Ok(arrays)
}

/// An array of zeros in CUDA device memory, to be written by an [`Uploader`].
pub struct DeviceBuffer {
    array: Array,
    memory: DeviceMemory,
}

/// The memory of a [`DeviceBuffer`].
pub struct DeviceMemory(cuda::Memory);

impl DeviceBuffer {
    /// Zeros of these shapes, computed; None where arrays do not lie in CUDA device memory.
    ///
    /// # Errors
    /// [`Error::Mlx`] if device memory is short.
    pub fn zeros<'a>(shapes: impl Iterator<Item = (&'a [i32], Dtype)>) -> Result<Option<Vec<Self>>> {
        if !crate::ffi::on_cuda() || !cuda::is_there() {
            return Ok(None);
        }
        let arrays = device_zeros("upload", &shapes.collect::<Vec<_>>())?;
        let buffers = arrays.into_iter().map(|array| {
            let memory = DeviceMemory(cuda::Memory::of("upload", &array.0, array.n_bytes())?);
            Ok(Self { array, memory })
        });
        buffers.collect::<Result<_>>().map(Some)
    }

    /// Where uploads go.
    pub const fn memory(&self) -> &DeviceMemory {
        &self.memory
    }

    /// The array; every upload into it was [finished](Uploader::finish).
    pub fn finish(self) -> Array {
        self.array
    }
}

/// Copies host bytes into device memory, on a stream of its own: one piece is on its way while the next is filled.
///
/// It waits for what it sent before it goes, so that the memory, which lives for `'a`, outlives every copy.
pub struct Uploader<'a>(cuda::Uploader, PhantomData<&'a DeviceMemory>);

impl<'a> Uploader<'a> {
    /// Two pinned slots of `slot_bytes` each.
    ///
    /// # Errors
    /// [`Error::Mlx`] if CUDA fails.
    pub fn new(slot_bytes: usize) -> Result<Self> {
        Ok(Self(cuda::Uploader::new(slot_bytes)?, PhantomData))
    }

    /// The slot to fill next, once the device has read what it held.
    ///
    /// # Errors
    /// [`Error::Mlx`] if an earlier copy failed.
    pub fn slot(&mut self) -> Result<&mut [u8]> {
        self.0.slot()
    }

    /// Begins to copy `n_heads` runs of `valid` bytes, `from[1]` apart from byte `from[0]` of the slot on, to the front of
    /// as many equal parts of `range` in `memory`. The last part may end beyond the memory, its front must not.
    ///
    /// # Errors
    /// [`Error::Mlx`] if CUDA fails.
    ///
    /// # Panics
    /// If the runs do not lie in the slot and in the memory.
    pub fn upload(
        &mut self,
        memory: &'a DeviceMemory,
        range: &Range<usize>,
        [n_heads, valid]: [usize; 2],
        from: [usize; 2],
    ) -> Result<()> {
        self.0.upload(&memory.0, range, [n_heads, valid], from)
    }

    /// Nothing more is copied from this slot.
    ///
    /// # Errors
    /// [`Error::Mlx`] if CUDA fails.
    pub fn send(&mut self) -> Result<()> {
        self.0.send()
    }

    /// Waits for all that was sent.
    ///
    /// # Errors
    /// [`Error::Mlx`] if a copy failed.
    pub fn finish(self) -> Result<()> {
        self.0.finish()
    }
}
