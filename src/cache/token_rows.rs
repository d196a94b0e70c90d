//! Which tokens' rows a cache holds, and how a cache is put together from rows again: what a store of blocks needs.

use super::plan::{Ring, round_up};
use super::{Cache, CacheState, KvTensor, STEP, State};
use crate::array::Array;
use crate::error::{Error, Result};
use std::ops::Range;

/// Consecutive tokens that lie in consecutive rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The tokens, counted from the first of the prompt.
    pub tokens: Range<usize>,
    /// Row of the first.
    pub row: usize,
}

/// How far back a layer looks, and so which rows a cache at a boundary must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookback {
    /// All tokens.
    All,
    /// The first `keep`, and the newest `n`.
    Window {
        /// First tokens that stay.
        keep: usize,
        /// Newest tokens.
        n: usize,
    },
    /// The cache has no rows: it is a state, which is kept or restored as a whole.
    Whole,
}

/// A cache at one boundary, rows left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// Tokens before it.
    pub n_tokens: usize,
    /// What the class remembers beside the count: the next row of a ring that has wrapped, the first token of a chunk.
    /// None where it follows from the count.
    pub phase: Option<usize>,
}

impl Cache {
    /// What the layer looks back at; None for a cache that no store can cut: a batch, or a list, whose children count.
    pub fn lookback(&self) -> Option<Lookback> {
        Some(match self {
            Self::Standard(_) | Self::Quantized(_) | Self::Concatenate(_) => Lookback::All,
            Self::Rotating(cache) => {
                let Ring { keep, max_size, .. } = *cache.ring();
                Lookback::Window { keep, n: max_size - keep }
            }
            Self::Chunked(cache) => Lookback::Window { keep: 0, n: cache.chunk_size() },
            Self::Arrays(_) => Lookback::Whole,
            Self::List(_) | Self::Batch(_) | Self::BatchRotating(_) => return None,
        })
    }

    /// Class and parameters in one line: caches with the same are put together from the same rows.
    pub fn signature(&self) -> String {
        let class = self.as_dyn().reference_class_name();
        match self {
            Self::Quantized(cache) => format!("{class}/{}/{}", cache.scheme().group_size(), cache.scheme().bits()),
            Self::Rotating(cache) => {
                let Ring { keep, max_size, .. } = *cache.ring();
                let scheme = cache.scheme().map(|scheme| format!("/{}/{}", scheme.group_size(), scheme.bits()));
                format!("{class}/{max_size}/{keep}{}", scheme.unwrap_or_default())
            }
            Self::Chunked(cache) => format!("{class}/{}", cache.chunk_size()),
            Self::Arrays(cache) => format!("{class}/{}", cache.slots.len()),
            _ => class.to_owned(),
        }
    }

    /// Where the cache stands; None if it has no rows.
    pub fn boundary(&self) -> Option<Boundary> {
        let n_tokens = self.as_kv().ok()?.offset();
        let phase = match self {
            Self::Rotating(cache) => {
                let ring = cache.ring();
                let is_rotated = ring.len == Some(ring.max_size) && ring.index < ring.max_size && ring.is_wrapped();
                is_rotated.then_some(ring.index)
            }
            Self::Chunked(cache) => Some(cache.start_position),
            _ => None,
        };
        Some(Boundary { n_tokens, phase })
    }

    /// Where the rows of the tokens lie, oldest first; empty if there are none.
    pub fn runs(&self) -> Vec<Run> {
        match self {
            Self::Rotating(cache) => ring_runs(cache.ring()),
            Self::Chunked(cache) if cache.start_position <= cache.offset => {
                vec![Run { tokens: cache.start_position..cache.offset, row: 0 }]
            }
            Self::Standard(_) | Self::Quantized(_) | Self::Concatenate(_) => {
                vec![Run { tokens: 0..self.as_dyn().size(), row: 0 }]
            }
            _ => Vec::new(),
        }
    }

    /// The first token from which on every row up to `end` is held; `end` if its own row is not.
    pub fn held_from(&self, end: usize) -> usize {
        let mut from = end;
        for run in self.runs().iter().rev() {
            if run.tokens.start < from && run.tokens.end >= from {
                from = run.tokens.start;
            }
        }
        from
    }

    /// Keys and values of some tokens, in their order. Lazy; the slices share the cache's buffers.
    ///
    /// # Errors
    /// [`Error::Value`] unless the rows of all these tokens are held, [`Error::Mlx`] if MLX fails.
    pub fn token_rows(&self, tokens: &Range<usize>) -> Result<[KvTensor; 2]> {
        let op = "token_rows";
        let kv = self.as_kv()?;
        let (Some(keys), Some(values)) = (kv.keys(), kv.values()) else { return Err(super::nothing_yet()) };
        let mut rows = Vec::new();
        let mut at = tokens.start;
        for run in self.runs() {
            if at < tokens.end && run.tokens.contains(&at) {
                let end = tokens.end.min(run.tokens.end);
                rows.push((run.row + at - run.tokens.start, run.row + end - run.tokens.start));
                at = end;
            }
        }
        if at < tokens.end {
            return Err(Error::value(op, format!("rows of the tokens {tokens:?}"), format!("{:?}", self.runs())));
        }
        let cut = |array: &Array| {
            if let [(from, to)] = rows[..] {
                return array.rows(from, to);
            }
            let parts = rows.iter().map(|&(from, to)| array.rows(from, to)).collect::<Result<Vec<_>>>()?;
            Array::concatenate(&parts.iter().collect::<Vec<_>>(), 2)
        };
        Ok([keys.try_map(cut)?, values.try_map(cut)?])
    }

    /// Where a cache like this one wants the rows at `boundary`, and how many rows its buffers then have: those that
    /// hold tokens, and with padding.
    pub fn runs_at(&self, boundary: &Boundary) -> (Vec<Run>, [usize; 2]) {
        let n = boundary.n_tokens;
        match self {
            Self::Rotating(cache) => {
                let runs = ring_runs(&ring_at(cache.ring(), boundary));
                let rows = n.min(cache.ring().max_size);
                (runs, [rows, rows])
            }
            Self::Chunked(cache) => {
                let start = boundary.phase.unwrap_or_else(|| n.saturating_sub(cache.chunk_size())).min(n);
                (vec![Run { tokens: start..n, row: 0 }], [n - start, round_up(n - start, STEP)])
            }
            Self::Concatenate(_) => (vec![Run { tokens: 0..n, row: 0 }], [n, n]),
            _ => (vec![Run { tokens: 0..n, row: 0 }], [n, round_up(n, STEP)]),
        }
    }

    /// A cache of this one's class and parameters with these buffers, which are laid out as [`runs_at`](Self::runs_at)
    /// says.
    ///
    /// # Errors
    /// [`Error::Value`] if the buffers do not fit the class.
    pub fn at_boundary(&self, boundary: &Boundary, keys: &KvTensor, values: &KvTensor) -> Result<Self> {
        let n = State::Int(boundary.n_tokens as i64);
        let mut fields = vec![KvTensor::to_state(Some(keys)), KvTensor::to_state(Some(values))];
        let int = |value: usize| State::Int(value as i64);
        match self {
            Self::Concatenate(_) => {}
            Self::Standard(_) => fields.push(n),
            Self::Quantized(cache) => {
                fields.extend([n, int(cache.scheme().group_size()), int(cache.scheme().bits())]);
            }
            Self::Chunked(cache) => {
                let (runs, _) = self.runs_at(boundary);
                let start = runs.first().map_or(0, |run| run.tokens.start);
                fields.extend([n, int(cache.chunk_size()), int(start)]);
            }
            Self::Rotating(cache) => {
                let ring = ring_at(cache.ring(), boundary);
                fields.extend([n, int(ring.keep), int(ring.max_size), int(ring.index)]);
                fields.extend(
                    cache.scheme().into_iter().flat_map(|scheme| [scheme.group_size(), scheme.bits()]).map(int),
                );
            }
            Self::Arrays(_) | Self::List(_) | Self::Batch(_) | Self::BatchRotating(_) => {
                return Err(Error::value("restore", "a cache with rows", self.as_dyn().reference_class_name()));
            }
        }
        let class = self.as_dyn().reference_class_name().to_owned();
        let mut cache = Self::from_state(CacheState { class, state: State::List(fields) })?;
        cache.set_step(self.step());
        Ok(cache)
    }
}

/// A ring like `ring` at a boundary: its rows in temporal order unless the boundary has another phase.
fn ring_at(ring: &Ring, boundary: &Boundary) -> Ring {
    let len = boundary.n_tokens.min(ring.max_size);
    let index =
        boundary.phase.filter(|_| boundary.n_tokens >= ring.max_size).unwrap_or(len).clamp(ring.keep.min(len), len);
    Ring { offset: boundary.n_tokens, index, len: Some(len), ..*ring }
}

/// Tokens of the rows of a ring, in temporal order.
fn ring_runs(ring: &Ring) -> Vec<Run> {
    let order = ring.temporal_order();
    let rows: usize = order.iter().map(|(from, to)| to - from).sum();
    // A row that is behind those that stay holds as many tokens back as there are rows to the end.
    let dropped = ring.offset.saturating_sub(rows);
    let mut runs: Vec<Run> = Vec::new();
    let mut add = |tokens: Range<usize>, row: usize| {
        if !tokens.is_empty() {
            runs.push(Run { tokens, row });
        }
    };
    let mut seen = 0;
    for (from, to) in order {
        let len = to - from;
        let kept = if dropped > 0 { ring.keep.saturating_sub(seen).min(len) } else { len };
        add(seen..seen + kept, from);
        add(seen + kept + dropped..seen + len + dropped, from + kept);
        seen += len;
    }
    runs
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that fails shall stop")]
mod tests {
    use super::*;
    use crate::array::Dtype;
    use crate::cache::{ChunkedKvCache, KvCache as _, RotatingKvCache};
    use proptest::prelude::*;

    /// Rows `(1, 1, n, 1)` that hold the numbers of their tokens.
    fn numbered(tokens: Range<usize>) -> Array {
        let (from, n) = (tokens.start, tokens.len());
        let numbers = Array::arange(from, from + n).unwrap().astype(Dtype::F32).unwrap();
        numbers.reshape(&[1, 1, n as i32, 1]).unwrap()
    }

    fn numbers(rows: &KvTensor) -> Vec<usize> {
        let bytes = rows.arrays()[0].to_bytes().unwrap();
        bytes.chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap()) as usize).collect()
    }

    fn fed(cache: &mut Cache, counts: &[usize]) -> usize {
        let mut n = 0;
        for &count in counts {
            let new = numbered(n..n + count);
            cache.as_kv_mut().unwrap().update(&new, &new).unwrap();
            n += count;
        }
        n
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn a_ring_is_put_together_from_its_rows_as_it_was(
            keep in 0_usize..4, window in 1_usize..9, counts in prop::collection::vec(1_usize..12, 1..8), after in 1_usize..12,
        ) {
            let mut cache = Cache::Rotating(RotatingKvCache::new(keep + window, keep).unwrap());
            let fresh = cache.clone();
            let n = fed(&mut cache, &counts);
            for run in cache.runs() {
                let rows = cache.token_rows(&run.tokens).unwrap();
                prop_assert_eq!(numbers(&rows[0]), run.tokens.collect::<Vec<_>>());
            }
            let boundary = cache.boundary().unwrap();
            let (runs, [valid, _]) = fresh.runs_at(&boundary);
            let mut buffer = vec![0_usize; valid];
            for run in runs {
                let rows = cache.token_rows(&run.tokens).unwrap();
                buffer[run.row..run.row + run.tokens.len()].copy_from_slice(&numbers(&rows[0]));
            }
            let buffer: Vec<_> = buffer.into_iter().map(|number| number as i32).collect();
            let rows = Array::from_i32(&buffer).unwrap().astype(Dtype::F32).unwrap().reshape(&[1, 1, -1, 1]).unwrap();
            let rows = KvTensor::Dense(rows);
            let mut twin = fresh.at_boundary(&boundary, &rows, &rows).unwrap();
            // What follows sees the same rows in the same order, whether many tokens come or one at a time.
            for count in [1, 1, after, 1] {
                let new = numbered(n..n + count);
                let ours = twin.as_kv_mut().unwrap().update(&new, &new).unwrap();
                let theirs = cache.as_kv_mut().unwrap().update(&new, &new).unwrap();
                prop_assert_eq!(numbers(&ours.0), numbers(&theirs.0));
            }
        }
    }

    #[test]
    fn a_chunk_knows_the_tokens_of_its_rows() {
        let mut chunked = ChunkedKvCache::new(6).unwrap();
        for from in [0, 4, 8] {
            chunked.maybe_trim_front().unwrap();
            let new = numbered(from..from + 4);
            chunked.update(&new, &new).unwrap();
        }
        let cache = Cache::Chunked(chunked);
        let run = &cache.runs()[0];
        assert_eq!(numbers(&cache.token_rows(&run.tokens).unwrap()[0]), run.tokens.clone().collect::<Vec<_>>());
        assert!(cache.token_rows(&(0..12)).is_err() || run.tokens.start == 0);
    }
}
