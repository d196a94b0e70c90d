//! `BatchRotatingKVCache`: the newest columns of several sequences in a ring.

use super::buffers::{Buffers, Side};
use super::{BatchCache, check_assigned, check_indices, check_padding, not_finalized, numbers_field, numbers_state};
use crate::array::Array;
use crate::cache::plan::{BatchRing, Sequences, choose};
use crate::cache::{
    Cache, Checkpoint, KvCache, KvTensor, LayerCache, MaskMode, RotatingKvCache, STEP, State, checked_fields,
    count_field, mask,
};
use crate::error::{Error, Result};

/// Keys and values `(B, H, L, D)` of the last `max_size` columns of B sequences; single columns are written over the
/// oldest one. No column is kept for ever.
#[derive(Clone, Debug)]
pub struct BatchRotatingKvCache {
    pub(super) buffers: Buffers,
    pub(super) sequences: Sequences,
    pub(super) ring: BatchRing,
    pending: Option<Pending>,
    /// Rows by which the buffers grow until they hold `max_size`; at least 1.
    pub step: usize,
}

/// Columns that were announced, with padding behind the tokens.
#[derive(Clone, Debug)]
struct Pending {
    /// Per sequence, the offset at which its tokens end.
    ends: Vec<i32>,
    /// Columns that will have been seen when all of them have come.
    until: usize,
}

impl Pending {
    /// Columns of padding behind the tokens of each sequence.
    fn behind(&self, sequences: &Sequences) -> Vec<i32> {
        sequences.offsets.iter().zip(&self.ends).map(|(offset, end)| offset.saturating_sub(*end).max(0)).collect()
    }
}

/// What an update or [`BatchCache::finalize`] leads to.
struct Turned {
    buffers: Buffers,
    sequences: Sequences,
    ring: BatchRing,
}

impl BatchRotatingKvCache {
    /// An empty ring of `max_size` columns, to whose sequences `left_padding` columns of padding will come first.
    ///
    /// # Errors
    /// [`Error::Value`] for negative padding or a size of 0.
    pub fn new(max_size: usize, left_padding: Vec<i32>) -> Result<Self> {
        let op = "BatchRotatingKVCache";
        check_padding(op, "left_padding", &left_padding, left_padding.len())?;
        if max_size == 0 {
            return Err(Error::value(op, "max_size of at least 1", max_size));
        }
        let (sequences, ring) = (Sequences::new(left_padding), BatchRing::new(max_size));
        Ok(Self { sequences, ring, ..Self::unset() })
    }

    /// A ring that waits for its state.
    pub(in crate::cache) fn unset() -> Self {
        let (buffers, sequences) = (Buffers::new(None), Sequences::default());
        Self { buffers, sequences, ring: BatchRing::new(1), pending: None, step: STEP }
    }

    /// Where the ring stands.
    pub const fn ring(&self) -> &BatchRing {
        &self.ring
    }

    /// Assigns the position; [`update`](KvCache::update) checks that it fits the buffers.
    pub const fn set_ring(&mut self, ring: BatchRing) {
        self.ring = BatchRing { len: self.ring.len, ..ring };
    }

    /// Per sequence, the offset at which the announced tokens end.
    pub fn ends(&self) -> Option<&[i32]> {
        self.pending.as_ref().map(|pending| pending.ends.as_slice())
    }

    /// One column written in place.
    fn place(&self, new: &[KvTensor; 2]) -> Result<Turned> {
        let place = self.ring.place(self.step);
        let buffers = self.buffers.try_zip(new, |buffer, new| {
            let buffer = match buffer {
                None => new.zeros_like(place.added)?,
                Some(buffer) if place.added > 0 => buffer.padded(place.added, new)?,
                Some(buffer) => buffer.rows(place.dropped, buffer.len())?,
            };
            buffer.with_rows(new, place.column)
        })?;
        let sequences = self.sequences.advanced(1).shifted(-(place.lost as i32));
        Ok(Turned { buffers, sequences, ring: place.after })
    }

    /// Several columns appended in temporal order.
    fn append(&self, new: &[KvTensor; 2], n_columns: usize) -> Result<Turned> {
        let old = self.unrolled()?;
        let (dropped, ring) = old.ring.append(n_columns);
        let mut sequences = old.sequences.clone();
        let mut buffers = old.buffers.try_map(|rows| rows.rows(0, old.ring.index))?;
        // Padding goes to the left first, lest it drive tokens out.
        if let Some(pending) = self.pending.as_ref().filter(|_| !buffers.is_empty()) {
            let by = pending.behind(&sequences);
            (buffers, sequences) = (buffers.rolled(&by)?, sequences.rolled(&by));
        }
        let buffers = buffers.try_zip(new, |buffer, new| match buffer {
            None => Ok(new.clone()),
            Some(buffer) => {
                buffer.rows(dropped, buffer.len())?.try_zip(new, |old, new| Array::concatenate(&[old, new], 2))
            }
        })?;
        let sequences = sequences.shifted(-(dropped as i32)).advanced(n_columns as i32);
        Ok(Turned { buffers, sequences, ring })
    }

    /// The same with the oldest column in front.
    fn unrolled(&self) -> Result<Self> {
        if !self.ring.rotated {
            return Ok(self.clone());
        }
        let by = -(self.ring.index as i32);
        let buffers = self.buffers.try_map(|rows| rows.try_map(|array| array.roll(by, 2)))?;
        Ok(Self { buffers, ring: self.ring.unrolled(), ..self.clone() })
    }

    /// Checks that the numbers are ones that updates lead to.
    fn check(&self, op: &'static str) -> Result<()> {
        self.ring.check().map_err(|(expected, got)| Error::value(op, expected, got))
    }
}

impl LayerCache for BatchRotatingKvCache {
    fn reference_class_name(&self) -> &'static str {
        "BatchRotatingKVCache"
    }

    fn state(&self) -> State<Array> {
        let BatchRing { offset, index, max_size, rotated, .. } = self.ring;
        let numbers = [&self.sequences.offsets, &self.sequences.left_padding].map(|numbers| numbers_state(numbers));
        let counts = [max_size, offset, index].map(|count| State::Int(count as i64));
        let fields = self.buffers.state().into_iter().chain(numbers).chain(counts);
        State::List(fields.chain([State::Bool(rotated)]).collect())
    }

    fn set_state(&mut self, state: State<Array>) -> Result<()> {
        let mut fields = checked_fields(self.reference_class_name(), state)?.into_iter();
        let mut next = || fields.next().unwrap_or(State::None);
        let buffers = Buffers::from_state(next(), next(), None);
        let sequences = Sequences { offsets: numbers_field(next())?, left_padding: numbers_field(next())? };
        let (max_size, offset, index) = (count_field(&next()), count_field(&next()), count_field(&next()));
        let rotated = matches!(next(), State::Bool(true));
        let ring = BatchRing { offset, index, len: buffers.len(), max_size, rotated };
        *self = Self { buffers, sequences, ring, pending: None, step: self.step };
        Ok(())
    }

    fn buffers(&self) -> Vec<&Array> {
        self.buffers.arrays()
    }

    fn size(&self) -> usize {
        self.ring.offset.min(self.ring.max_size)
    }

    fn is_trimmable(&self) -> bool {
        !self.ring.is_full()
    }

    fn trim(&mut self, n: usize) -> Result<usize> {
        let op = "BatchRotatingKVCache.trim";
        if self.ring.is_full() && n > 0 {
            let expected = format!("fewer than max_size={} columns, so that none was overwritten", self.ring.max_size);
            return Err(Error::value(op, expected, self.ring.offset));
        }
        self.check(op)?;
        let n = n.min(self.ring.offset);
        self.sequences = self.sequences.advanced(-(n as i32));
        self.ring = self.ring.trimmed(n);
        Ok(n)
    }

    fn checkpoint(&self, _n_tokens: usize) -> Checkpoint {
        Checkpoint::whole(self)
    }

    fn rollback(&mut self, checkpoint: Checkpoint) {
        checkpoint.put_back(self, |cache| if let Cache::BatchRotating(cache) = cache { Some(cache) } else { None });
    }

    fn copy(&self) -> Cache {
        Cache::BatchRotating(self.clone())
    }
}

impl KvCache for BatchRotatingKvCache {
    fn offset(&self) -> usize {
        self.ring.offset
    }

    fn update(&mut self, keys: &Array, values: &Array) -> Result<(KvTensor, KvTensor)> {
        let op = "BatchRotatingKVCache.update_and_fetch";
        self.check(op)?;
        let counts = (self.ring.offset, self.ring.written());
        let (new, update) = self.buffers.encode(op, [keys, values], self.sequences.len(), counts)?;
        let turned = match (update.n_tokens, &self.pending) {
            (0, _) if update.len.is_some() => return self.keys_and_values(),
            (1, None) => self.place(&new)?,
            (1, Some(pending)) if self.ring.offset >= pending.until => {
                return Err(Error::Order { op, expected: "finalize() first".into(), got: "a token".into() });
            }
            (n_columns, _) => self.append(&new, n_columns)?,
        };
        let seen = turned.buffers.seen(turned.ring.written())?;
        (self.buffers, self.sequences, self.ring) = (turned.buffers, turned.sequences, turned.ring);
        Ok(seen)
    }

    fn keys(&self) -> Option<KvTensor> {
        self.buffers.keys.clone()
    }

    fn values(&self) -> Option<KvTensor> {
        self.buffers.values.clone()
    }

    fn set_keys(&mut self, keys: Option<KvTensor>) -> Result<()> {
        self.buffers.keys = KvTensor::assigned("keys", keys, false)?;
        self.ring.len = self.buffers.len();
        Ok(())
    }

    fn set_values(&mut self, values: Option<KvTensor>) -> Result<()> {
        self.buffers.values = KvTensor::assigned("values", values, false)?;
        Ok(())
    }

    fn keys_and_values(&self) -> Result<(KvTensor, KvTensor)> {
        self.buffers.seen(self.ring.written())
    }

    fn set_offset(&mut self, offset: usize) -> Result<()> {
        Err(Error::value("offset", "one number per sequence", offset))
    }

    fn make_mask(&self, n_tokens: usize, window: Option<usize>, _return_array: bool) -> Result<MaskMode> {
        let BatchRing { offset, index, max_size, rotated, .. } = self.ring;
        let window = window.filter(|&window| window > 0).unwrap_or(max_size);
        let before = offset.min(max_size.saturating_sub(1));
        // Where the tokens begin once the update has dropped what it will.
        let turns = n_tokens == 1 && (rotated || index >= max_size);
        let lost = (index + usize::from(n_tokens > 1)).saturating_sub(max_size) + usize::from(turns);
        let left = Array::from_i32(&self.sequences.shifted(-(lost as i32)).left_padding)?;
        let mask = mask::padded(n_tokens, before, Some(window), None, Some(&left))?;
        let by = if index >= max_size { 1 } else { index as i32 + 1 };
        Ok(MaskMode::Array(if turns { mask.roll(by, 3)? } else { mask }))
    }

    fn max_size(&self) -> Option<usize> {
        Some(self.ring.max_size)
    }
}

impl BatchCache for BatchRotatingKvCache {
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
        self.buffers = self.buffers.chosen(indices, 0)?;
        self.sequences = self.sequences.chosen(indices);
        if let Some(pending) = &mut self.pending {
            pending.ends = choose(&pending.ends, indices);
        }
        Ok(())
    }

    fn extend(&mut self, other: &Cache) -> Result<()> {
        let op = "extend";
        let Cache::BatchRotating(other) = other else {
            return Err(Error::type_(op, "BatchRotatingKVCache", other.as_dyn().reference_class_name()));
        };
        if self.ring.max_size != other.ring.max_size {
            return Err(Error::value(op, format!("max_size={}", self.ring.max_size), other.ring.max_size));
        }
        if self.pending.is_some() || other.pending.is_some() {
            return Err(not_finalized(op));
        }
        self.buffers.check_sequences(op, self.sequences.len())?;
        other.buffers.check_sequences(op, other.sequences.len())?;
        self.check(op)?;
        other.check(op)?;
        let aligned = self.ring.rotated == other.ring.rotated && self.ring.index == other.ring.index;
        let (mine, others) =
            if aligned { (self.clone(), other.clone()) } else { (self.unrolled()?, other.unrolled()?) };
        // Right-justified, so that both go on at one column.
        let index = mine.ring.index.max(others.ring.index);
        let [my_shift, their_shift] = [index - mine.ring.index, index - others.ring.index];
        let len = mine.ring.len.max(others.ring.len);
        let sides = [
            Side { shift: my_shift, n_sequences: mine.sequences.len() },
            Side { shift: their_shift, n_sequences: others.sequences.len() },
        ];
        self.buffers = mine.buffers.joined(&others.buffers, sides, len.unwrap_or(0))?;
        self.sequences = mine.sequences.shifted(my_shift as i32).joined(&others.sequences.shifted(their_shift as i32));
        self.ring = BatchRing { index, len, offset: mine.ring.offset.max(others.ring.offset), ..mine.ring };
        Ok(())
    }

    fn extract(&self, index: usize) -> Result<Cache> {
        let op = "extract";
        check_indices(op, &[index], self.sequences.len())?;
        if self.pending.is_some() {
            return Err(not_finalized(op));
        }
        self.check(op)?;
        let offset = usize::try_from(self.sequences.offsets[index]).unwrap_or(0);
        let max_size = self.ring.max_size;
        let batch = self.unrolled()?;
        let end = batch.ring.index;
        let from = self.sequences.first_column(index, end);
        let [keys, values] = batch.buffers.extracted(index, from, end)?.map(|rows| KvTensor::to_state(Some(&rows)));
        let counts = [offset, 0, max_size, end - from].map(|count| State::Int(count as i64));
        let mut ring = RotatingKvCache::new(max_size, 0)?;
        ring.set_state(State::List([keys, values].into_iter().chain(counts).collect()))?;
        Ok(Cache::Rotating(ring))
    }

    fn pad_left(&mut self, left_padding: &[i32]) -> Result<()> {
        let op = "BatchRotatingKVCache.prepare";
        if !self.buffers.is_empty() {
            return Err(Error::value(op, "an empty batch, as padding goes before all tokens", "one with tokens"));
        }
        check_padding(op, "left_padding", left_padding, self.sequences.len())?;
        self.sequences = self.sequences.rolled(left_padding);
        Ok(())
    }

    fn pad_right(&mut self, lengths: Option<&[i32]>, right_padding: &[i32]) -> Result<()> {
        let op = "BatchRotatingKVCache.prepare";
        let n_sequences = self.sequences.len();
        check_padding(op, "right_padding", right_padding, n_sequences)?;
        if right_padding.iter().all(|&padding| padding == 0) {
            return Ok(());
        }
        let Some(lengths) = lengths else {
            return Err(Error::type_(op, "lengths beside right_padding", "None"));
        };
        check_padding(op, "lengths", lengths, n_sequences)?;
        let columns = lengths.iter().zip(right_padding).map(|(tokens, padding)| tokens.saturating_add(*padding));
        let until = self.ring.offset + columns.max().map_or(0, i32::unsigned_abs) as usize;
        let ends = self.sequences.offsets.iter().zip(lengths).map(|(offset, n)| offset.saturating_add(*n)).collect();
        self.pending = Some(Pending { ends, until });
        Ok(())
    }

    fn finalize(&mut self) -> Result<()> {
        if let Some(pending) = &self.pending {
            let by = pending.behind(&self.sequences);
            self.buffers = self.buffers.rolled(&by)?;
            self.sequences = self.sequences.rolled(&by);
            self.pending = None;
        }
        Ok(())
    }

    fn pending(&self) -> Option<Vec<i32>> {
        self.pending.as_ref().map(|pending| {
            let until = i32::try_from(pending.until).unwrap_or(i32::MAX);
            pending.ends.iter().copied().chain([until]).collect()
        })
    }

    fn set_pending(&mut self, pending: Option<Vec<i32>>) -> Result<()> {
        let Some(mut ends) = pending else {
            self.pending = None;
            return Ok(());
        };
        let until = ends.pop().and_then(|until| usize::try_from(until).ok());
        let Some(until) = until.filter(|_| ends.len() == self.sequences.len()) else {
            return Err(Error::value("BatchRotatingKVCache", "an end per sequence, and a count", format!("{ends:?}")));
        };
        self.pending = Some(Pending { ends, until });
        Ok(())
    }
}
