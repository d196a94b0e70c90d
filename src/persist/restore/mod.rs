//! Tensors from a file into memory, by several threads at once.

pub mod assemble;
mod device;
mod host;
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

/// An array to be made: its shape in memory, and where its bytes come from.
struct Target {
    shape: Vec<i32>,
    dtype: array::Dtype,
    layout: Layout,
}

/// Reads all tensors of `caches` into buffers as the caches want them: rows are padded to whole steps where they grow.
pub(super) fn read(
    data: &Data,
    caches: Vec<CacheState<TensorInfo>>,
    threads: Option<NonZero<usize>>,
) -> Result<Vec<CacheState<Array>>> {
    let threads = threads::number("load_prompt_cache", threads)?;
    let mut padding = data.size().saturating_add(MAX_PADDING);
    let mut targets = Vec::new();
    let mut plan = |info: TensorInfo, rows| {
        targets.push(target(data, &info, rows, &mut padding));
        Ok::<_, Error>(targets.len() - 1)
    };
    let caches = caches.into_iter().map(|cache| schema::map_arrays(cache, &mut plan)).collect::<Result<Vec<_>>>()?;
    let arrays = match device::read(data, &targets, threads)? {
        Some(arrays) => arrays,
        None => host::read(data, &targets, threads)?,
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
        return Target { shape, dtype: info.dtype, layout: Layout::plain(start, info.n_bytes() as usize) };
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
    Target { shape, dtype: info.dtype, layout }
}
