//! `ConcatenateKVCache`: exactly the rows, no padding.

use super::tensor::check_update;
use super::{
    Cache, Checkpoint, KvCache, KvTensor, LayerCache, MaskMode, State, array_field, array_state, checked_fields, dense,
    mask, nothing_yet,
};
use crate::array::Array;
use crate::error::{Error, Result};

/// Keys and values `(B, H, offset, D)`, joined anew at each update.
#[derive(Clone, Debug, Default)]
pub struct ConcatenateKvCache {
    /// All keys; None before the first update.
    pub keys: Option<Array>,
    /// All values.
    pub values: Option<Array>,
}

impl LayerCache for ConcatenateKvCache {
    fn reference_class_name(&self) -> &'static str {
        "ConcatenateKVCache"
    }

    fn state(&self) -> State<Array> {
        State::List(vec![array_state(self.keys.as_ref()), array_state(self.values.as_ref())])
    }

    fn set_state(&mut self, state: State<Array>) -> Result<()> {
        let mut fields = checked_fields(self.reference_class_name(), state)?.into_iter();
        let mut next = || array_field(fields.next().unwrap_or(State::None));
        (self.keys, self.values) = (next(), next());
        Ok(())
    }

    fn buffers(&self) -> Vec<&Array> {
        self.keys.iter().chain(&self.values).collect()
    }

    fn size(&self) -> usize {
        self.offset()
    }

    fn trim(&mut self, n: usize) -> Result<usize> {
        let n = n.min(self.offset());
        if let (Some(keys), Some(values)) = (&self.keys, &self.values) {
            let rest = self.offset() - n;
            (self.keys, self.values) = (Some(keys.rows(0, rest)?), Some(values.rows(0, rest)?));
        }
        Ok(n)
    }

    fn checkpoint(&self, _n_tokens: usize) -> Checkpoint {
        Checkpoint::whole(self)
    }

    fn rollback(&mut self, checkpoint: Checkpoint) {
        checkpoint.put_back(self, |cache| if let Cache::Concatenate(cache) = cache { Some(cache) } else { None });
    }

    fn copy(&self) -> Cache {
        Cache::Concatenate(self.clone())
    }
}

impl KvCache for ConcatenateKvCache {
    fn offset(&self) -> usize {
        self.keys.as_ref().map_or(0, |keys| keys.dim(2))
    }

    fn update(&mut self, keys: &Array, values: &Array) -> Result<(KvTensor, KvTensor)> {
        let buffers = [self.keys.as_ref(), self.values.as_ref()];
        check_update(
            "ConcatenateKVCache.update_and_fetch",
            [keys, values],
            buffers,
            (self.offset(), self.offset()),
            false,
        )?;
        let join = |old: Option<&Array>, new: &Array| match old {
            Some(old) => Array::concatenate(&[old, new], 2),
            None => Ok(new.clone()),
        };
        let (keys, values) = (join(buffers[0], keys)?, join(buffers[1], values)?);
        (self.keys, self.values) = (Some(keys.clone()), Some(values.clone()));
        Ok((KvTensor::Dense(keys), KvTensor::Dense(values)))
    }

    dense::buffers!();

    fn keys_and_values(&self) -> Result<(KvTensor, KvTensor)> {
        match (&self.keys, &self.values) {
            (Some(keys), Some(values)) => Ok((KvTensor::Dense(keys.clone()), KvTensor::Dense(values.clone()))),
            _ => Err(nothing_yet()),
        }
    }

    fn set_offset(&mut self, offset: usize) -> Result<()> {
        Err(Error::value("offset", "an offset that is the number of rows: assign keys and values, or trim", offset))
    }

    fn make_mask(&self, n_tokens: usize, window: Option<usize>, return_array: bool) -> Result<MaskMode> {
        mask::growing(n_tokens, self.offset(), window, return_array)
    }
}
