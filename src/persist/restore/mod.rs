//! Tensors from a file into memory, by several threads at once.

pub mod assemble;
mod device;
mod host;
mod lazy;
mod plan;

use super::header::TensorInfo;
use super::layout::Layout;
use super::reader::Data;
use super::threads;
use crate::array::{self, Array};
use crate::cache::schema::{self, Rows};
use crate::cache::{CacheState, STEP, plan as cache_plan};
use crate::error::{Error, Result};
use std::num::NonZero;

/// Bytes of padding that a load may add beyond the size of the file; a buffer that would need more grows later.
const MAX_PADDING: u64 = 1 << 30;

/// The operation that errors name.
const LOAD: &str = "load_prompt_cache";

/// An array to be made: its shape in memory, and where its bytes come from.
struct Target {
    /// The tensor's name.
    name: String,
    shape: Vec<i32>,
    dtype: array::Dtype,
    layout: Layout,
    /// Rows of axis 2 that are read, the first ones, if zeros follow; None for a tensor that is read as it is.
    valid_rows: Option<usize>,
}

/// When tensors are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Before the load returns, by so many threads. None: the environment variable `MLXRS_PY_THREADS`, else the cores, at
    /// most 8.
    Now(Option<NonZero<usize>>),
    /// Each when it is first computed, by MLX.
    AtFirstUse,
}

/// Reads all tensors of `caches` into buffers as the caches want them: rows are padded to whole steps where they grow.
pub(super) fn read(data: &Data, caches: Vec<CacheState<TensorInfo>>, when: When) -> Result<Vec<CacheState<Array>>> {
    let mut padding = data.size().saturating_add(MAX_PADDING);
    let mut targets = Vec::new();
    let mut plan = |info: TensorInfo, rows| {
        targets.push(target(data, &info, rows, &mut padding));
        Ok::<_, Error>(targets.len() - 1)
    };
    let caches = caches.into_iter().map(|cache| schema::map_arrays(cache, &mut plan)).collect::<Result<Vec<_>>>()?;
    let arrays = match when {
        When::Now(threads) => {
            let threads = threads::number(LOAD, threads)?;
            match device::read(data, &targets, threads)? {
                Some(arrays) => arrays,
                None => host::read(data, &targets, threads)?,
            }
        }
        When::AtFirstUse => lazy::read(data, &targets)?,
    };
    data.check_unchanged()?;
    let mut arrays: Vec<_> = arrays.into_iter().map(Some).collect();
    let mut place = |at: usize| arrays[at].take().ok_or_else(|| Error::value("load", "one place per array", at));
    let filled = caches
        .into_iter()
        .map(|cache: CacheState<usize>| Ok(CacheState { class: cache.class, state: cache.state.try_map(&mut place)? }));
    filled.collect()
}

/// Of a buffer that its class pads, only the valid rows are read; zeros follow up to a whole step, as long as all of
/// them together stay within `padding` bytes.
fn target(data: &Data, info: &TensorInfo, rows: Option<Rows>, padding: &mut u64) -> Target {
    let mut shape: Vec<i32> = info.shape.iter().map(|&dim| dim as i32).collect();
    let start = data.start() + info.start;
    let Some(rows) = rows.filter(|rows| rows.padded) else {
        let layout = Layout::plain(start, info.n_bytes() as usize);
        return Target { name: info.name.clone(), shape, dtype: info.dtype, layout, valid_rows: None };
    };
    let row = info.shape[3] * info.dtype.size();
    let n_heads = info.shape[0] * info.shape[1];
    let zero_rows = cache_plan::round_up(rows.valid, STEP) - rows.valid;
    let n_zeros = [n_heads, row].iter().try_fold(zero_rows, |n, &dim| n.checked_mul(dim)).map(|n| n as u64);
    let padded = match n_zeros.and_then(|n| padding.checked_sub(n)) {
        Some(left) => {
            *padding = left;
            rows.valid + zero_rows
        }
        None => rows.valid,
    };
    shape[2] = padded as i32;
    let (in_file, valid, in_memory) = (info.shape[2] * row, rows.valid * row, padded * row);
    let layout = if in_file == in_memory && in_file == valid {
        Layout::plain(start, n_heads * in_file)
    } else {
        Layout { start, n_heads, in_file, valid, in_memory }
    };
    Target { name: info.name.clone(), shape, dtype: info.dtype, layout, valid_rows: Some(rows.valid) }
}
