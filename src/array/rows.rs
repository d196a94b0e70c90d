//! Operations that move rows about: what batches of sequences need.

use super::{Array, Dtype};
use crate::error::{Error, Result};

impl Array {
    /// The slices of `axis` at `indices`, an integer array `(n,)`. An index out of range is undefined: check it first.
    ///
    /// # Errors
    /// [`Error::Mlx`] if `indices` are no integers or there is no such axis.
    pub fn take(&self, indices: &Self, axis: i32) -> Result<Self> {
        self.0.take(&indices.0, axis).map(Self)
    }

    /// Elements `from .. to` of every axis, as `(from, to)` pairs; one pair per axis.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    pub fn slice(&self, ranges: &[(usize, usize)]) -> Result<Self> {
        let (start, stop): (Vec<_>, Vec<_>) = ranges.iter().map(|&(from, to)| (from as i32, to as i32)).unzip();
        self.0.slice(&start, &stop).map(Self)
    }

    /// This array with `update` written over elements `from .. to` of every axis, cast to this array's dtype.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the shapes do not fit.
    pub fn with_slice(&self, update: &Self, ranges: &[(usize, usize)]) -> Result<Self> {
        let (start, stop): (Vec<_>, Vec<_>) = ranges.iter().map(|&(from, to)| (from as i32, to as i32)).unzip();
        self.0.slice_update(&update.0, &start, &stop).map(Self)
    }

    /// The elements of `axis`, moved `shift` places up; what falls off the end comes in at the front.
    ///
    /// # Errors
    /// [`Error::Mlx`] if there is no such axis.
    pub fn roll(&self, shift: i32, axis: i32) -> Result<Self> {
        self.0.roll(shift, axis).map(Self)
    }

    /// Rows of `(B, H, L, D)`, those of sequence `b` moved `shifts[b]` places up; `shifts` is an int32 array `(B,)`.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the shapes do not fit.
    pub fn roll_rows(&self, shifts: &Self) -> Result<Self> {
        let len = self.dim(2);
        let rows = Self::arange(0, len)?.reshape(&[1, 1, -1, 1])?;
        let from = rows.minus(&shifts.reshape(&[-1, 1, 1, 1])?)?.remainder(&Self::scalar(len as i32))?;
        self.0.take_along(&from.0, 2).map(Self)
    }

    /// This array, which from now on is not computed without `others`.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    pub fn depends(&self, others: &[&Self]) -> Result<Self> {
        let others: Vec<_> = others.iter().map(|other| &other.0).collect();
        self.0.depends(&others).map(Self)
    }

    /// A copy whose elements lie in row-major order, nothing between them; the array itself if they do.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    pub fn contiguous(&self) -> Result<Self> {
        self.0.contiguous().map(Self)
    }

    /// Elementwise difference.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the shapes do not broadcast.
    pub fn minus(&self, other: &Self) -> Result<Self> {
        self.0.subtract(&other.0).map(Self)
    }

    /// Elementwise larger one.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the shapes do not broadcast.
    pub fn maximum(&self, other: &Self) -> Result<Self> {
        self.0.maximum(&other.0).map(Self)
    }

    /// Elementwise remainder, of the sign of the divisor.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the shapes do not broadcast.
    pub fn remainder(&self, other: &Self) -> Result<Self> {
        self.0.remainder(&other.0).map(Self)
    }

    /// The elements as host numbers, row-major, evaluated first.
    ///
    /// # Errors
    /// [`Error::Value`] for a number beyond 32 bits, [`Error::Mlx`] if evaluating fails.
    pub fn to_i32(&self) -> Result<Vec<i32>> {
        let bytes = self.astype(Dtype::I64)?.to_bytes()?;
        let narrow = |&word| {
            let number = i64::from_ne_bytes(word);
            i32::try_from(number).map_err(|_| Error::value("read array", "numbers of 32 bits", number))
        };
        bytes.as_chunks::<8>().0.iter().map(narrow).collect()
    }
}
