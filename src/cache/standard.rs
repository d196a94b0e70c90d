//! `KVCache`: a buffer that grows by whole steps.

use super::plan::Growth;
use super::tensor::{check_update, zero_rows};
use super::{
    Cache, Checkpoint, KvCache, KvTensor, LayerCache, MaskMode, QuantizedKvCache, STEP, State, array_field,
    array_state, checked_fields, count_field, dense, mask, nothing_yet, settle,
};
use crate::array::{Array, Dtype};
use crate::error::Result;

/// Keys and values in padded buffers `(B, H, L, D)`, of which the first `offset` rows are valid.
#[derive(Clone, Debug)]
pub struct StandardKvCache {
    /// Buffer of the keys; None before the first update.
    pub keys: Option<Array>,
    /// Buffer of the values.
    pub values: Option<Array>,
    /// Valid rows.
    pub offset: usize,
    /// Rows by which the buffers grow; at least 1.
    pub step: usize,
    /// Rows that a prompt under way will bring in all; 0 if nothing is known.
    pub(super) expected: usize,
}

impl Default for StandardKvCache {
    fn default() -> Self {
        Self { keys: None, values: None, offset: 0, step: STEP, expected: 0 }
    }
}

impl StandardKvCache {
    /// The same rows, affine-quantized: the whole buffer, so that its length stays.
    ///
    /// # Errors
    /// [`Error::Value`] if MLX does not support the sizes.
    pub fn to_quantized(&self, group_size: usize, bits: usize) -> Result<QuantizedKvCache> {
        let mut quantized = QuantizedKvCache::new(group_size, bits)?;
        if let (Some(keys), Some(values)) = (&self.keys, &self.values) {
            quantized.scheme().check("to_quantized", keys, values)?;
            quantized.keys = Some(quantized.scheme().quantize(keys)?);
            quantized.values = Some(quantized.scheme().quantize(values)?);
        }
        quantized.offset = self.offset;
        Ok(quantized)
    }
}

/// `buffer`, grown as planned by zeros of type `dtype`, with `new` written at row `at`.
pub(super) fn write(
    buffer: Option<&Array>,
    growth: Option<Growth>,
    new: &Array,
    at: usize,
    dtype: Dtype,
) -> Result<Array> {
    match (buffer, growth) {
        (Some(buffer), None) => buffer.with_rows(new, at),
        (Some(buffer), Some(Growth { kept, added })) => {
            let old = buffer.rows(0, kept)?;
            let spare = added - new.dim(2);
            if at == kept && new.dtype() == dtype {
                // The same in one step: no zeros are made and copied where the new rows go.
                return match spare {
                    0 => Array::concatenate(&[&old, new], 2),
                    _ => Array::concatenate(&[&old, new, &zero_rows(new, spare, dtype)?], 2),
                };
            }
            Array::concatenate(&[&old, &zero_rows(new, added, dtype)?], 2)?.with_rows(new, at)
        }
        (None, growth) => zero_rows(new, growth.map_or(0, |growth| growth.added), dtype)?.with_rows(new, at),
    }
}

impl LayerCache for StandardKvCache {
    fn reference_class_name(&self) -> &'static str {
        "KVCache"
    }

    fn state(&self) -> State<Array> {
        let offset = State::Int(self.offset as i64);
        State::List(vec![array_state(self.keys.as_ref()), array_state(self.values.as_ref()), offset])
    }

    fn set_state(&mut self, state: State<Array>) -> Result<()> {
        let mut fields = checked_fields(self.reference_class_name(), state)?.into_iter();
        let mut next = || fields.next().unwrap_or(State::None);
        (self.keys, self.values, self.offset) = (array_field(next()), array_field(next()), count_field(&next()));
        Ok(())
    }

    fn buffers(&self) -> Vec<&Array> {
        self.keys.iter().chain(&self.values).collect()
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
        let whole = |cache| if let Cache::Standard(cache) = cache { Some(cache) } else { None };
        if let Some(offset) = checkpoint.put_back(self, whole) {
            self.offset = offset;
            settle(self.keys.iter_mut().chain(&mut self.values));
        }
    }

    fn copy(&self) -> Cache {
        Cache::Standard(Self { expected: 0, ..self.clone() })
    }
}

impl KvCache for StandardKvCache {
    fn offset(&self) -> usize {
        self.offset
    }

    fn update(&mut self, keys: &Array, values: &Array) -> Result<(KvTensor, KvTensor)> {
        let buffers = [self.keys.as_ref(), self.values.as_ref()];
        let update =
            check_update("KVCache.update_and_fetch", [keys, values], buffers, (self.offset, self.offset), false)?;
        let growth = Growth::plan(self.offset, update.len, update.n_tokens, self.step);
        let growth = growth.map(|growth| growth.toward(self.expected, self.step));
        let keys = write(buffers[0], growth, keys, self.offset, keys.dtype())?;
        let values = write(buffers[1], growth, values, self.offset, values.dtype())?;
        let end = self.offset + update.n_tokens;
        let seen = (KvTensor::Dense(keys.rows(0, end)?), KvTensor::Dense(values.rows(0, end)?));
        (self.keys, self.values, self.offset) = (Some(keys), Some(values), end);
        Ok(seen)
    }

    dense::buffers!();

    fn keys_and_values(&self) -> Result<(KvTensor, KvTensor)> {
        match (&self.keys, &self.values) {
            (Some(keys), Some(values)) => {
                Ok((KvTensor::Dense(keys.rows(0, self.offset)?), KvTensor::Dense(values.rows(0, self.offset)?)))
            }
            _ => Err(nothing_yet()),
        }
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
