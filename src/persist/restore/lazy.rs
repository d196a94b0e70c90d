//! Arrays that are read when they are computed, each as the eager load would have made it.

use super::{LOAD, Target};
use crate::array::{Array, LazyTensors};
use crate::error::Result;
use crate::persist::reader::Data;

pub(super) fn read(data: &Data, targets: &[Target]) -> Result<Vec<Array>> {
    let tensors = data.lazy_tensors(LOAD)?;
    targets.iter().map(|target| one(&tensors, target)).collect()
}

fn one(tensors: &LazyTensors, target: &Target) -> Result<Array> {
    let Target { name, shape, dtype, valid_rows, .. } = target;
    // MLX does not read tensors without elements, and need not.
    if shape.contains(&0) {
        return Array::zeros(shape, *dtype);
    }
    let whole = tensors.get(LOAD, name)?;
    let Some(valid) = *valid_rows else { return Ok(whole) };
    if valid == 0 {
        return Array::zeros(shape, *dtype);
    }
    let rows = whole.rows(0, valid)?;
    let mut padding = shape.clone();
    padding[2] -= valid as i32;
    if padding[2] == 0 {
        return Ok(rows);
    }
    Array::concatenate(&[&rows, &Array::zeros(&padding, *dtype)?], 2)
}
