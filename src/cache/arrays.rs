//! `ArraysCache`: the recurrent states of a layer, one slot each.

use super::{Cache, Checkpoint, LayerCache, State, array_field, array_state, checked_fields};
use crate::array::{Array, Dtype};
use crate::error::{Error, Result};

/// Arrays `(B, …)` that a layer replaces at each update. It has no rows per token, so nothing can be trimmed.
#[derive(Clone, Debug, Default)]
pub struct ArraysCache {
    /// The states; None where there is none yet.
    pub slots: Vec<Option<Array>>,
    /// Tokens that each sequence must not see at its start, an integer array `(B,)`.
    pub left_padding: Option<Array>,
    /// Tokens that each sequence has, padding before them counted, an integer array `(B,)`.
    pub lengths: Option<Array>,
}

impl ArraysCache {
    /// A cache of `n_slots` empty slots.
    pub fn new(n_slots: usize) -> Self {
        Self { slots: vec![None; n_slots], ..Self::default() }
    }

    /// Sequences that are held (B): the first slot that is set tells, else the padding, else the lengths, else it is 1.
    pub fn batch_size(&self) -> usize {
        let set = self.slots.iter().flatten().next();
        set.or(self.left_padding.as_ref()).or(self.lengths.as_ref()).map_or(1, |array| array.dim_or(0))
    }

    /// The bool mask `(B, n_tokens)` that is True for tokens, False for padding; None if nothing is padded.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    pub fn make_mask(&self, n_tokens: usize) -> Result<Option<Array>> {
        let positions = Array::arange(0, n_tokens)?;
        let column = |array: &Array| array.reshape(&[-1, 1]);
        let started = self.left_padding.as_ref().map(|padding| column(padding)?.le(&positions)).transpose()?;
        let lasts = self.lengths.as_ref().map(|lengths| positions.lt(&column(lengths)?)).transpose()?;
        match (started, lasts) {
            (Some(started), Some(lasts)) => started.and(&lasts).map(Some),
            (started, lasts) => Ok(started.or(lasts)),
        }
    }

    /// Says how many tokens each sequence has in what comes next.
    ///
    /// # Errors
    /// [`Error::Value`] unless `lengths` are integers `(B,)`.
    pub fn prepare(&mut self, lengths: Array) -> Result<()> {
        self.lengths = per_sequence("lengths", Some(lengths))?;
        Ok(())
    }

    /// Forgets padding and lengths: from now on every token counts.
    pub fn finalize(&mut self) {
        (self.left_padding, self.lengths) = (None, None);
    }

    /// Counts `n_tokens` that went through the layer.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    pub fn advance(&mut self, n_tokens: usize) -> Result<()> {
        let n_tokens = i32::try_from(n_tokens)
            .map_err(|_| Error::value("ArraysCache.advance", "fewer than 2^31 tokens", n_tokens))?;
        let less = |array: &Array| array.minus(&Array::scalar(n_tokens));
        let left_padding = self.left_padding.as_ref().map(less).transpose()?;
        let lengths = self.lengths.as_ref().map(less).transpose()?;
        (self.left_padding, self.lengths) = (left_padding, lengths);
        Ok(())
    }

    /// Keeps the sequences at `indices`, in that order; negative ones count from the end.
    ///
    /// # Errors
    /// [`Error::Value`] for an index that is none of a sequence.
    pub fn filter(&mut self, indices: &[i64]) -> Result<()> {
        let op = "ArraysCache.filter";
        let rows = indices.iter().map(|&index| self.row(op, index)).collect::<Result<Vec<_>>>()?;
        let rows = Array::from_i32(&rows.into_iter().map(|row| row as i32).collect::<Vec<_>>())?;
        *self = self.map(|array| array.take(&rows, 0))?;
        Ok(())
    }

    /// Appends the sequences of `other`. What only one of the two has set is zeros in the other.
    ///
    /// # Errors
    /// [`Error::Value`] unless both have the same number of slots, and arrays that differ in their first axis alone.
    pub fn extend(&mut self, other: &Self) -> Result<()> {
        let op = "ArraysCache.extend";
        if self.slots.len() != other.slots.len() {
            return Err(Error::value(op, format!("a cache of {} slots", self.slots.len()), other.slots.len()));
        }
        let sizes = [self.batch_size(), other.batch_size()];
        let join = |pair: [Option<&Array>; 2]| {
            let Some(like) = pair[1].or(pair[0]) else { return Ok(None) };
            let parts = [part(op, pair[0], like, sizes[0], None)?, part(op, pair[1], like, sizes[1], None)?];
            Array::concatenate(&[&parts[0], &parts[1]], 0).map(Some)
        };
        let slots = self.slots.iter().zip(&other.slots);
        *self = Self {
            slots: slots.map(|(mine, theirs)| join([mine.as_ref(), theirs.as_ref()])).collect::<Result<_>>()?,
            left_padding: join([self.left_padding.as_ref(), other.left_padding.as_ref()])?,
            lengths: join([self.lengths.as_ref(), other.lengths.as_ref()])?,
        };
        Ok(())
    }

    /// The sequence at `index` alone; a negative one counts from the end. Padding and lengths are left out.
    ///
    /// # Errors
    /// [`Error::Value`] for an index that is none of a sequence.
    pub fn extract(&self, index: i64) -> Result<Self> {
        let row = self.row("ArraysCache.extract", index)?;
        let slots =
            self.slots.iter().map(|slot| slot.as_ref().map(|slot| slot.take_first_axis(row, row + 1)).transpose());
        Ok(Self { slots: slots.collect::<Result<_>>()?, ..Self::default() })
    }

    /// One batch of caches of one sequence each, of the dtypes of the first that has the slot set; the others are zeros
    /// there. Padding and lengths are left out, but for empty caches, whose batch is padded by nothing.
    ///
    /// # Errors
    /// [`Error::Value`] unless there are caches, all of one number of slots and of arrays that fit.
    pub fn merge(caches: &[Self]) -> Result<Self> {
        let op = "ArraysCache.merge";
        let n_slots = caches.first().map(|cache| cache.slots.len());
        let n_slots = n_slots.ok_or_else(|| Error::value(op, "at least one cache", "none"))?;
        if let Some(other) = caches.iter().find(|cache| cache.slots.len() != n_slots) {
            return Err(Error::value(op, format!("caches of {n_slots} slots"), other.slots.len()));
        }
        let mut merged = Self::new(n_slots);
        if caches.iter().all(Self::is_empty) {
            merged.left_padding = Some(Array::zeros(&[caches.len() as i32], Dtype::I32)?);
            return Ok(merged);
        }
        for (at, slot) in merged.slots.iter_mut().enumerate() {
            let mut set = caches.iter().filter_map(|cache| cache.slots[at].as_ref());
            let Some(like) = set.next() else { continue };
            let rows = caches.iter().map(|cache| part(op, cache.slots[at].as_ref(), like, 1, Some(like.dtype())));
            let rows = rows.collect::<Result<Vec<_>>>()?;
            *slot = Some(Array::concatenate(&rows.iter().collect::<Vec<_>>(), 0)?);
        }
        Ok(merged)
    }

    /// Assigns the padding.
    ///
    /// # Errors
    /// [`Error::Value`] unless it is an array of integers `(B,)`.
    pub fn set_left_padding(&mut self, left_padding: Option<Array>) -> Result<()> {
        self.left_padding = per_sequence("left_padding", left_padding)?;
        Ok(())
    }

    /// Assigns the lengths.
    ///
    /// # Errors
    /// [`Error::Value`] unless they are an array of integers `(B,)`.
    pub fn set_lengths(&mut self, lengths: Option<Array>) -> Result<()> {
        self.lengths = per_sequence("lengths", lengths)?;
        Ok(())
    }

    /// The place of the sequence at `index`.
    fn row(&self, op: &'static str, index: i64) -> Result<usize> {
        let size = self.batch_size();
        let row = if index < 0 { index + size as i64 } else { index };
        let row = usize::try_from(row).ok().filter(|&row| row < size);
        row.ok_or_else(|| Error::value(op, format!("an index of one of {size} sequences"), index))
    }

    /// The same with every array replaced by what `f` makes of it; every one must hold the whole batch.
    fn map(&self, f: impl Fn(&Array) -> Result<Array>) -> Result<Self> {
        let size = self.batch_size();
        let one = |array: &Option<Array>| {
            let Some(array) = array else { return Ok(None) };
            if array.dim_or(0) != size {
                return Err(Error::value("ArraysCache", format!("arrays of {size} sequences"), format!("{array:?}")));
            }
            f(array).map(Some)
        };
        Ok(Self {
            slots: self.slots.iter().map(one).collect::<Result<_>>()?,
            left_padding: one(&self.left_padding)?,
            lengths: one(&self.lengths)?,
        })
    }
}

/// The `size` sequences that an array brings to a batch of arrays like `like`, zeros if there is none.
fn part(op: &'static str, array: Option<&Array>, like: &Array, size: usize, dtype: Option<Dtype>) -> Result<Array> {
    let mut shape = like.shape().to_vec();
    if let Some(first) = shape.first_mut() {
        *first = size as i32;
    }
    match array {
        None => Array::zeros(&shape, like.dtype()),
        Some(array) if array.shape() != shape || shape.is_empty() => {
            Err(Error::value(op, format!("arrays {shape:?}"), format!("{:?}", array.shape())))
        }
        Some(array) => dtype.map_or_else(|| Ok(array.clone()), |dtype| array.astype(dtype)),
    }
}

const fn is_integer(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::I32 | Dtype::I64)
}

/// An array `(B,)` that is being assigned.
fn per_sequence(op: &'static str, array: Option<Array>) -> Result<Option<Array>> {
    match array {
        // MLX's arrays of nothing are floats.
        Some(array) if array.shape() != [0] && (array.shape().len() != 1 || !is_integer(array.dtype())) => {
            Err(Error::value(op, "an int32 or int64 array (B,)", format!("{array:?}")))
        }
        array => Ok(array),
    }
}

impl LayerCache for ArraysCache {
    fn reference_class_name(&self) -> &'static str {
        "ArraysCache"
    }

    fn state(&self) -> State<Array> {
        let slots = self.slots.iter().map(|slot| array_state(slot.as_ref())).collect();
        let padding = [&self.left_padding, &self.lengths].map(|array| array_state(array.as_ref()));
        State::List(std::iter::once(State::List(slots)).chain(padding).collect())
    }

    fn set_state(&mut self, state: State<Array>) -> Result<()> {
        let mut fields = checked_fields(self.reference_class_name(), state)?.into_iter();
        let mut next = || fields.next().unwrap_or(State::None);
        let slots = if let State::List(slots) = next() { slots.into_iter().map(array_field).collect() } else { vec![] };
        *self = Self { slots, left_padding: array_field(next()), lengths: array_field(next()) };
        Ok(())
    }

    fn buffers(&self) -> Vec<&Array> {
        self.slots.iter().flatten().chain(&self.left_padding).chain(&self.lengths).collect()
    }

    /// Bytes of the slots alone.
    fn nbytes(&self) -> usize {
        self.slots.iter().flatten().map(Array::n_bytes).sum()
    }

    /// True if no slot is set.
    fn is_empty(&self) -> bool {
        self.slots.iter().all(Option::is_none)
    }

    fn size(&self) -> usize {
        0
    }

    fn is_trimmable(&self) -> bool {
        false
    }

    fn trim(&mut self, n: usize) -> Result<usize> {
        if n == 0 {
            return Ok(0);
        }
        Err(Error::value("ArraysCache.trim", "0 tokens: a recurrent state cannot go back", n))
    }

    fn checkpoint(&self, _n_tokens: usize) -> Checkpoint {
        Checkpoint::whole(self)
    }

    fn rollback(&mut self, checkpoint: Checkpoint) {
        checkpoint.put_back(self, |cache| if let Cache::Arrays(cache) = cache { Some(cache) } else { None });
    }

    fn copy(&self) -> Cache {
        Cache::Arrays(self.clone())
    }
}
