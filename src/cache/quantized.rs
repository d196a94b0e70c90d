//! `QuantizedKVCache`: a growing buffer whose rows are affine-quantized once, when they come.

use super::plan::Growth;
use super::standard::write;
use super::tensor::check_update;
use super::{
    Cache, Checkpoint, CheckpointKind, KvCache, KvTensor, LayerCache, MaskMode, STEP, Scheme, State, checked_fields,
    count_field, mask, nothing_yet, settle,
};
use crate::array::{Array, Dtype};
use crate::error::{Error, Result};

/// Keys and values, each as packed words, scales and biases; the first `offset` rows are valid.
#[derive(Clone, Debug)]
pub struct QuantizedKvCache {
    /// Packed `(B, H, L, D * bits / 32)` uint32, scales and biases `(B, H, L, D / group_size)`.
    pub keys: Option<[Array; 3]>,
    /// The same for the values.
    pub values: Option<[Array; 3]>,
    /// Valid rows.
    pub offset: usize,
    /// Rows by which the buffers grow; at least 1.
    pub step: usize,
    scheme: Scheme,
}

impl Default for QuantizedKvCache {
    fn default() -> Self {
        Self { keys: None, values: None, offset: 0, step: STEP, scheme: Scheme::default() }
    }
}

impl QuantizedKvCache {
    /// An empty cache.
    ///
    /// # Errors
    /// [`Error::Value`] if MLX does not know the group size or the number of bits.
    pub fn new(group_size: usize, bits: usize) -> Result<Self> {
        Ok(Self { scheme: Scheme::new("QuantizedKVCache", group_size, bits)?, ..Self::default() })
    }

    /// How the rows are quantized.
    pub const fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Assigns group size and bits; [`update`](KvCache::update) checks that the buffers fit them.
    ///
    /// # Errors
    /// [`Error::Value`] if MLX does not know them.
    pub fn set_scheme(&mut self, group_size: usize, bits: usize) -> Result<()> {
        self.scheme = Scheme::new("QuantizedKVCache", group_size, bits)?;
        Ok(())
    }
}

/// The first `to` rows of each of the three arrays.
fn rows(arrays: &[Array; 3], to: usize) -> Result<[Array; 3]> {
    Ok([arrays[0].rows(0, to)?, arrays[1].rows(0, to)?, arrays[2].rows(0, to)?])
}

fn state_of(arrays: Option<&[Array; 3]>) -> State<Array> {
    arrays.map_or(State::None, |arrays| State::List(arrays.iter().cloned().map(State::Array).collect()))
}

/// Three arrays of a checked state.
fn triple(field: State<Array>) -> Option<[Array; 3]> {
    let State::List(items) = field else { return None };
    let arrays: Vec<_> = items.into_iter().filter_map(super::array_field).collect();
    arrays.try_into().ok()
}

/// Three buffers that are being assigned.
fn packed(op: &'static str, tensor: Option<KvTensor>) -> Result<Option<[Array; 3]>> {
    match tensor {
        None => Ok(None),
        Some(KvTensor::Quantized(arrays)) if arrays.iter().all(|array| array.shape().len() == 4) => Ok(Some(arrays)),
        Some(_) => Err(Error::value(op, "packed words, scales and biases, each (B, H, L, n)", "something else")),
    }
}

impl LayerCache for QuantizedKvCache {
    fn reference_class_name(&self) -> &'static str {
        "QuantizedKVCache"
    }

    fn state(&self) -> State<Array> {
        let counts = [self.offset, self.scheme.group_size(), self.scheme.bits()].map(|count| State::Int(count as i64));
        let arrays = [state_of(self.keys.as_ref()), state_of(self.values.as_ref())];
        State::List(arrays.into_iter().chain(counts).collect())
    }

    fn set_state(&mut self, state: State<Array>) -> Result<()> {
        let mut fields = checked_fields(self.reference_class_name(), state)?.into_iter();
        let mut next = || fields.next().unwrap_or(State::None);
        let (keys, values) = (triple(next()), triple(next()));
        let (offset, group_size, bits) = (count_field(&next()), count_field(&next()), count_field(&next()));
        *self = Self { keys, values, offset, step: self.step, ..Self::new(group_size, bits)? };
        Ok(())
    }

    fn buffers(&self) -> Vec<&Array> {
        self.keys.iter().chain(&self.values).flatten().collect()
    }

    fn size(&self) -> usize {
        self.offset
    }

    fn trim(&mut self, n: usize) -> Result<usize> {
        let n = n.min(self.offset);
        self.offset -= n;
        Ok(n)
    }

    fn checkpoint(&self, _n_tokens: usize) -> Checkpoint {
        Checkpoint::at_offset(self, false)
    }

    fn rollback(&mut self, checkpoint: Checkpoint) {
        match checkpoint.0 {
            CheckpointKind::Offset(offset) => {
                self.offset = offset;
                settle(self.keys.iter_mut().chain(&mut self.values).flatten());
            }
            CheckpointKind::Whole(cache) => {
                if let Cache::Quantized(cache) = *cache {
                    *self = cache;
                }
            }
        }
    }

    fn copy(&self) -> Cache {
        Cache::Quantized(self.clone())
    }
}

impl KvCache for QuantizedKvCache {
    fn offset(&self) -> usize {
        self.offset
    }

    fn update(&mut self, keys: &Array, values: &Array) -> Result<(KvTensor, KvTensor)> {
        let op = "QuantizedKVCache.update_and_fetch";
        let packed = [self.keys.as_ref(), self.values.as_ref()].map(|arrays| arrays.map(|arrays| &arrays[0]));
        let update = check_update(op, [keys, values], packed, (self.offset, self.offset), true)?;
        self.scheme.check(op, keys, values)?;
        let growth = Growth::plan(self.offset, update.len, update.n_tokens, self.step);
        let end = self.offset + update.n_tokens;
        let append = |buffers: Option<&[Array; 3]>, new: &Array| -> Result<[Array; 3]> {
            let new = new.quantize(self.scheme.group_size(), self.scheme.bits())?;
            let grown = |i: usize| {
                let buffer = buffers.map(|arrays| &arrays[i]);
                if let Some(buffer) = buffer
                    && buffer.shape()[3] != new[i].shape()[3]
                {
                    let expected = format!("a head size that fits the cache's {:?}", buffer.shape());
                    return Err(Error::value(op, expected, format!("{:?}", new[i].shape())));
                }
                // As mlx-lm has it: scales start in the type of the first keys, for the values too, and keep it.
                let first = if i == 0 { Dtype::U32 } else { keys.dtype() };
                write(buffer, growth, &new[i], self.offset, buffer.map_or(first, Array::dtype))
            };
            Ok([grown(0)?, grown(1)?, grown(2)?])
        };
        let (keys, values) = (append(self.keys.as_ref(), keys)?, append(self.values.as_ref(), values)?);
        let seen = (KvTensor::Quantized(rows(&keys, end)?), KvTensor::Quantized(rows(&values, end)?));
        (self.keys, self.values, self.offset) = (Some(keys), Some(values), end);
        Ok(seen)
    }

    fn keys(&self) -> Option<KvTensor> {
        self.keys.clone().map(KvTensor::Quantized)
    }

    fn values(&self) -> Option<KvTensor> {
        self.values.clone().map(KvTensor::Quantized)
    }

    fn set_keys(&mut self, keys: Option<KvTensor>) -> Result<()> {
        self.keys = packed("keys", keys)?;
        Ok(())
    }

    fn set_values(&mut self, values: Option<KvTensor>) -> Result<()> {
        self.values = packed("values", values)?;
        Ok(())
    }

    fn keys_and_values(&self) -> Result<(KvTensor, KvTensor)> {
        match (&self.keys, &self.values) {
            (Some(keys), Some(values)) => {
                let (keys, values) = (rows(keys, self.offset)?, rows(values, self.offset)?);
                Ok((KvTensor::Quantized(keys), KvTensor::Quantized(values)))
            }
            _ => Err(nothing_yet()),
        }
    }

    fn set_offset(&mut self, offset: usize) -> Result<()> {
        self.offset = offset;
        Ok(())
    }

    fn make_mask(&self, n_tokens: usize, window: Option<usize>, return_array: bool) -> Result<MaskMode> {
        mask::growing(n_tokens, self.offset, window, return_array)
    }
}
