//! Caches are cut into records.

use super::View;
use super::layout::{self, Leaf};
use crate::array::{self, Array};
use crate::cache::{Cache, KvTensor, Lookback};
use crate::error::{Error, Result};
use crate::persist::gather;
use crate::store::prompt_store::{NewRecord, NewTensor, PutHandle, RecordKind, Wanted};
use std::ops::Range;

/// Bytes of records that are cut before they are handed to the store.
const BATCH: usize = 128 << 20;

/// Stores the prompt of one run as it grows.
///
/// A window's rows are cut before the next window, since rings drop them.
#[derive(Debug)]
pub struct Recorder {
    view: View,
    /// Tokens up to which full blocks were handed to the store, or were there.
    blocks_end: usize,
    /// Rows of windowed layers since `blocks_end`, which their rings may drop: per leaf the tokens, keys and values.
    carried: Vec<Option<(Range<usize>, [KvTensor; 2])>>,
    /// Tokens up to which every row was computed in full windows of the grid, on top of rows that were.
    exact_to: usize,
    grid: u32,
    /// Tokens of the last note.
    at: usize,
}

impl Recorder {
    /// A run whose first `restored` tokens came from the store. `grid` is its step; `is_exact` says that the tokens
    /// were all computed on that grid, or that there are none.
    pub fn new(view: View, restored: usize, grid: u32, is_exact: bool) -> Self {
        let block = view.store.block_tokens();
        let carried = view.leaves.iter().map(|_| None).collect();
        let exact_to = if is_exact { restored } else { 0 };
        Self { view, blocks_end: restored / block * block, carried, exact_to, grid, at: restored }
    }

    /// Takes note that `tokens.len()` tokens are in the caches, whose leaves are given. Full blocks are stored, and the
    /// states; with `is_last` the block that is not full too. `keep`: the state is not to be thinned. The handles tell of
    /// all of them, of those too that another put has in hand.
    ///
    /// # Errors
    /// [`Error::Value`] if the caches are not at that token, [`Error::Mlx`] if they cannot be computed.
    pub fn note(&mut self, tokens: &[u32], leaves: &[Cache], is_last: bool, keep: bool) -> Result<Vec<PutHandle>> {
        let op = "PromptStore.put";
        self.view.check(op, leaves)?;
        let n_tokens = tokens.len();
        for (at, leaf) in leaves.iter().enumerate() {
            if let Some(boundary) = leaf.boundary().filter(|boundary| boundary.n_tokens != n_tokens) {
                let expected = format!("cache {at} at token {n_tokens}");
                return Err(Error::value(op, expected, format!("at token {}", boundary.n_tokens)));
            }
        }
        let step = self.grid as usize;
        // The rows are exact as long as each window is the next full one of the grid.
        if step > 0 && self.at == self.exact_to && n_tokens == self.at + step && self.at.is_multiple_of(step) {
            self.exact_to = n_tokens;
        }
        self.at = n_tokens;
        let wanted = self.wanted(n_tokens, is_last, keep);
        let missing = self.view.store.missing(&self.view.space, tokens, &wanted);
        let present: Vec<_> =
            wanted.iter().zip(&missing).filter_map(|(wanted, &is)| (!is).then_some(*wanted)).collect();
        let mut handles: Vec<_> = self.view.store.put_again(&self.view.space, tokens, &present).into_iter().collect();
        let mut batch = Batch::default();
        for wanted in wanted.iter().zip(missing).filter_map(|(wanted, is_missing)| is_missing.then_some(wanted)) {
            batch.add(match wanted.kind {
                RecordKind::Rows => self.rows(leaves, wanted)?,
                RecordKind::State => states(leaves, wanted)?,
            });
            if batch.n_bytes >= BATCH {
                handles.push(self.view.store.put(&self.view.space, tokens, batch.take()?));
            }
        }
        if !batch.records.is_empty() {
            handles.push(self.view.store.put(&self.view.space, tokens, batch.take()?));
        }
        self.carry(leaves, n_tokens)?;
        Ok(handles)
    }

    /// The records of the caches' tokens that were not looked at yet.
    fn wanted(&self, n_tokens: usize, is_last: bool, keep: bool) -> Vec<Wanted> {
        let block = self.view.store.block_tokens();
        let grid = |end: usize| if end <= self.exact_to { self.grid } else { 0 };
        let starts = (self.blocks_end..n_tokens).step_by(block);
        let rows = starts.map(|start| (start, n_tokens.min(start + block)));
        let rows = rows.filter(|(start, end)| is_last || end - start == block);
        let rows = rows.map(|(start, end)| Wanted {
            kind: RecordKind::Rows,
            start,
            end,
            grid: grid(end),
            complete_from: start,
            keep: false,
        });
        let state = self.view.has_states().then(|| {
            let start = n_tokens / block * block;
            Wanted { kind: RecordKind::State, start, end: n_tokens, grid: grid(n_tokens), complete_from: start, keep }
        });
        rows.chain(state).collect()
    }

    /// The record of the rows of a block.
    fn rows(&self, leaves: &[Cache], wanted: &Wanted) -> Result<Cut> {
        let mut cut = Cut::new(wanted);
        let mut texts = Vec::with_capacity(leaves.len());
        for (at, leaf) in leaves.iter().enumerate() {
            let Some(lookback) = leaf.lookback().filter(|lookback| *lookback != Lookback::Whole) else {
                texts.push(Leaf { from: wanted.end, phase: None });
                continue;
            };
            let (from, rows) = self.leaf_rows(at, leaf, wanted.start..wanted.end)?;
            if from > wanted.start && lookback == Lookback::All {
                return Err(Error::value("PromptStore.put", format!("rows from token {} on", wanted.start), from));
            }
            cut.complete_from = cut.complete_from.max(from);
            let boundary = leaf.boundary().filter(|boundary| boundary.n_tokens == wanted.end);
            texts.push(Leaf { from, phase: boundary.and_then(|boundary| boundary.phase) });
            if let Some([keys, values]) = rows {
                let arrays = keys.arrays().iter().chain(values.arrays()).cloned();
                cut.tensors.extend(layout::row_names(at, leaf).into_iter().zip(arrays));
            }
        }
        cut.layout = layout::to_text(&texts);
        Ok(cut)
    }

    /// The rows of a leaf for as many of the last `tokens` as are held, and the first of them.
    fn leaf_rows(&self, at: usize, leaf: &Cache, tokens: Range<usize>) -> Result<(usize, Option<[KvTensor; 2]>)> {
        let held = leaf.held_from(tokens.end).max(tokens.start);
        let own = if held < tokens.end { Some(leaf.token_rows(&(held..tokens.end))?) } else { None };
        match (&self.carried[at], own) {
            (Some((carried, [keys, values])), own) if carried.start < held && carried.contains(&(held - 1)) => {
                let from = carried.start.max(tokens.start);
                let rows = from - carried.start..held - carried.start;
                let before = [keys.rows(rows.start, rows.end)?, values.rows(rows.start, rows.end)?];
                let Some([keys, values]) = own else { return Ok((from, Some(before))) };
                Ok((from, Some([joined(&before[0], &keys)?, joined(&before[1], &values)?])))
            }
            (_, Some(own)) => Ok((held, Some(own))),
            (_, None) => Ok((tokens.end, None)),
        }
    }

    /// Copies the rows behind the last full block that a ring may drop before that block is full.
    fn carry(&mut self, leaves: &[Cache], n_tokens: usize) -> Result<()> {
        let block = self.view.store.block_tokens();
        let start = n_tokens / block * block;
        let mut copies = Vec::new();
        let mut carried = Vec::with_capacity(leaves.len());
        for (at, leaf) in leaves.iter().enumerate() {
            let is_windowed = matches!(leaf.lookback(), Some(Lookback::Window { .. }));
            carried.push(match self.leaf_rows(at, leaf, start..n_tokens)? {
                (from, Some([keys, values])) if is_windowed => {
                    let rows = [keys.try_map(Array::copied)?, values.try_map(Array::copied)?];
                    copies.extend(rows.iter().flat_map(KvTensor::arrays).cloned());
                    Some((from..n_tokens, rows))
                }
                _ => None,
            });
        }
        array::eval("PromptStore.put", &copies)?;
        (self.carried, self.blocks_end) = (carried, start.max(self.blocks_end));
        Ok(())
    }
}

fn joined(before: &KvTensor, after: &KvTensor) -> Result<KvTensor> {
    before.try_zip(after, |before, after| Array::concatenate(&[before, after], 2))
}

/// The record of the states of the layers that have such.
fn states(leaves: &[Cache], wanted: &Wanted) -> Result<Cut> {
    let mut cut = Cut::new(wanted);
    for (at, leaf) in leaves.iter().enumerate() {
        let Cache::Arrays(cache) = leaf else { continue };
        if cache.left_padding.is_some() || cache.lengths.is_some() {
            return Err(Error::value("PromptStore.put", "states of one sequence", "a batch that is padded"));
        }
        let slots = cache.slots.iter().enumerate();
        cut.tensors.extend(slots.filter_map(|(slot, array)| Some((layout::slot_name(at, slot), array.clone()?))));
    }
    cut.layout = layout::to_text(&vec![Leaf::default(); leaves.len()]);
    Ok(cut)
}

/// A record whose tensors are still MLX's.
struct Cut {
    kind: RecordKind,
    start: usize,
    end: usize,
    grid: u32,
    complete_from: usize,
    keep: bool,
    layout: String,
    tensors: Vec<(String, Array)>,
}

impl Cut {
    fn new(wanted: &Wanted) -> Self {
        let Wanted { kind, start, end, grid, complete_from, keep } = *wanted;
        Self { kind, start, end, grid, complete_from, keep, layout: String::new(), tensors: Vec::new() }
    }
}

/// Records that are computed and copied to the host together.
#[derive(Default)]
struct Batch {
    records: Vec<Cut>,
    n_bytes: usize,
}

impl Batch {
    fn add(&mut self, cut: Cut) {
        self.n_bytes += cut.tensors.iter().map(|(_, array)| array.n_bytes()).sum::<usize>();
        self.records.push(cut);
    }

    fn take(&mut self) -> Result<Vec<NewRecord>> {
        let cuts = std::mem::take(self).records;
        let arrays: Vec<_> = cuts.iter().flat_map(|cut| &cut.tensors).map(|(_, array)| array.clone()).collect();
        let mut gathered = gather("PromptStore.put", &arrays, None)?.into_iter();
        let record = |cut: Cut| {
            let tensor = |(name, array): (String, Array)| {
                let shape = array.shape().iter().map(|&dim| dim as usize).collect();
                NewTensor { name, dtype: array.dtype(), shape, bytes: gathered.next().unwrap_or_default() }
            };
            let Cut { kind, start, end, grid, complete_from, keep, layout, tensors } = cut;
            let tensors = tensors.into_iter().map(tensor).collect();
            NewRecord { kind, start, end, grid, complete_from, keep, layout, tensors }
        };
        Ok(cuts.into_iter().map(record).collect())
    }
}
