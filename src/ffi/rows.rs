//! Operations that move rows about: what batches of sequences need.

use super::array_handle::ArrayHandle;
use super::vector::ArrayVector;
use super::{check, current_stream, raw};
use crate::error::Result;

impl ArrayHandle {
    /// The slices of `axis` at `indices`.
    pub(crate) fn take(&self, indices: &Self, axis: i32) -> Result<Self> {
        let stream = current_stream("take")?;
        // SAFETY: live operands and stream; `produced` owns the result.
        Self::produced("take", |out| unsafe { raw::mlx_take_axis(out, self.raw(), indices.raw(), axis, stream) })
    }

    /// Elements of `axis` at `indices`, one index per element of the result.
    pub(crate) fn take_along(&self, indices: &Self, axis: i32) -> Result<Self> {
        let op = "take_along_axis";
        let stream = current_stream(op)?;
        // SAFETY: live operands and stream; `produced` owns the result.
        Self::produced(op, |out| unsafe { raw::mlx_take_along_axis(out, self.raw(), indices.raw(), axis, stream) })
    }

    /// The elements of `axis`, moved by `shift` places; what falls off the end comes in at the front.
    pub(crate) fn roll(&self, shift: i32, axis: i32) -> Result<Self> {
        let stream = current_stream("roll")?;
        // SAFETY: a pointer to one number, live operand and stream; `produced` owns the result.
        Self::produced("roll", |out| unsafe { raw::mlx_roll_axis(out, self.raw(), &raw const shift, 1, axis, stream) })
    }

    /// This array, which from now on is not computed without `others`.
    pub(crate) fn depends(&self, others: &[&Self]) -> Result<Self> {
        let op = "depends";
        let mut out = ArrayVector::new(op, [])?;
        let (one, others) = (ArrayVector::new(op, [self])?, ArrayVector::new(op, others.iter().copied())?);
        // SAFETY: an owned vector to be replaced, and two live ones.
        check(op, unsafe { raw::mlx_depends(out.as_out(), one.raw(), others.raw()) })?;
        out.get(op, 0)
    }

    pub(crate) fn subtract(&self, other: &Self) -> Result<Self> {
        self.binary(other, "subtract", raw::mlx_subtract)
    }

    pub(crate) fn maximum(&self, other: &Self) -> Result<Self> {
        self.binary(other, "maximum", raw::mlx_maximum)
    }

    pub(crate) fn remainder(&self, other: &Self) -> Result<Self> {
        self.binary(other, "remainder", raw::mlx_remainder)
    }
}
