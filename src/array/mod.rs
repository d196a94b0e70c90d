//! L1: the safe face of one MLX array, with the dozen operations that caches need.

mod bytes;
mod dtype;
mod fresh;
mod host;
mod lazy;
pub mod memory;
mod pending;
mod rows;
mod spare;

pub use bytes::{Bytes, Downloader};
pub use dtype::Dtype;
pub use fresh::{DeviceBuffer, DeviceMemory, HostBuffer, Uploader};
pub use lazy::LazyTensors;
pub use memory::{active_memory, peak_memory, reset_peak_memory};
pub use pending::Pending;

#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::ffi::{self, ArrayHandle, mlx_dtype, mlx_dtype_};
use std::fmt;

/// A lazy, immutable array on MLX's graph. Cloning shares the data.
///
/// Operations are recorded on this thread's default stream and computed by [`eval`] or [`async_eval`], which must run
/// on the thread that owns that stream.
#[derive(Clone)]
pub struct Array(pub(crate) ArrayHandle);

impl Array {
    /// Zeros.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX refuses the shape.
    pub fn zeros(shape: &[i32], dtype: Dtype) -> Result<Self> {
        ArrayHandle::zeros(shape, to_mlx(dtype)).map(Self)
    }

    /// The integers `start .. stop`, below 2³¹, as int32 of shape `(stop - start,)`.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    pub fn arange(start: usize, stop: usize) -> Result<Self> {
        ArrayHandle::arange(f64::from(start as u32), f64::from(stop as u32)).map(Self)
    }

    /// An int32 of shape `()`.
    pub fn scalar(value: i32) -> Self {
        Self(ArrayHandle::scalar_i32(value))
    }

    /// A copy of host numbers, as int32 of shape `(values.len(),)`.
    ///
    /// # Errors
    /// [`Error::Mlx`] if memory is short.
    pub fn from_i32(values: &[i32]) -> Result<Self> {
        Self::from_host(&[values.len() as i32], Dtype::I32, |bytes| {
            for (chunk, value) in bytes.chunks_exact_mut(4).zip(values) {
                chunk.copy_from_slice(&value.to_ne_bytes());
            }
            Ok(())
        })
    }

    /// Length of every axis.
    pub fn shape(&self) -> &[i32] {
        self.0.shape()
    }

    /// Length of `axis`, which must exist.
    pub fn dim(&self, axis: usize) -> usize {
        self.shape()[axis] as usize
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        from_mlx(self.0.dtype())
    }

    /// True when computed, or about to be: nothing is left to do on this thread.
    pub fn is_scheduled(&self) -> bool {
        self.0.is_scheduled()
    }

    /// This array if it [is scheduled](Self::is_scheduled); else what its chain of updates began with, if that is and
    /// differs in its number of rows only: whoever assigns a buffer may have made it from anything.
    #[must_use]
    pub fn before_unscheduled_updates(&self) -> Self {
        let differs_in_rows_only = |other: &Self| {
            let (ours, theirs) = (self.shape(), other.shape());
            ours.len() == theirs.len() && ours.iter().zip(theirs).enumerate().all(|(axis, (a, b))| axis == 2 || a == b)
        };
        self.0.scheduled_ancestor().map(Self).filter(differs_in_rows_only).unwrap_or_else(|| self.clone())
    }

    /// Length of `axis`, or 0 if there is none.
    pub fn dim_or(&self, axis: usize) -> usize {
        self.shape().get(axis).map_or(0, |&dim| dim as usize)
    }

    /// Bytes that the elements take, wherever they lie.
    pub fn n_bytes(&self) -> usize {
        self.shape().iter().map(|&dim| dim as usize).product::<usize>() * self.dtype().size()
    }

    /// True if both are the same node of the graph.
    pub fn is_same(&self, other: &Self) -> bool {
        self.0.same_node(&other.0)
    }

    /// True when the data can be read without computing.
    pub fn is_available(&self) -> bool {
        self.0.is_available()
    }

    /// Rows `from .. to` of axis 2 of a `(B, H, L, D)` array; the array itself if that is all of them.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    pub fn rows(&self, from: usize, to: usize) -> Result<Self> {
        let shape = self.shape();
        if from == 0 && to == shape[2] as usize {
            return Ok(self.clone());
        }
        self.0.slice(&[0, 0, from as i32, 0], &[shape[0], shape[1], to as i32, shape[3]]).map(Self)
    }

    /// This array with `update` written over rows `from ..` of axis 2, cast to this array's dtype. MLX writes in
    /// place when nobody else holds this array.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the shapes do not fit.
    pub fn with_rows(&self, update: &Self, from: usize) -> Result<Self> {
        let shape = self.shape();
        let to = from + update.dim(2);
        self.0.slice_update(&update.0, &[0, 0, from as i32, 0], &[shape[0], shape[1], to as i32, shape[3]]).map(Self)
    }

    /// Elements `from .. to` of axis 0.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    pub fn take_first_axis(&self, from: usize, to: usize) -> Result<Self> {
        let mut start = vec![0; self.shape().len()];
        let mut stop = self.shape().to_vec();
        (start[0], stop[0]) = (from as i32, to as i32);
        self.0.slice(&start, &stop).map(Self)
    }

    /// Element `at` of axis 1, which stays with length 1.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    pub fn slice_axis_1(&self, at: usize) -> Result<Self> {
        let mut start = vec![0; self.shape().len()];
        let mut stop = self.shape().to_vec();
        (start[1], stop[1]) = (at as i32, at as i32 + 1);
        self.0.slice(&start, &stop).map(Self)
    }

    /// Joins arrays along `axis`; the dtype is what all of them promote to.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the shapes do not fit.
    pub fn concatenate(arrays: &[&Self], axis: i32) -> Result<Self> {
        let handles: Vec<_> = arrays.iter().map(|array| &array.0).collect();
        ffi::concatenate(&handles, axis).map(Self)
    }

    /// The same elements as another type.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    pub fn astype(&self, dtype: Dtype) -> Result<Self> {
        self.0.astype(to_mlx(dtype)).map(Self)
    }

    /// The same elements in another shape; −1 stands for what is left.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the sizes differ.
    pub fn reshape(&self, shape: &[i32]) -> Result<Self> {
        self.0.reshape(shape).map(Self)
    }

    /// Affine quantization of the last axis: packed uint32 words, scales and biases.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX does not support the sizes.
    pub fn quantize(&self, group_size: usize, bits: usize) -> Result<[Self; 3]> {
        Ok(ffi::quantize(&self.0, group_size as i32, bits as i32)?.map(Self))
    }

    /// Elementwise `self <= other`.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the shapes do not broadcast.
    pub fn le(&self, other: &Self) -> Result<Self> {
        self.0.less_equal(&other.0).map(Self)
    }

    /// Elementwise `self < other`.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the shapes do not broadcast.
    pub fn lt(&self, other: &Self) -> Result<Self> {
        self.0.less(&other.0).map(Self)
    }

    /// Elementwise `self and other`.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the shapes do not broadcast.
    pub fn and(&self, other: &Self) -> Result<Self> {
        self.0.logical_and(&other.0).map(Self)
    }

    /// Elementwise `self or other`.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the shapes do not broadcast.
    pub fn or(&self, other: &Self) -> Result<Self> {
        self.0.logical_or(&other.0).map(Self)
    }

    /// Elementwise sum.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the shapes do not broadcast.
    pub fn plus(&self, other: &Self) -> Result<Self> {
        self.0.add(&other.0).map(Self)
    }
}

impl fmt::Debug for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Array{:?} {}", self.shape(), self.dtype().safetensors_name())
    }
}

/// Computes `arrays` on the calling thread's streams and waits for them.
///
/// # Errors
/// [`Error::Mlx`] if a computation fails, if the thread does not own the stream of one, or in a forked child.
pub fn eval<'a>(op: &'static str, arrays: impl IntoIterator<Item = &'a Array>) -> Result<()> {
    ffi::eval(op, arrays.into_iter().map(|array| &array.0))
}

/// Starts computing `arrays`.
///
/// # Errors
/// As [`eval`].
pub fn async_eval<'a>(op: &'static str, arrays: impl IntoIterator<Item = &'a Array>) -> Result<()> {
    ffi::async_eval(op, arrays.into_iter().map(|array| &array.0))
}

/// Both directions of one table, since MLX counts its types in another order.
const DTYPES: [(Dtype, mlx_dtype); 14] = [
    (Dtype::Bool, mlx_dtype_::MLX_BOOL),
    (Dtype::U8, mlx_dtype_::MLX_UINT8),
    (Dtype::U16, mlx_dtype_::MLX_UINT16),
    (Dtype::U32, mlx_dtype_::MLX_UINT32),
    (Dtype::U64, mlx_dtype_::MLX_UINT64),
    (Dtype::I8, mlx_dtype_::MLX_INT8),
    (Dtype::I16, mlx_dtype_::MLX_INT16),
    (Dtype::I32, mlx_dtype_::MLX_INT32),
    (Dtype::I64, mlx_dtype_::MLX_INT64),
    (Dtype::F16, mlx_dtype_::MLX_FLOAT16),
    (Dtype::Bf16, mlx_dtype_::MLX_BFLOAT16),
    (Dtype::F32, mlx_dtype_::MLX_FLOAT32),
    (Dtype::F64, mlx_dtype_::MLX_FLOAT64),
    (Dtype::C64, mlx_dtype_::MLX_COMPLEX64),
];

fn to_mlx(dtype: Dtype) -> mlx_dtype {
    DTYPES[dtype as usize].1
}

fn from_mlx(dtype: mlx_dtype) -> Dtype {
    DTYPES.iter().find(|row| row.1 == dtype).map_or(Dtype::U8, |row| row.0)
}
