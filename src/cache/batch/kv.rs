//! `BatchKVCache`: buffers that grow by whole steps, for several sequences.

use super::buffers::{Buffers, Side};
use super::{BatchCache, check_assigned, check_indices, check_padding, not_finalized, numbers_field, numbers_state};
use crate::array::Array;
use crate::cache::plan::{Growth, Sequences, choose};
use crate::cache::{
    Cache, Checkpoint, KvCache, KvTensor, LayerCache, MaskMode, QuantizedKvCache, STEP, Scheme, StandardKvCache, State,
    checked_fields, count_field, mask,
};
use crate::error::{Error, Result};

/// Keys and values `(B, H, L, D)` of B sequences, of which the first `index` columns are filled. With a scheme this is
/// `BatchQuantizedKVCache`, which mlx-lm lacks: each token is quantized once, when it comes.
#[derive(Clone, Debug)]
pub struct BatchKvCache {
    pub(super) buffers: Buffers,
    pub(super) sequences: Sequences,
    pub(super) index: usize,
    /// Columns of padding behind each sequence, until they are finalized.
    right_padding: Option<Vec<i32>>,
    /// Rows by which the buffers grow; at least 1.
    pub step: usize,
}

impl BatchKvCache {
    /// An empty batch, to whose sequences `left_padding` columns of padding will come first.
    ///
    /// # Errors
    /// [`Error::Value`] for negative padding.
    pub fn new(left_padding: Vec<i32>, scheme: Option<Scheme>) -> Result<Self> {
        check_padding("BatchKVCache", "left_padding", &left_padding, left_padding.len())?;
        Ok(Self { sequences: Sequences::new(left_padding), ..Self::unset(scheme) })
    }

    /// A batch that waits for its state.
    pub(in crate::cache) fn unset(scheme: Option<Scheme>) -> Self {
        let (sequences, buffers) = (Sequences::default(), Buffers::new(scheme));
        Self { buffers, sequences, index: 0, right_padding: None, step: STEP }
    }

    /// How the rows are quantized; None if they are not.
    pub const fn scheme(&self) -> Option<Scheme> {
        self.buffers.scheme
    }

    /// Assigns the number of filled columns; [`update`](KvCache::update) checks that the buffers hold them.
    pub const fn set_index(&mut self, index: usize) {
        self.index = index;
    }
}

impl LayerCache for BatchKvCache {
    fn reference_class_name(&self) -> &'static str {
        if self.buffers.scheme.is_some() { "BatchQuantizedKVCache" } else { "BatchKVCache" }
    }

    fn state(&self) -> State<Array> {
        let scheme = self.buffers.scheme.map(|scheme| [scheme.group_size(), scheme.bits()]);
        let counts = std::iter::once(self.index).chain(scheme.into_iter().flatten());
        let numbers = [&self.sequences.offsets, &self.sequences.left_padding].map(|numbers| numbers_state(numbers));
        let counts = counts.map(|count| State::Int(count as i64));
        State::List(self.buffers.state().into_iter().chain(numbers).chain(counts).collect())
    }

    fn set_state(&mut self, state: State<Array>) -> Result<()> {
        let class = self.reference_class_name();
        let mut fields = checked_fields(class, state)?.into_iter();
        let mut next = || fields.next().unwrap_or(State::None);
        let (keys, values) = (next(), next());
        let sequences = Sequences { offsets: numbers_field(next())?, left_padding: numbers_field(next())? };
        let index = count_field(&next());
        let scheme = match self.buffers.scheme {
            Some(_) => Some(Scheme::new(class, count_field(&next()), count_field(&next()))?),
            None => None,
        };
        let buffers = Buffers::from_state(keys, values, scheme);
        *self = Self { buffers, sequences, index, right_padding: None, step: self.step };
        Ok(())
    }

    fn buffers(&self) -> Vec<&Array> {
        self.buffers.arrays()
    }

    fn size(&self) -> usize {
        self.index
    }

    fn trim(&mut self, n: usize) -> Result<usize> {
        let n = n.min(self.index);
        self.sequences = self.sequences.advanced(-(n as i32));
        self.index -= n;
        Ok(n)
    }

    fn checkpoint(&self, _n_tokens: usize) -> Checkpoint {
        Checkpoint::whole(self)
    }

    fn rollback(&mut self, checkpoint: Checkpoint) {
        checkpoint.put_back(self, |cache| if let Cache::Batch(cache) = cache { Some(cache) } else { None });
    }

    fn copy(&self) -> Cache {
        Cache::Batch(self.clone())
    }
}

impl KvCache for BatchKvCache {
    fn offset(&self) -> usize {
        self.index
    }

    fn update(&mut self, keys: &Array, values: &Array) -> Result<(KvTensor, KvTensor)> {
        let op = match self.buffers.scheme {
            None => "BatchKVCache.update_and_fetch",
            Some(_) => "BatchQuantizedKVCache.update_and_fetch",
        };
        let counts = (self.index, self.index);
        let (new, update) = self.buffers.encode(op, [keys, values], self.sequences.len(), counts)?;
        let growth = Growth::plan(self.index, update.len, update.n_tokens, self.step);
        let buffers = self.buffers.written(growth, &new, self.index)?;
        let end = self.index + update.n_tokens;
        let seen = buffers.seen(end)?;
        self.sequences = self.sequences.advanced(update.n_tokens as i32);
        (self.buffers, self.index) = (buffers, end);
        Ok(seen)
    }

    fn keys(&self) -> Option<KvTensor> {
        self.buffers.keys.clone()
    }

    fn values(&self) -> Option<KvTensor> {
        self.buffers.values.clone()
    }

    fn set_keys(&mut self, keys: Option<KvTensor>) -> Result<()> {
        self.buffers.keys = KvTensor::assigned("keys", keys, self.buffers.scheme.is_some())?;
        Ok(())
    }

    fn set_values(&mut self, values: Option<KvTensor>) -> Result<()> {
        self.buffers.values = KvTensor::assigned("values", values, self.buffers.scheme.is_some())?;
        Ok(())
    }

    fn keys_and_values(&self) -> Result<(KvTensor, KvTensor)> {
        self.buffers.seen(self.index)
    }

    fn set_offset(&mut self, offset: usize) -> Result<()> {
        Err(Error::value("offset", "one number per sequence", offset))
    }

    fn make_mask(&self, n_tokens: usize, window: Option<usize>, _return_array: bool) -> Result<MaskMode> {
        let left = Array::from_i32(&self.sequences.left_padding)?;
        mask::padded(n_tokens, self.index, window, None, Some(&left)).map(MaskMode::Array)
    }
}

impl BatchCache for BatchKvCache {
    fn sequences(&self) -> &Sequences {
        &self.sequences
    }

    fn set_sequences(&mut self, sequences: Sequences) -> Result<()> {
        check_assigned(self.reference_class_name(), &self.sequences, &sequences)?;
        self.sequences = sequences;
        Ok(())
    }

    fn filter(&mut self, indices: &[usize]) -> Result<()> {
        check_indices("filter", indices, self.sequences.len())?;
        let chosen = self.sequences.chosen(indices);
        // Padding that is still to come cannot be cut.
        let cut = if self.buffers.is_empty() { 0 } else { chosen.common_padding(self.index) };
        self.buffers = self.buffers.chosen(indices, cut)?;
        self.sequences = chosen.shifted(-(cut as i32));
        self.index -= cut;
        self.right_padding = self.right_padding.as_ref().map(|padding| choose(padding, indices));
        Ok(())
    }

    fn extend(&mut self, other: &Cache) -> Result<()> {
        let op = "extend";
        let Cache::Batch(other) = other else {
            return Err(Error::type_(op, self.reference_class_name(), other.as_dyn().reference_class_name()));
        };
        if self.buffers.scheme != other.buffers.scheme {
            let got = format!("{:?}", other.buffers.scheme);
            return Err(Error::value(op, format!("rows quantized by {:?}", self.buffers.scheme), got));
        }
        if self.right_padding.is_some() || other.right_padding.is_some() {
            return Err(not_finalized(op));
        }
        self.buffers.check_sequences(op, self.sequences.len())?;
        other.buffers.check_sequences(op, other.sequences.len())?;
        // Right-justified, so that both go on at one column.
        let index = self.index.max(other.index);
        let shifts = [index - self.index, index - other.index];
        let len = self.buffers.len().max(other.buffers.len()).unwrap_or(0);
        let sides = [
            Side { shift: shifts[0], n_sequences: self.sequences.len() },
            Side { shift: shifts[1], n_sequences: other.sequences.len() },
        ];
        self.buffers = self.buffers.joined(&other.buffers, sides, len)?;
        let [mine, others] = [(&self.sequences, shifts[0]), (&other.sequences, shifts[1])]
            .map(|(sequences, shift)| sequences.shifted(shift as i32));
        self.sequences = mine.joined(&others);
        self.index = index;
        Ok(())
    }

    fn extract(&self, index: usize) -> Result<Cache> {
        check_indices("extract", &[index], self.sequences.len())?;
        if self.right_padding.is_some() {
            return Err(not_finalized("extract"));
        }
        let from = self.sequences.first_column(index, self.index);
        let [keys, values] = self.buffers.extracted(index, from, self.index)?;
        let offset = self.index - from;
        match (self.buffers.scheme, keys, values) {
            (Some(scheme), keys, values) => {
                let mut cache = QuantizedKvCache::new(scheme.group_size(), scheme.bits())?;
                (cache.keys, cache.values, cache.offset) = (Some(keys), Some(values), offset);
                Ok(Cache::Quantized(cache))
            }
            (None, KvTensor::Dense(keys), KvTensor::Dense(values)) => {
                let (keys, values) = (Some(keys), Some(values));
                Ok(Cache::Standard(StandardKvCache { keys, values, offset, ..StandardKvCache::default() }))
            }
            _ => Err(Error::value("extract", "rows that are not quantized", "quantized ones")),
        }
    }

    fn pad_left(&mut self, left_padding: &[i32]) -> Result<()> {
        let op = "BatchKVCache.prepare";
        if !self.buffers.is_empty() {
            return Err(Error::value(op, "an empty batch, as padding goes before all tokens", "one with tokens"));
        }
        check_padding(op, "left_padding", left_padding, self.sequences.len())?;
        self.sequences = self.sequences.rolled(left_padding);
        Ok(())
    }

    fn pad_right(&mut self, _lengths: Option<&[i32]>, right_padding: &[i32]) -> Result<()> {
        check_padding("BatchKVCache.prepare", "right_padding", right_padding, self.sequences.len())?;
        if right_padding.iter().any(|&padding| padding > 0) {
            self.right_padding = Some(right_padding.to_vec());
        }
        Ok(())
    }

    fn finalize(&mut self) -> Result<()> {
        if let Some(padding) = &self.right_padding {
            self.buffers = self.buffers.rolled(padding)?;
            self.sequences = self.sequences.rolled(padding);
            self.right_padding = None;
        }
        Ok(())
    }

    fn pending(&self) -> Option<Vec<i32>> {
        self.right_padding.clone()
    }

    fn set_pending(&mut self, pending: Option<Vec<i32>>) -> Result<()> {
        if let Some(padding) = &pending {
            check_padding("BatchKVCache", "right_padding", padding, self.sequences.len())?;
        }
        self.right_padding = pending;
        Ok(())
    }
}
