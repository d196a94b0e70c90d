//! `RotatingKVCache`: the newest tokens in a ring, behind a few first ones that stay.

use super::plan::{Ring, Segment};
use super::tensor::check_update;
use super::{
    Cache, Checkpoint, KvCache, KvTensor, LayerCache, MaskMode, STEP, Scheme, State, checked_fields, count_field, mask,
    nothing_yet, settle,
};
use crate::array::Array;
use crate::error::{Error, Result};

/// Keys and values `(B, H, L, D)` of the last `max_size` tokens; single tokens are written over the oldest row. With a
/// scheme this is `QuantizedRotatingKVCache`, which mlx-lm lacks: each row is quantized once, when it comes.
#[derive(Clone, Debug)]
pub struct RotatingKvCache {
    keys: Option<KvTensor>,
    values: Option<KvTensor>,
    ring: Ring,
    /// How rows are quantized when they come; None if they are not.
    scheme: Option<Scheme>,
    /// Rows by which the buffers grow until they hold `max_size`; at least 1.
    pub step: usize,
}

impl RotatingKvCache {
    /// An empty ring of `max_size` rows, of which the first `keep` are never overwritten.
    ///
    /// # Errors
    /// [`Error::Value`] unless `keep < max_size`: no row would be left for new tokens.
    pub fn new(max_size: usize, keep: usize) -> Result<Self> {
        if keep >= max_size {
            let got = format!("max_size={max_size}, keep={keep}");
            return Err(Error::value("RotatingKVCache", "0 <= keep < max_size", got));
        }
        Ok(Self { ring: Ring::new(max_size, keep), ..Self::unset(None) })
    }

    /// A ring that waits for its state.
    pub(super) const fn unset(scheme: Option<Scheme>) -> Self {
        Self { keys: None, values: None, ring: Ring::new(1, 0), scheme, step: STEP }
    }

    /// The same ring with every row affine-quantized, those that wait to be overwritten too: its rows stay in place.
    ///
    /// # Errors
    /// [`Error::Value`] if MLX does not support the sizes, or if the rows are quantized already.
    pub fn to_quantized(&self, scheme: Scheme) -> Result<Self> {
        let op = "to_quantized";
        let quantize = |rows: &KvTensor| scheme.quantize(dense_rows(op, rows)?);
        if let (Some(keys), Some(values)) = (&self.keys, &self.values) {
            scheme.check(op, dense_rows(op, keys)?, dense_rows(op, values)?)?;
        }
        let keys = self.keys.as_ref().map(quantize).transpose()?;
        let values = self.values.as_ref().map(quantize).transpose()?;
        Ok(Self { keys, values, scheme: Some(scheme), ..self.clone() })
    }

    /// How rows are quantized; None if they are not.
    pub const fn scheme(&self) -> Option<Scheme> {
        self.scheme
    }

    /// Where the ring stands.
    pub const fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Assigns the position; [`update`](KvCache::update) checks that it fits the buffers.
    pub fn set_ring(&mut self, ring: Ring) {
        self.ring = Ring { len: self.ring.len, ..ring };
    }

    /// The newest `n` rows of keys and values, oldest first.
    pub(super) fn newest(&self, n: usize) -> Result<[KvTensor; 2]> {
        let (Some(keys), Some(values)) = (&self.keys, &self.values) else { return Err(nothing_yet()) };
        let order = self.ring.temporal_order();
        let len: usize = order.iter().map(|(from, to)| to - from).sum();
        let newest = |rows: &KvTensor| match n {
            0 => rows.rows(0, 0),
            n => join(rows, &order, None)?.rows(len.saturating_sub(n), len),
        };
        Ok([newest(keys)?, newest(values)?])
    }

    /// One token written in place.
    fn place(&self, new: [&KvTensor; 2]) -> Result<([KvTensor; 2], Ring)> {
        let place = self.ring.place(self.step);
        let write = |buffer: Option<&KvTensor>, new: &KvTensor| match (buffer, &place.cut) {
            (None, _) => new.zeros_like(place.added)?.with_rows(new, place.row),
            // A ring that still grows is not too long, and one that is too long does not grow.
            (Some(buffer), Some(cut)) => join(buffer, cut, None)?.with_rows(new, place.row),
            (Some(buffer), None) if place.added > 0 => buffer.padded(place.added, new)?.with_rows(new, place.row),
            (Some(buffer), None) => buffer.with_rows(new, place.row),
        };
        let arrays = [write(self.keys.as_ref(), new[0])?, write(self.values.as_ref(), new[1])?];
        Ok((arrays, place.after))
    }

    /// Several tokens appended in temporal order.
    fn append(&self, new: [&KvTensor; 2], n_tokens: usize) -> Result<([KvTensor; 2], Ring)> {
        let append = self.ring.append(n_tokens);
        let write = |buffer: Option<&KvTensor>, new: &KvTensor| match buffer {
            None => Ok(new.clone()),
            Some(buffer) => join(buffer, &append.kept, Some(new)),
        };
        let arrays = [write(self.keys.as_ref(), new[0])?, write(self.values.as_ref(), new[1])?];
        Ok((arrays, append.after))
    }

    /// New keys and values in the form of the buffers.
    fn encode(&self, op: &'static str, keys: &Array, values: &Array) -> Result<[KvTensor; 2]> {
        let Some(scheme) = self.scheme else {
            return Ok([KvTensor::Dense(keys.clone()), KvTensor::Dense(values.clone())]);
        };
        scheme.check(op, keys, values)?;
        let new = [scheme.quantize(keys)?, scheme.quantize(values)?];
        for (buffer, new) in [&self.keys, &self.values].into_iter().zip(&new) {
            buffer.as_ref().map_or(Ok(()), |buffer| buffer.check_widths(op, new))?;
        }
        Ok(new)
    }
}

/// Rows that are not quantized.
fn dense_rows<'a>(op: &'static str, rows: &'a KvTensor) -> Result<&'a Array> {
    match rows {
        KvTensor::Dense(array) => Ok(array),
        KvTensor::Quantized(_) => Err(Error::value(op, "rows that are not quantized", "quantized ones")),
    }
}

/// The rows of `segments`, then those of `last`.
fn join(buffer: &KvTensor, segments: &[Segment], last: Option<&KvTensor>) -> Result<KvTensor> {
    let segments: Vec<_> = segments.iter().filter(|(from, to)| from < to).collect();
    let joined = |buffer: &Array, last: Option<&Array>| {
        let kept = segments.iter().map(|&&(from, to)| buffer.rows(from, to)).collect::<Result<Vec<_>>>()?;
        match (kept.as_slice(), last) {
            // Joining with nothing still lets the dtypes promote, as mlx-lm's concatenation does.
            ([], Some(last)) => Array::concatenate(&[&buffer.rows(0, 0)?, last], 2),
            ([only], None) => Ok(only.clone()),
            _ => Array::concatenate(&kept.iter().chain(last).collect::<Vec<_>>(), 2),
        }
    };
    match last {
        Some(last) => buffer.try_zip(last, |buffer, last| joined(buffer, Some(last))),
        None => buffer.try_map(|buffer| joined(buffer, None)),
    }
}

impl LayerCache for RotatingKvCache {
    fn reference_class_name(&self) -> &'static str {
        if self.scheme.is_some() { "QuantizedRotatingKVCache" } else { "RotatingKVCache" }
    }

    fn state(&self) -> State<Array> {
        let Ring { offset, index, max_size, keep, .. } = self.ring;
        let scheme = self.scheme.map(|scheme| [scheme.group_size(), scheme.bits()]);
        let counts = [offset, keep, max_size, index].into_iter().chain(scheme.into_iter().flatten());
        let arrays = [&self.keys, &self.values].map(|rows| KvTensor::to_state(rows.as_ref()));
        State::List(arrays.into_iter().chain(counts.map(|count| State::Int(count as i64))).collect())
    }

    fn set_state(&mut self, state: State<Array>) -> Result<()> {
        let class = self.reference_class_name();
        let mut fields = checked_fields(class, state)?.into_iter();
        let mut next = || fields.next().unwrap_or(State::None);
        let (keys, values) = (KvTensor::from_state(next()), KvTensor::from_state(next()));
        let mut count = || count_field(&next());
        let (offset, keep, max_size, index) = (count(), count(), count(), count());
        let scheme = self.scheme.map(|_| Scheme::new(class, count(), count())).transpose()?;
        let len = keys.as_ref().map(KvTensor::len);
        *self = Self { keys, values, ring: Ring { offset, index, len, max_size, keep }, scheme, step: self.step };
        Ok(())
    }

    fn buffers(&self) -> Vec<&Array> {
        self.keys.iter().chain(&self.values).flat_map(KvTensor::arrays).collect()
    }

    fn size(&self) -> usize {
        self.ring.offset.min(self.ring.max_size)
    }

    fn is_trimmable(&self) -> bool {
        !self.ring.is_wrapped()
    }

    fn trim(&mut self, n: usize) -> Result<usize> {
        if self.ring.is_wrapped() && n > 0 {
            let expected = format!("fewer than max_size={} tokens, so that no row was overwritten", self.ring.max_size);
            return Err(Error::value("RotatingKVCache.trim", expected, self.ring.offset));
        }
        let n = n.min(self.ring.offset);
        self.ring = self.ring.trimmed(n);
        Ok(n)
    }

    fn checkpoint(&self, n_tokens: usize) -> Checkpoint {
        // Unless rows are overwritten or dropped, those before the offset outlive the update.
        Checkpoint::at_offset(self, self.ring.offset + n_tokens >= self.ring.max_size)
    }

    fn rollback(&mut self, checkpoint: Checkpoint) {
        let whole = |cache| if let Cache::Rotating(cache) = cache { Some(cache) } else { None };
        if let Some(offset) = checkpoint.put_back(self, whole) {
            settle(self.keys.iter_mut().chain(&mut self.values).flat_map(KvTensor::arrays_mut));
            let len = self.keys.as_ref().map(KvTensor::len);
            self.ring = Ring { offset, index: offset, len, ..self.ring };
        }
    }

    fn copy(&self) -> Cache {
        Cache::Rotating(self.clone())
    }
}

impl KvCache for RotatingKvCache {
    fn offset(&self) -> usize {
        self.ring.offset
    }

    fn update(&mut self, keys: &Array, values: &Array) -> Result<(KvTensor, KvTensor)> {
        let op = match self.scheme {
            None => "RotatingKVCache.update_and_fetch",
            Some(_) => "QuantizedRotatingKVCache.update_and_fetch",
        };
        self.ring.check().map_err(|(expected, got)| Error::value(op, expected, got))?;
        let buffers = [&self.keys, &self.values].map(|rows| rows.as_ref().map(|rows| &rows.arrays()[0]));
        let counts = (self.ring.offset, self.ring.written());
        let update = check_update(op, [keys, values], buffers, counts, self.scheme.is_some())?;
        let [keys, values] = &self.encode(op, keys, values)?;
        let ([keys, values], ring) = match update.n_tokens {
            1 => self.place([keys, values])?,
            n_tokens => self.append([keys, values], n_tokens)?,
        };
        let seen = (keys.rows(0, ring.written())?, values.rows(0, ring.written())?);
        (self.keys, self.values, self.ring) = (Some(keys), Some(values), ring);
        Ok(seen)
    }

    fn keys(&self) -> Option<KvTensor> {
        self.keys.clone()
    }

    fn values(&self) -> Option<KvTensor> {
        self.values.clone()
    }

    fn set_keys(&mut self, keys: Option<KvTensor>) -> Result<()> {
        self.keys = KvTensor::assigned("keys", keys, self.scheme.is_some())?;
        self.ring.len = self.keys.as_ref().map(KvTensor::len);
        Ok(())
    }

    fn set_values(&mut self, values: Option<KvTensor>) -> Result<()> {
        self.values = KvTensor::assigned("values", values, self.scheme.is_some())?;
        Ok(())
    }

    fn keys_and_values(&self) -> Result<(KvTensor, KvTensor)> {
        let (Some(keys), Some(values)) = (&self.keys, &self.values) else { return Err(nothing_yet()) };
        Ok((keys.rows(0, self.ring.written())?, values.rows(0, self.ring.written())?))
    }

    fn set_offset(&mut self, offset: usize) -> Result<()> {
        self.ring.offset = offset;
        Ok(())
    }

    fn make_mask(&self, n_tokens: usize, window: Option<usize>, return_array: bool) -> Result<MaskMode> {
        let Ring { offset, max_size, keep, .. } = self.ring;
        let window = window.filter(|&window| window > 0);
        if n_tokens == 1 {
            // Every row that the ring holds is visible, unless the model looks back less far.
            let hides = |&window: &usize| offset >= window && (keep > 0 || max_size > window);
            let Some(window) = window.filter(hides) else {
                return Ok(MaskMode::None);
            };
            return mask_one(&self.ring, window).map(MaskMode::Array);
        }
        let before = offset.min(max_size - 1);
        let aligned = keep == 0 || offset < max_size;
        if aligned && !return_array && before + n_tokens <= window.unwrap_or(max_size) {
            return Ok(MaskMode::Causal);
        }
        if keep == 0 {
            return mask::causal(n_tokens, before, Some(window.unwrap_or(max_size))).map(MaskMode::Array);
        }
        let [(_, kept), newest] = self.ring.positions_of_append(n_tokens);
        let split = if kept == 0 { keep.min(newest.1) } else { kept };
        let rows = if kept == 0 { [(0, split), (split, newest.1)] } else { [(0, kept), newest] };
        mask::kept_and_recent(n_tokens, offset, rows, window, max_size - keep).map(MaskMode::Array)
    }

    fn max_size(&self) -> Option<usize> {
        Some(self.ring.max_size)
    }
}

/// The rows `(K,)` that one token sees `window` tokens back, once it is placed.
fn mask_one(ring: &Ring, window: usize) -> Result<Array> {
    let Ring { offset, max_size, keep, .. } = *ring;
    if !ring.is_wrapped() {
        return mask::ranges(offset + 1, &[(offset + 1 - window, offset + 1)]);
    }
    let row = ring.place(STEP).row;
    // Newest rows end at `row`; what does not fit before it wraps to the end of the ring.
    let recent = window.min(max_size - keep);
    let before = recent.min(row + 1 - keep);
    let wrapped = recent - before;
    let sinks = (keep + window).saturating_sub(offset + 1).min(keep);
    mask::ranges(max_size, &[(row + 1 - before, row + 1), (max_size - wrapped, max_size), (keep - sinks, keep)])
}
