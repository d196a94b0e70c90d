//! Caches are cut into records.

use super::View;
use super::layout::{self, Leaf};
use crate::array::{self, Array};
use crate::cache::{Cache, KvTensor, Lookback};
use crate::error::{Error, Result};
use crate::persist::Gathering;
use crate::store::prompt_store::{NewRecord, NewTensor, PromptStore, PutHandle, RecordKind, Space, Wanted};
use std::ops::Range;
use std::sync::Arc;

/// The operation that errors name.
const OP: &str = "PromptStore.put";
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
    /// Rows of windowed layers since `blocks_end`, which their rings may drop; one for each leaf.
    carried: Vec<Option<Carried>>,
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
        let Noted { cuts, present, carried } = self.cut_in_place(tokens, leaves, is_last, keep)?;
        array::eval(OP, carried.iter().map(Option::as_ref).flat_map(rows_of))?;
        self.go_on(carried, tokens.len());
        let again = self.view.store.put_again(&self.view.space, tokens, &present);
        again.into_iter().map(Ok).chain(cuts.into_iter().map(|cuts| cuts.locate()?.store())).collect()
    }

    /// As [`note`](Self::note), but of a window that is still to be computed: the records hold copies, so that the caches'
    /// buffers are free for the next window. The arrays are to be computed with it.
    ///
    /// # Errors
    /// [`Error::Value`] if the caches are not at that token, [`Error::Mlx`] if MLX fails.
    pub fn cut(&mut self, tokens: &[u32], leaves: &[Cache], is_last: bool) -> Result<(Vec<Cuts>, Vec<Array>)> {
        let Noted { mut cuts, carried, .. } = self.cut_in_place(tokens, leaves, is_last, false)?;
        for (_, array) in cuts.iter_mut().flat_map(|cuts| &mut cuts.records).flat_map(|cut| &mut cut.tensors) {
            *array = array.copied()?;
        }
        let copies = cuts
            .iter()
            .flat_map(Cuts::arrays)
            .chain(carried.iter().map(Option::as_ref).flat_map(rows_of))
            .cloned()
            .collect();
        self.go_on(carried, tokens.len());
        Ok((cuts, copies))
    }

    /// Cuts what is missing in the store.
    fn cut_in_place(&mut self, tokens: &[u32], leaves: &[Cache], is_last: bool, keep: bool) -> Result<Noted> {
        self.view.check(OP, leaves)?;
        let n_tokens = tokens.len();
        for (at, leaf) in leaves.iter().enumerate() {
            if let Some(boundary) = leaf.boundary().filter(|boundary| boundary.n_tokens != n_tokens) {
                let expected = format!("cache {at} at token {n_tokens}");
                return Err(Error::value(OP, expected, format!("at token {}", boundary.n_tokens)));
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
        let present = wanted.iter().zip(&missing).filter_map(|(wanted, &is)| (!is).then_some(*wanted)).collect();
        let (store, space) = (&self.view.store, self.view.space);
        let mut all: Vec<Cuts> = Vec::new();
        for wanted in wanted.iter().zip(missing).filter_map(|(wanted, is_missing)| is_missing.then_some(wanted)) {
            let cut = match wanted.kind {
                RecordKind::Rows => self.rows(leaves, wanted)?,
                RecordKind::State => states(leaves, wanted)?,
            };
            match all.last_mut() {
                Some(cuts) if cuts.n_bytes < BATCH => cuts.add(cut),
                _ => {
                    let mut cuts =
                        Cuts { store: store.clone(), space, tokens: tokens.to_vec(), records: Vec::new(), n_bytes: 0 };
                    cuts.add(cut);
                    all.push(cuts);
                }
            }
        }
        Ok(Noted { cuts: all, present, carried: self.carried(leaves, n_tokens)? })
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
                return Err(Error::value(OP, format!("rows from token {} on", wanted.start), from));
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

    /// Copies of the rows behind the last full block that a ring may drop before that block is full.
    fn carried(&self, leaves: &[Cache], n_tokens: usize) -> Result<Vec<Option<Carried>>> {
        let start = n_tokens / self.view.store.block_tokens() * self.view.store.block_tokens();
        let carried = leaves.iter().enumerate().map(|(at, leaf)| {
            let is_windowed = matches!(leaf.lookback(), Some(Lookback::Window { .. }));
            Ok(match self.leaf_rows(at, leaf, start..n_tokens)? {
                (from, Some([keys, values])) if is_windowed => {
                    Some((from..n_tokens, [keys.try_map(Array::copied)?, values.try_map(Array::copied)?]))
                }
                _ => None,
            })
        });
        carried.collect()
    }

    /// The next note goes on from `n_tokens`.
    fn go_on(&mut self, carried: Vec<Option<Carried>>, n_tokens: usize) {
        let block = self.view.store.block_tokens();
        (self.carried, self.blocks_end) = (carried, (n_tokens / block * block).max(self.blocks_end));
    }
}

/// What is new in the caches at some token.
struct Noted {
    /// The records that are missing, lazy.
    cuts: Vec<Cuts>,
    /// What is there already.
    present: Vec<Wanted>,
    /// The rows to carry on, lazy.
    carried: Vec<Option<Carried>>,
}

/// Rows of a windowed layer: their tokens, keys and values.
type Carried = (Range<usize>, [KvTensor; 2]);

fn rows_of(carried: Option<&Carried>) -> impl Iterator<Item = &Array> {
    carried.into_iter().flat_map(|(_, rows)| rows).flat_map(KvTensor::arrays)
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
            return Err(Error::value(OP, "states of one sequence", "a batch that is padded"));
        }
        let slots = cache.slots.iter().enumerate();
        cut.tensors.extend(slots.filter_map(|(slot, array)| Some((layout::slot_name(at, slot), array.clone()?))));
    }
    cut.layout = layout::to_text(&vec![Leaf::default(); leaves.len()]);
    Ok(cut)
}

/// A record whose tensors are still MLX's.
#[derive(Debug)]
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

/// Records of one prompt whose bytes go to the host together.
#[derive(Debug)]
pub struct Cuts {
    store: Arc<PromptStore>,
    space: Space,
    tokens: Vec<u32>,
    records: Vec<Cut>,
    n_bytes: usize,
}

impl Cuts {
    fn add(&mut self, cut: Cut) {
        self.n_bytes += cut.tensors.iter().map(|(_, array)| array.n_bytes()).sum::<usize>();
        self.records.push(cut);
    }

    fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.records.iter().flat_map(|cut| &cut.tensors).map(|(_, array)| array)
    }

    /// Finds where the bytes lie; what is not computed yet is.
    ///
    /// # Errors
    /// [`Error::Mlx`] if that fails.
    pub fn locate(self) -> Result<Located> {
        let arrays: Vec<_> = self.arrays().cloned().collect();
        let gathering = Gathering::new(OP, &arrays, None)?;
        let record = |cut: Cut| {
            let tensor = |(name, array): (String, Array)| {
                let shape = array.shape().iter().map(|&dim| dim as usize).collect();
                NewTensor { name, dtype: array.dtype(), shape, bytes: Vec::new() }
            };
            let Cut { kind, start, end, grid, complete_from, keep, layout, tensors } = cut;
            let tensors = tensors.into_iter().map(tensor).collect();
            NewRecord { kind, start, end, grid, complete_from, keep, layout, tensors }
        };
        let Self { store, space, tokens, records, .. } = self;
        Ok(Located { store, space, tokens, records: records.into_iter().map(record).collect(), gathering })
    }
}

/// Records of which nothing is left to compute: any thread may store them.
pub struct Located {
    store: Arc<PromptStore>,
    space: Space,
    tokens: Vec<u32>,
    /// Still without their bytes.
    records: Vec<NewRecord>,
    gathering: Gathering,
}

impl Located {
    /// Copies the bytes to the host and gives the records to the store. Calls no MLX.
    ///
    /// # Errors
    /// [`Error::Mlx`] if CUDA fails.
    pub fn store(mut self) -> Result<PutHandle> {
        let mut gathered = self.gathering.gather()?.into_iter();
        for tensor in self.records.iter_mut().flat_map(|record| &mut record.tensors) {
            tensor.bytes = gathered.next().unwrap_or_default();
        }
        Ok(self.store.put(&self.space, &self.tokens, self.records))
    }
}
