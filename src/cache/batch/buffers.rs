//! Keys and values of a batch, which go through every operation together.

use crate::array::{Array, Dtype};
use crate::cache::plan::Growth;
use crate::cache::tensor::{Update, check_update};
use crate::cache::{KvTensor, Scheme, State, nothing_yet};
use crate::error::{Error, Result};

/// Keys and values `(B, H, L, D)`. Each can be assigned, so one may be missing or unfit until the next update tells.
#[derive(Clone, Debug, Default)]
pub(super) struct Buffers {
    pub keys: Option<KvTensor>,
    pub values: Option<KvTensor>,
    /// How rows are quantized when they come; None if they are not.
    pub scheme: Option<Scheme>,
}

impl Buffers {
    pub(super) const fn new(scheme: Option<Scheme>) -> Self {
        Self { keys: None, values: None, scheme }
    }

    /// Buffers of the entries of a checked state.
    pub(super) fn from_state(keys: State<Array>, values: State<Array>, scheme: Option<Scheme>) -> Self {
        Self { keys: KvTensor::from_state(keys), values: KvTensor::from_state(values), scheme }
    }

    pub(super) fn state(&self) -> [State<Array>; 2] {
        [&self.keys, &self.values].map(|rows| KvTensor::to_state(rows.as_ref()))
    }

    pub(super) fn arrays(&self) -> Vec<&Array> {
        self.keys.iter().chain(&self.values).flat_map(KvTensor::arrays).collect()
    }

    /// Rows of the keys; None if there are none.
    pub(super) fn len(&self) -> Option<usize> {
        self.keys.as_ref().map(KvTensor::len)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_none() && self.values.is_none()
    }

    /// The first `n` rows of both.
    pub(super) fn seen(&self, n: usize) -> Result<(KvTensor, KvTensor)> {
        let (Some(keys), Some(values)) = (&self.keys, &self.values) else { return Err(nothing_yet()) };
        Ok((keys.rows(0, n)?, values.rows(0, n)?))
    }

    /// What `f` makes of each of the two.
    pub(super) fn try_map(&self, f: impl Fn(&KvTensor) -> Result<KvTensor>) -> Result<Self> {
        let map = |rows: &Option<KvTensor>| rows.as_ref().map(&f).transpose();
        Ok(Self { keys: map(&self.keys)?, values: map(&self.values)?, scheme: self.scheme })
    }

    /// What `f` makes of each of the two, if any, and what is new to it.
    pub(super) fn try_zip(
        &self,
        new: &[KvTensor; 2],
        f: impl Fn(Option<&KvTensor>, &KvTensor) -> Result<KvTensor>,
    ) -> Result<Self> {
        let keys = Some(f(self.keys.as_ref(), &new[0])?);
        Ok(Self { keys, values: Some(f(self.values.as_ref(), &new[1])?), scheme: self.scheme })
    }

    /// Checks new keys and values for a batch of `n_sequences`, and brings them into the form of the buffers.
    pub(super) fn encode(
        &self,
        op: &'static str,
        new: [&Array; 2],
        n_sequences: usize,
        counts: (usize, usize),
    ) -> Result<([KvTensor; 2], Update)> {
        let first = [&self.keys, &self.values].map(|rows| rows.as_ref().map(|rows| &rows.arrays()[0]));
        let update = check_update(op, new, first, counts, self.scheme.is_some())?;
        // mlx-lm lets a batch hold more rows than it has numbers for.
        if new[0].dim(0) < n_sequences {
            return Err(Error::value(op, format!("rows of {n_sequences} sequences"), new[0].dim(0)));
        }
        let Some(scheme) = self.scheme else { return Ok((new.map(|rows| KvTensor::Dense(rows.clone())), update)) };
        scheme.check(op, new[0], new[1])?;
        let new = [scheme.quantize(new[0])?, scheme.quantize(new[1])?];
        for (buffer, new) in [&self.keys, &self.values].into_iter().zip(&new) {
            buffer.as_ref().map_or(Ok(()), |buffer| buffer.check_widths(op, new))?;
        }
        Ok((new, update))
    }

    /// These, grown as planned, with `new` written at row `at`.
    pub(super) fn written(&self, growth: Option<Growth>, new: &[KvTensor; 2], at: usize) -> Result<Self> {
        self.try_zip(new, |buffer, new| match (buffer, growth) {
            (Some(buffer), None) => buffer.with_rows(new, at),
            (Some(buffer), Some(Growth { kept, added })) => {
                buffer.rows(0, kept)?.padded(added, new)?.with_rows(new, at)
            }
            (None, growth) => new.zeros_like(growth.map_or(0, |growth| growth.added))?.with_rows(new, at),
        })
    }

    /// The sequences at `indices`, from row `from` on.
    pub(super) fn chosen(&self, indices: &[usize], from: usize) -> Result<Self> {
        let indices: Vec<_> = indices.iter().map(|&at| at as i32).collect();
        let indices = Array::from_i32(&indices)?;
        self.try_map(|rows| rows.rows(from, rows.len())?.try_map(|array| array.take(&indices, 0)))
    }

    /// Rows of sequence `b` moved `by[b]` places up; what falls off the end comes in at the front.
    pub(super) fn rolled(&self, by: &[i32]) -> Result<Self> {
        let by = Array::from_i32(by)?;
        self.try_map(|rows| if rows.is_empty() { Ok(rows.clone()) } else { rows.try_map(|array| array.roll_rows(&by)) })
    }

    /// Rows `from .. to` of sequence `at` alone, in memory of their own.
    pub(super) fn extracted(&self, at: usize, from: usize, to: usize) -> Result<[KvTensor; 2]> {
        let (Some(keys), Some(values)) = (&self.keys, &self.values) else { return Err(nothing_yet()) };
        let one = |array: &Array| array.take_first_axis(at, at + 1)?.rows(from, to)?.contiguous();
        Ok([keys.try_map(one)?, values.try_map(one)?])
    }

    /// Checks that there are rows of just `n_sequences`, or none.
    pub(super) fn check_sequences(&self, op: &'static str, n_sequences: usize) -> Result<()> {
        let n_rows = self.keys.as_ref().map(|rows| rows.arrays()[0].dim(0));
        match n_rows.filter(|&n_rows| n_rows != n_sequences) {
            None => Ok(()),
            Some(n_rows) => Err(Error::value(op, format!("rows of {n_sequences} sequences"), n_rows)),
        }
    }

    /// The sequences of both, each moved to the right by its shift and of `len` rows; one side may be empty, and then
    /// has `n_sequences`.
    pub(super) fn joined(&self, other: &Self, sides: [Side; 2], len: usize) -> Result<Self> {
        let op = "extend";
        let (mine, others) = (self.both(op)?, other.both(op)?);
        if let (Some(mine), Some(others)) = (mine, others) {
            for (mine, other) in mine.iter().zip(others) {
                check_sizes(op, mine, other)?;
            }
        }
        // As mlx-lm has it, the rows that an empty side gets are of the keys' type, for the values too.
        let key_dtype = mine.or(others).map(|rows| rows[0].arrays()[0].dtype());
        let join = |mine: Option<&KvTensor>, other: Option<&KvTensor>| -> Result<Option<KvTensor>> {
            let Some(like) = mine.or(other) else { return Ok(None) };
            let parts = [mine, other].into_iter().zip(&sides).map(|(rows, side)| match rows {
                Some(rows) => rows.try_map(|array| side.placed(array, len)),
                None => like.try_map(|like| {
                    let dtype = if self.scheme.is_some() { None } else { key_dtype };
                    side.zeros(like, len, dtype.unwrap_or(like.dtype()))
                }),
            });
            let parts = parts.collect::<Result<Vec<_>>>()?;
            parts[0].try_zip(&parts[1], |a, b| Array::concatenate(&[a, b], 0)).map(Some)
        };
        let pick = |rows: Option<[&'_ KvTensor; 2]>, at: usize| rows.map(|rows| rows[at].clone());
        let keys = join(pick(mine, 0).as_ref(), pick(others, 0).as_ref())?;
        let values = join(pick(mine, 1).as_ref(), pick(others, 1).as_ref())?;
        Ok(Self { keys, values, scheme: self.scheme })
    }

    /// Keys and values, or neither.
    fn both(&self, op: &'static str) -> Result<Option<[&KvTensor; 2]>> {
        match (&self.keys, &self.values) {
            (None, None) => Ok(None),
            (Some(keys), Some(values)) if keys.arrays()[0].shape()[..3] == values.arrays()[0].shape()[..3] => {
                Ok(Some([keys, values]))
            }
            _ => Err(Error::value(op, "keys and values of one batch and length, or neither", format!("{self:?}"))),
        }
    }
}

/// Where the rows of one of two batches go in the joined one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Side {
    /// Rows by which its rows move to the right.
    pub shift: usize,
    /// Its sequences, for a side without rows.
    pub n_sequences: usize,
}

impl Side {
    /// `array` behind `shift` rows of zeros, cut or filled up to `len` rows.
    fn placed(self, array: &Array, len: usize) -> Result<Array> {
        let kept = array.dim(2).min(len - self.shift);
        let (before, after) = (self.shift, len - self.shift - kept);
        if (before, after) == (0, 0) {
            return array.rows(0, kept);
        }
        let zeros = |rows| crate::cache::zero_rows(array, rows, array.dtype());
        Array::concatenate(&[&zeros(before)?, &array.rows(0, kept)?, &zeros(after)?], 2)
    }

    /// `len` rows of zeros, sized as `like`'s.
    fn zeros(self, like: &Array, len: usize, dtype: Dtype) -> Result<Array> {
        let shape = like.shape();
        Array::zeros(&[self.n_sequences as i32, shape[1], len as i32, shape[3]], dtype)
    }
}

/// Checks that two tensors agree in heads and head size, and in whether and how they are quantized.
pub(super) fn check_sizes(op: &'static str, one: &KvTensor, other: &KvTensor) -> Result<()> {
    let sizes = |rows: &KvTensor| rows.arrays().iter().map(|array| [array.dim(1), array.dim(3)]).collect::<Vec<_>>();
    if sizes(one) == sizes(other) {
        return Ok(());
    }
    let shapes = |rows: &KvTensor| format!("{:?}", rows.arrays());
    Err(Error::value(op, format!("heads and head sizes of {}", shapes(one)), shapes(other)))
}
