//! `QuantizedKVCache`: a growing buffer whose rows are affine-quantized once, when they come.

use super::plan::Growth;
use super::standard::write;
use super::tensor::check_update;
use super::{
    Cache, Checkpoint, KvCache, KvTensor, LayerCache, MaskMode, STEP, Scheme, State, checked_fields, count_field, mask,
    nothing_yet, settle,
};
use crate::array::{Array, Dtype};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;

/// Keys and values, each as packed words, scales and biases; the first `offset` rows are valid.
#[derive(Clone, Debug)]
pub struct QuantizedKvCache {
    /// Packed `(B, H, L, D * bits / 32)` uint32, scales and biases `(B, H, L, D / group_size)`.
    pub(super) keys: Option<KvTensor>,
    /// The same for the values.
    pub(super) values: Option<KvTensor>,
    /// Valid rows.
    pub offset: usize,
    /// Rows by which the buffers grow; at least 1.
    pub step: usize,
    /// Rows that a prompt under way will bring in all; 0 if nothing is known.
    pub(super) expected: usize,
    scheme: Scheme,
}

impl Default for QuantizedKvCache {
    fn default() -> Self {
        Self { keys: None, values: None, offset: 0, step: STEP, expected: 0, scheme: Scheme::default() }
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

impl LayerCache for QuantizedKvCache {
    fn reference_class_name(&self) -> &'static str {
        "QuantizedKVCache"
    }

    fn state(&self) -> State<Array> {
        let counts = [self.offset, self.scheme.group_size(), self.scheme.bits()].map(|count| State::Int(count as i64));
        let arrays = [&self.keys, &self.values].map(|rows| KvTensor::to_state(rows.as_ref()));
        State::List(arrays.into_iter().chain(counts).collect())
    }

    fn set_state(&mut self, state: State<Array>) -> Result<()> {
        let mut fields = checked_fields(self.reference_class_name(), state)?.into_iter();
        let mut next = || fields.next().unwrap_or(State::None);
        let (keys, values) = (KvTensor::from_state(next()), KvTensor::from_state(next()));
        let (offset, group_size, bits) = (count_field(&next()), count_field(&next()), count_field(&next()));
        *self = Self { keys, values, offset, step: self.step, ..Self::new(group_size, bits)? };
        Ok(())
    }

    fn buffers(&self) -> Vec<&Array> {
        self.keys.iter().chain(&self.values).flat_map(KvTensor::arrays).collect()
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
        let whole = |cache| if let Cache::Quantized(cache) = cache { Some(cache) } else { None };
        if let Some(offset) = checkpoint.put_back(self, whole) {
            self.offset = offset;
            settle(self.keys.iter_mut().chain(&mut self.values).flat_map(KvTensor::arrays_mut));
        }
    }

    fn copy(&self) -> Cache {
        Cache::Quantized(Self { expected: 0, ..self.clone() })
    }
}

impl KvCache for QuantizedKvCache {
    fn offset(&self) -> usize {
        self.offset
    }

    fn update(&mut self, keys: &Array, values: &Array) -> Result<(KvTensor, KvTensor)> {
        let op = "QuantizedKVCache.update_and_fetch";
        let words = [&self.keys, &self.values].map(|rows| rows.as_ref().map(|rows| &rows.arrays()[0]));
        let update = check_update(op, [keys, values], words, (self.offset, self.offset), true)?;
        self.scheme.check(op, keys, values)?;
        let growth = Growth::plan(self.offset, update.len, update.n_tokens, self.step);
        let growth = growth.map(|growth| growth.toward(self.expected, self.step));
        let end = self.offset + update.n_tokens;
        // As mlx-lm has it: scales start in the type of the first keys, for the values too, and keep it.
        let first = [Dtype::U32, keys.dtype(), keys.dtype()];
        let append = |buffer: Option<&KvTensor>, new: &Array| -> Result<KvTensor> {
            let new = self.scheme.quantize(new)?;
            buffer.map_or(Ok(()), |buffer| buffer.check_widths(op, &new))?;
            let mut first = first.into_iter();
            match buffer {
                Some(buffer) => {
                    buffer.try_zip(&new, |buffer, new| write(Some(buffer), growth, new, self.offset, buffer.dtype()))
                }
                None => new.try_map(|new| write(None, growth, new, self.offset, first.next().unwrap_or(new.dtype()))),
            }
        };
        let (keys, values) = (append(self.keys.as_ref(), keys)?, append(self.values.as_ref(), values)?);
        let seen = (keys.rows(0, end)?, values.rows(0, end)?);
        (self.keys, self.values, self.offset) = (Some(keys), Some(values), end);
        Ok(seen)
    }

    fn keys(&self) -> Option<KvTensor> {
        self.keys.clone()
    }

    fn values(&self) -> Option<KvTensor> {
        self.values.clone()
    }

    fn set_keys(&mut self, keys: Option<KvTensor>) -> Result<()> {
        self.keys = KvTensor::assigned("keys", keys, true)?;
        Ok(())
    }

    fn set_values(&mut self, values: Option<KvTensor>) -> Result<()> {
        self.values = KvTensor::assigned("values", values, true)?;
        Ok(())
    }

    fn keys_and_values(&self) -> Result<(KvTensor, KvTensor)> {
        let (Some(keys), Some(values)) = (&self.keys, &self.values) else { return Err(nothing_yet()) };
        Ok((keys.rows(0, self.offset)?, values.rows(0, self.offset)?))
    }

    fn expect_tokens(&mut self, n_tokens: usize) {
        self.expected = if n_tokens > 0 { self.offset + n_tokens } else { 0 };
    }

    fn set_offset(&mut self, offset: usize) -> Result<()> {
        self.offset = offset;
        Ok(())
    }

    fn make_mask(&self, n_tokens: usize, window: Option<usize>, return_array: bool) -> Result<MaskMode> {
        mask::growing(n_tokens, self.offset, window, return_array)
    }
}
