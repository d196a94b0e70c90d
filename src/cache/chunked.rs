//! `ChunkedKVCache`: the newest chunk of the tokens, for attention that never looks past it.

use super::plan::Growth;
use super::standard::write;
use super::tensor::check_update;
use super::{
    Cache, Checkpoint, KvCache, KvTensor, LayerCache, MaskMode, STEP, State, array_field, array_state, checked_fields,
    count_field, dense, mask, nothing_yet, settle,
};
use crate::array::Array;
use crate::error::{Error, Result};

/// Keys and values in padded buffers `(B, H, L, D)`, of which the first `offset - start_position` rows are valid.
#[derive(Clone, Debug)]
pub struct ChunkedKvCache {
    /// Buffer of the keys; None before the first update.
    pub keys: Option<Array>,
    /// Buffer of the values.
    pub values: Option<Array>,
    /// Tokens seen so far.
    pub offset: usize,
    /// Position of the first row.
    pub start_position: usize,
    /// Rows by which the buffers grow; at least 1.
    pub step: usize,
    chunk_size: usize,
}

impl ChunkedKvCache {
    /// An empty cache whose front is trimmed to `chunk_size` rows.
    ///
    /// # Errors
    /// [`Error::Value`] for a chunk of no rows.
    pub fn new(chunk_size: usize) -> Result<Self> {
        let mut cache = Self::unset();
        cache.set_chunk_size(chunk_size)?;
        Ok(cache)
    }

    /// A cache that waits for its state.
    pub(super) const fn unset() -> Self {
        Self { keys: None, values: None, offset: 0, start_position: 0, step: STEP, chunk_size: 1 }
    }

    /// Rows that [`maybe_trim_front`](Self::maybe_trim_front) leaves at most.
    pub const fn chunk_size(&self) -> usize {
        self.chunk_size
    }

    /// Assigns the size of a chunk.
    ///
    /// # Errors
    /// [`Error::Value`] for 0.
    pub fn set_chunk_size(&mut self, chunk_size: usize) -> Result<()> {
        if chunk_size == 0 {
            return Err(Error::value("ChunkedKVCache", "a chunk_size of at least 1", chunk_size));
        }
        self.chunk_size = chunk_size;
        Ok(())
    }

    /// Drops the oldest rows, so that at most `chunk_size` are left.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    pub fn maybe_trim_front(&mut self) -> Result<()> {
        let valid = self.valid();
        let (Some(keys), Some(values)) = (&self.keys, &self.values) else { return Ok(()) };
        let rows = keys.dim(2).min(values.dim(2));
        if valid > rows {
            let expected = format!("at most {rows} tokens after start_position");
            return Err(Error::value("maybe_trim_front", expected, valid));
        }
        if valid > self.chunk_size {
            let dropped = valid - self.chunk_size;
            (self.keys, self.values) = (Some(keys.rows(dropped, valid)?), Some(values.rows(dropped, valid)?));
            self.start_position += dropped;
        }
        Ok(())
    }

    /// Rows that hold a token.
    const fn valid(&self) -> usize {
        self.offset.saturating_sub(self.start_position)
    }
}

impl LayerCache for ChunkedKvCache {
    fn reference_class_name(&self) -> &'static str {
        "ChunkedKVCache"
    }

    fn state(&self) -> State<Array> {
        let counts = [self.offset, self.chunk_size, self.start_position].map(|count| State::Int(count as i64));
        let arrays = [array_state(self.keys.as_ref()), array_state(self.values.as_ref())];
        State::List(arrays.into_iter().chain(counts).collect())
    }

    fn set_state(&mut self, state: State<Array>) -> Result<()> {
        let mut fields = checked_fields(self.reference_class_name(), state)?.into_iter();
        let mut next = || fields.next().unwrap_or(State::None);
        let (keys, values) = (array_field(next()), array_field(next()));
        let (offset, chunk_size, start_position) = (count_field(&next()), count_field(&next()), count_field(&next()));
        *self = Self { keys, values, offset, start_position, step: self.step, chunk_size };
        Ok(())
    }

    fn buffers(&self) -> Vec<&Array> {
        self.keys.iter().chain(&self.values).collect()
    }

    fn size(&self) -> usize {
        self.valid()
    }

    fn trim(&mut self, n: usize) -> Result<usize> {
        let n = n.min(self.valid());
        self.offset -= n;
        Ok(n)
    }

    fn checkpoint(&self, n_tokens: usize) -> Checkpoint {
        // A model trims the front just before an update.
        Checkpoint::at_offset(self, self.valid() + n_tokens > self.chunk_size)
    }

    fn rollback(&mut self, checkpoint: Checkpoint) {
        let whole = |cache| if let Cache::Chunked(cache) = cache { Some(cache) } else { None };
        if let Some(offset) = checkpoint.put_back(self, whole) {
            self.offset = offset;
            settle(self.keys.iter_mut().chain(&mut self.values));
        }
    }

    fn copy(&self) -> Cache {
        Cache::Chunked(self.clone())
    }
}

impl KvCache for ChunkedKvCache {
    fn offset(&self) -> usize {
        self.offset
    }

    fn update(&mut self, keys: &Array, values: &Array) -> Result<(KvTensor, KvTensor)> {
        let op = "ChunkedKVCache.update_and_fetch";
        if self.start_position > self.offset {
            return Err(Error::value(op, format!("start_position <= offset {}", self.offset), self.start_position));
        }
        let buffers = [self.keys.as_ref(), self.values.as_ref()];
        let used = self.valid();
        let update = check_update(op, [keys, values], buffers, (self.offset, used), false)?;
        let growth = Growth::plan(used, update.len, update.n_tokens, self.step);
        let keys = write(buffers[0], growth, keys, used, keys.dtype())?;
        let values = write(buffers[1], growth, values, used, values.dtype())?;
        let end = used + update.n_tokens;
        let seen = (KvTensor::Dense(keys.rows(0, end)?), KvTensor::Dense(values.rows(0, end)?));
        (self.keys, self.values, self.offset) = (Some(keys), Some(values), self.offset + update.n_tokens);
        Ok(seen)
    }

    dense::buffers!();

    fn keys_and_values(&self) -> Result<(KvTensor, KvTensor)> {
        match (&self.keys, &self.values) {
            (Some(keys), Some(values)) => {
                let valid = self.valid();
                Ok((KvTensor::Dense(keys.rows(0, valid)?), KvTensor::Dense(values.rows(0, valid)?)))
            }
            _ => Err(nothing_yet()),
        }
    }

    fn set_offset(&mut self, offset: usize) -> Result<()> {
        self.offset = offset;
        Ok(())
    }

    /// The mask over the rows that are held; mlx-lm's class makes none, its models do.
    fn make_mask(&self, n_tokens: usize, window: Option<usize>, return_array: bool) -> Result<MaskMode> {
        mask::growing(n_tokens, self.valid(), window, return_array)
    }
}
