//! mlx-c calls that take or give lists of arrays.

use super::array_handle::ArrayHandle;
use super::{check, check_not_forked, current_stream, error_handler, raw};
use crate::error::Result;
use std::sync::{Mutex, PoisonError};

/// Evaluating changes nodes that several handles, on several threads, may share: one thread at a time.
static EVALUATION: Mutex<()> = Mutex::new(());

/// An owned `mlx_vector_array`; freed on drop.
pub(super) struct ArrayVector(raw::mlx_vector_array);

impl ArrayVector {
    pub(super) fn new<'a>(op: &'static str, arrays: impl IntoIterator<Item = &'a ArrayHandle>) -> Result<Self> {
        error_handler::install();
        // SAFETY: mlx-c allocates an empty vector, which `vector` owns at once.
        let vector = Self(unsafe { raw::mlx_vector_array_new() });
        for array in arrays {
            // SAFETY: a live vector and a live array, whose node the vector shares.
            check(op, unsafe { raw::mlx_vector_array_append_value(vector.0, array.raw()) })?;
        }
        Ok(vector)
    }

    /// The name for mlx-c, valid while `self` lives.
    pub(super) fn raw(&self) -> raw::mlx_vector_array {
        self.0
    }

    /// The vector as an out-parameter, which mlx-c fills in place.
    pub(super) fn as_out(&mut self) -> *mut raw::mlx_vector_array {
        &raw mut self.0
    }

    /// A handle of the array at `index`.
    pub(super) fn get(&self, op: &'static str, index: usize) -> Result<ArrayHandle> {
        // SAFETY: a live vector; an index past the end is an error, not undefined.
        ArrayHandle::produced(op, |out| unsafe { raw::mlx_vector_array_get(out, self.0, index) })
    }
}

impl Drop for ArrayVector {
    fn drop(&mut self) {
        // SAFETY: `self` owns the vector and is gone after this.
        unsafe { raw::mlx_vector_array_free(self.0) };
    }
}

/// Computes the arrays and waits for them.
pub(crate) fn eval<'a>(op: &'static str, arrays: impl IntoIterator<Item = &'a ArrayHandle>) -> Result<()> {
    check_not_forked(op)?;
    let vector = ArrayVector::new(op, arrays)?;
    let _one = EVALUATION.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: a live vector of live arrays; the lock keeps other handles of these nodes from being evaluated.
    check(op, unsafe { raw::mlx_eval(vector.0) })
}

/// Starts computing the arrays.
pub(crate) fn async_eval<'a>(op: &'static str, arrays: impl IntoIterator<Item = &'a ArrayHandle>) -> Result<()> {
    check_not_forked(op)?;
    let vector = ArrayVector::new(op, arrays)?;
    let _one = EVALUATION.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: as in `eval`.
    check(op, unsafe { raw::mlx_async_eval(vector.0) })
}

/// Arrays without data that stand for the computations under way whose outcome `arrays` are.
pub(crate) fn marks<'a>(
    op: &'static str,
    arrays: impl IntoIterator<Item = &'a ArrayHandle>,
) -> Result<Vec<ArrayHandle>> {
    let (arrays, mut marks) = (ArrayVector::new(op, arrays)?, ArrayVector::new(op, [])?);
    // SAFETY: two live vectors, of which the second is filled in place.
    check(op, unsafe { raw::mlxrs_marks(marks.as_out(), arrays.0) })?;
    // SAFETY: a live vector.
    let len = unsafe { raw::mlx_vector_array_size(marks.0) };
    (0..len).map(|index| marks.get(op, index)).collect()
}

/// Joins arrays along `axis`; the dtype is the one that all of them promote to.
pub(crate) fn concatenate(arrays: &[&ArrayHandle], axis: i32) -> Result<ArrayHandle> {
    let op = "concatenate";
    let stream = current_stream(op)?;
    let vector = ArrayVector::new(op, arrays.iter().copied())?;
    // SAFETY: live vector and stream; `produced` owns the result.
    ArrayHandle::produced(op, |out| unsafe { raw::mlx_concatenate_axis(out, vector.0, axis, stream) })
}

/// Affine quantization of the last axis: packed words, scales, biases.
pub(crate) fn quantize(array: &ArrayHandle, group_size: i32, bits: i32) -> Result<[ArrayHandle; 3]> {
    let op = "quantize";
    let stream = current_stream(op)?;
    let mut vector = ArrayVector::new(op, [])?;
    let some = |value| raw::mlx_optional_int { value, has_value: true };
    let no_scale = raw::mlx_array { ctx: std::ptr::null_mut() };
    // SAFETY: live operands, a static mode name; the empty handle is allowed for `global_scale`.
    check(op, unsafe {
        let (group_size, bits) = (some(group_size), some(bits));
        raw::mlx_quantize(vector.as_out(), array.raw(), group_size, bits, c"affine".as_ptr(), no_scale, stream)
    })?;
    // MLX's affine mode gives three arrays.
    Ok([vector.get(op, 0)?, vector.get(op, 1)?, vector.get(op, 2)?])
}
