//! Batches out of caches of one sequence each.

use super::buffers::{Buffers, check_sizes};
use super::{BatchKvCache, BatchRotatingKvCache};
use crate::array::Array;
use crate::cache::plan::{BatchRing, Sequences};
use crate::cache::{Cache, KvCache, KvTensor, LayerCache, Scheme};
use crate::error::{Error, Result};

const OP: &str = "merge";

/// The rows of one sequence, none if its cache is empty, and its tokens.
struct Part {
    rows: Option<[KvTensor; 2]>,
    n_tokens: usize,
}

/// A batch of the sequences of `caches`, of the class that fits theirs. The shorter ones get padding on the left.
///
/// # Errors
/// [`Error::Value`] if there are none, if one holds several sequences, or if sizes differ; [`Error::Type`] for a class
/// that has no batch, or another one than the first cache's.
pub fn merge(caches: &[&Cache]) -> Result<Cache> {
    let Some(first) = caches.first() else { return Err(Error::value(OP, "at least one cache", "none")) };
    let class = first.as_dyn().reference_class_name();
    if let Some(other) = caches.iter().find(|cache| cache.as_dyn().reference_class_name() != class) {
        return Err(Error::type_(
            OP,
            format!("caches of the class of the first, {class}"),
            other.as_dyn().reference_class_name(),
        ));
    }
    match first {
        Cache::Standard(_) => merge_growing(caches, None),
        Cache::Quantized(cache) => merge_growing(caches, Some(cache.scheme())),
        Cache::Rotating(_) if class == "RotatingKVCache" => merge_rings(caches),
        _ => Err(Error::type_(OP, "KVCache, RotatingKVCache or QuantizedKVCache", class)),
    }
}

fn merge_growing(caches: &[&Cache], scheme: Option<Scheme>) -> Result<Cache> {
    let parts = caches.iter().map(|cache| {
        if let Cache::Quantized(cache) = cache
            && Some(cache.scheme()) != scheme
        {
            return Err(Error::value(OP, format!("rows quantized by {scheme:?}"), format!("{:?}", cache.scheme())));
        }
        let cache = cache.as_kv()?;
        let rows = if cache.is_empty() { None } else { Some(cache.keys_and_values()?.into()) };
        Ok(Part { rows, n_tokens: cache.offset() })
    });
    let parts = parts.collect::<Result<Vec<_>>>()?;
    let mut batch = BatchKvCache::unset(scheme);
    let (len, sequences) = columns(&parts);
    if len > 0 {
        batch.buffers = merge_rows(&parts, len, scheme)?;
    }
    (batch.sequences, batch.index) = (sequences, len);
    Ok(Cache::Batch(batch))
}

fn merge_rings(caches: &[&Cache]) -> Result<Cache> {
    let mut max_sizes = Vec::new();
    let mut offsets = Vec::new();
    let parts = caches.iter().map(|cache| {
        let Cache::Rotating(cache) = cache else { return Err(Error::type_(OP, "a RotatingKVCache", "another class")) };
        if cache.ring().keep > 0 {
            return Err(Error::value(OP, "rings with keep=0: a batch keeps no tokens", cache.ring().keep));
        }
        max_sizes.push(cache.ring().max_size);
        offsets.push(cache.offset() as i32);
        let n_tokens = cache.size();
        let rows = if cache.is_empty() { None } else { Some(cache.newest(n_tokens)?) };
        Ok(Part { rows, n_tokens })
    });
    let parts = parts.collect::<Result<Vec<_>>>()?;
    let max_size = max_sizes[0];
    if let Some(other) = max_sizes.iter().find(|&&size| size != max_size) {
        return Err(Error::value(OP, format!("rings of one max_size, {max_size}"), other));
    }
    let mut batch = BatchRotatingKvCache::new(max_size, Vec::new())?;
    let (len, sequences) = columns(&parts);
    batch.sequences = Sequences { offsets, ..sequences };
    if len > 0 {
        batch.buffers = merge_rows(&parts, len, None)?;
        batch.ring = BatchRing { offset: len, index: len, len: Some(len), ..batch.ring };
    }
    Ok(Cache::BatchRotating(batch))
}

/// Columns of the batch, and its sequences.
fn columns(parts: &[Part]) -> (usize, Sequences) {
    let len = parts.iter().map(|part| part.n_tokens).max().unwrap_or(0);
    let left_padding = parts.iter().map(|part| (len - part.n_tokens) as i32).collect();
    (len, Sequences::new(left_padding).advanced(len as i32))
}

/// The rows of all parts behind their padding, which is zeros.
fn merge_rows(parts: &[Part], len: usize, scheme: Option<Scheme>) -> Result<Buffers> {
    let Some(first) = parts.iter().find_map(|part| part.rows.as_ref()) else { return Ok(Buffers::new(scheme)) };
    for rows in parts.iter().filter_map(|part| part.rows.as_ref()) {
        if let Some(rows) = rows.iter().find(|rows| rows.arrays()[0].dim(0) != 1) {
            return Err(Error::value(OP, "caches of one sequence each", format!("{:?}", rows.arrays())));
        }
        check_sizes(OP, &first[0], &rows[0])?;
        check_sizes(OP, &first[1], &rows[1])?;
    }
    let merged = |which: usize| -> Result<KvTensor> {
        // As mlx-lm has it, values that are not quantized come in the type of the first keys.
        let key_dtype = if scheme.is_some() { None } else { Some(first[0].arrays()[0].dtype()) };
        let mut merged = first[which].try_map(|like| {
            let shape = like.shape();
            Array::zeros(&[parts.len() as i32, shape[1], len as i32, shape[3]], key_dtype.unwrap_or(like.dtype()))
        })?;
        for (at, part) in parts.iter().enumerate() {
            let Some(rows) = &part.rows else { continue };
            let from = len - part.n_tokens;
            merged = merged.try_zip(&rows[which], |merged, rows| {
                let ranges = [(at, at + 1), (0, rows.dim(1)), (from, len), (0, rows.dim(3))];
                merged.with_slice(rows, &ranges)
            })?;
        }
        Ok(merged)
    };
    Ok(Buffers { keys: Some(merged(0)?), values: Some(merged(1)?), scheme })
}
