//! Caches are put together from records.

use super::View;
use super::layout::{self, Leaf};
use super::plan::Plan;
use crate::array::Array;
use crate::cache::{ArraysCache, Boundary, Cache, KvTensor, Lookback, Run};
use crate::error::{Error, Result};
use crate::persist::{Assembly, Damage, Piece, Source, assemble};
use crate::store::prompt_store::{OpenRecord, RecordId, RecordInfo, Tier, checksum};
use std::collections::HashSet;
use std::num::NonZero;
use std::ops::Range;

/// What the store has of a prompt, as its index knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lookup {
    /// Tokens that can be restored; fewer than were asked for, so that one is left to compute.
    pub n_tokens: usize,
    /// Bytes that a restore reads.
    pub n_bytes: u64,
    /// Where they lie; None if there are none.
    pub tier: Option<Tier>,
    /// All rows were computed in full windows of the step that was asked for, and the tokens end with one.
    pub is_exact: bool,
}

/// Caches as they were at a token.
#[derive(Debug)]
pub struct Restored {
    /// One per leaf of the view.
    pub leaves: Vec<Cache>,
    /// Tokens that they hold.
    pub n_tokens: usize,
    /// Bytes that were read.
    pub n_bytes: u64,
    /// See [`Lookup::is_exact`].
    pub is_exact: bool,
}

impl View {
    /// How many of `tokens` could be restored. Only the index is read. `step`: of the windows that would follow; with
    /// `exact`, only what was computed on that grid counts.
    pub fn lookup(&self, tokens: &[u32], step: u32, exact: bool) -> Lookup {
        let Some(plan) = self.plan(tokens, step, exact, &HashSet::new()) else { return Lookup::default() };
        let needed = self.needed(&plan, None);
        let records = || plan.rows.iter().enumerate().filter(|(at, _)| needed.contains(at)).map(|(_, record)| record);
        let records = || records().chain(&plan.state);
        let is_in_ram = records().all(|record| record.tier == Tier::Ram);
        Lookup {
            n_tokens: plan.n_tokens,
            n_bytes: records().map(|record| record.n_bytes).sum(),
            tier: Some(if is_in_ram { Tier::Ram } else { Tier::Disk }),
            is_exact: plan.is_exact,
        }
    }

    /// The caches of as many of `tokens` as the store has, fewer than all; None if it has none. Records that turn out to
    /// be damaged are set aside, and what is left is tried.
    ///
    /// # Errors
    /// [`Error::Mlx`] if memory is short.
    pub fn restore(
        &self,
        tokens: &[u32],
        step: u32,
        exact: bool,
        threads: Option<NonZero<usize>>,
    ) -> Result<Option<Restored>> {
        // Each failure leaves out a record, so that this ends, even where the store is only read or the disk fails.
        let mut bad = HashSet::new();
        while let Some(plan) = self.plan(tokens, step, exact, &bad) {
            match self.read(&plan, threads)? {
                Outcome::Restored(restored) => return Ok(Some(restored)),
                Outcome::Damaged(record, reason) => {
                    self.store.quarantine(&record, &reason);
                    bad.insert(record.id);
                }
                Outcome::Gone(id) => drop(bad.insert(id)),
            }
        }
        Ok(None)
    }

    /// Places of the records whose rows a restore reads, and always the last one's, which knows the phases.
    fn needed(&self, plan: &Plan, phases: Option<&[Leaf]>) -> Vec<usize> {
        let runs: Vec<_> =
            self.leaves.iter().enumerate().flat_map(|(at, leaf)| runs(at, leaf, plan, phases).0).collect();
        let is_needed = |(at, record): (usize, &RecordInfo)| {
            let overlaps = runs.iter().any(|run| run.tokens.start < record.end && run.tokens.end > record.start);
            (overlaps || at + 1 == plan.rows.len()).then_some(at)
        };
        plan.rows.iter().enumerate().filter_map(is_needed).collect()
    }

    fn read(&self, plan: &Plan, threads: Option<NonZero<usize>>) -> Result<Outcome> {
        // The last record first: its phases say which rows are needed.
        let Some(last) = plan.rows.last() else { return Err(Error::value("restore", "rows", "none")) };
        let Some(opened) = self.store.open_records(std::slice::from_ref(last)).into_iter().next().flatten() else {
            return Ok(Outcome::Gone(last.id));
        };
        let Some(phases) = layout::from_text(&opened.layout, self.leaves.len()) else {
            return Ok(Outcome::Damaged(Box::new(last.clone()), "its layout cannot be read".to_owned()));
        };
        // Of a record that is used in part the phase is another token's.
        let phases = (last.end == plan.n_tokens).then_some(phases);
        let phases = phases.as_deref();
        let mut records: Vec<_> = self.needed(plan, phases).into_iter().map(|at| plan.rows[at].clone()).collect();
        records.extend(plan.state.clone());
        let mut open = Vec::with_capacity(records.len());
        for (record, opened) in records.iter().zip(self.store.open_records(&records)) {
            let Some(opened) = opened else { return Ok(Outcome::Gone(record.id)) };
            open.push(opened);
        }
        let n_rows = records.len() - usize::from(plan.state.is_some());
        let built = self.assemblies(plan, phases, &records[..n_rows], &open);
        let damaged = |damage: Damage| match damage.source.and_then(|source| records.get(source)) {
            Some(record) => Ok(Outcome::Damaged(Box::new(record.clone()), damage.error.to_string())),
            None => Err(damage.error),
        };
        let assemblies = match built {
            Ok(assemblies) => assemblies,
            Err(damage) => return damaged(damage),
        };
        let sources: Vec<&dyn Source> = open.iter().map(|record| record as &dyn Source).collect();
        let arrays = match assemble(&sources, &assemblies, threads, &checksum) {
            Ok(arrays) => arrays,
            Err(damage) => return damaged(damage),
        };
        let leaves = self.build(plan, phases, open.last(), arrays)?;
        let n_bytes = records.iter().map(|record| record.n_bytes).sum();
        Ok(Outcome::Restored(Restored { leaves, n_tokens: plan.n_tokens, n_bytes, is_exact: plan.is_exact }))
    }

    /// The buffers of all leaves, in order.
    fn assemblies(
        &self,
        plan: &Plan,
        phases: Option<&[Leaf]>,
        records: &[RecordInfo],
        open: &[OpenRecord],
    ) -> Result<Vec<Assembly>, Damage> {
        let mut assemblies = Vec::new();
        for (at, leaf) in self.leaves.iter().enumerate() {
            if let Cache::Arrays(cache) = leaf {
                let source = open.len() - 1;
                let names = (0..cache.slots.len()).map(|slot| layout::slot_name(at, slot));
                assemblies.extend(names.filter_map(|name| whole(&open[source], source, &name)));
                continue;
            }
            let (runs, [_, n_rows]) = runs(at, leaf, plan, phases);
            for name in layout::row_names(at, leaf) {
                assemblies.push(gathered(&name, &runs, n_rows, records, open)?);
            }
        }
        Ok(assemblies)
    }

    /// Caches of the buffers.
    fn build(
        &self,
        plan: &Plan,
        phases: Option<&[Leaf]>,
        state: Option<&OpenRecord>,
        arrays: Vec<Array>,
    ) -> Result<Vec<Cache>> {
        let mut arrays = arrays.into_iter();
        let mut next = || arrays.next().ok_or_else(|| Error::value("restore", "one buffer per tensor", "fewer"));
        let mut leaves = Vec::with_capacity(self.leaves.len());
        for (at, leaf) in self.leaves.iter().enumerate() {
            if let Cache::Arrays(cache) = leaf {
                let has =
                    |slot: usize| state.is_some_and(|state| state.tensors.contains_key(&layout::slot_name(at, slot)));
                let slots = (0..cache.slots.len()).map(|slot| has(slot).then(&mut next).transpose());
                leaves.push(Cache::Arrays(ArraysCache {
                    slots: slots.collect::<Result<_>>()?,
                    ..ArraysCache::default()
                }));
                continue;
            }
            let n_parts = layout::row_names(at, leaf).len() / 2;
            let mut tensor = || {
                Ok::<_, Error>(match n_parts {
                    1 => KvTensor::Dense(next()?),
                    _ => KvTensor::Quantized([next()?, next()?, next()?]),
                })
            };
            let (keys, values) = (tensor()?, tensor()?);
            leaves.push(leaf.at_boundary(&boundary(at, plan, phases), &keys, &values)?);
        }
        Ok(leaves)
    }
}

impl Source for OpenRecord {
    fn bytes(&self, at: u64, n_bytes: usize) -> Option<&[u8]> {
        self.bytes(at..at + n_bytes as u64)
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        self.read_into(bytes, at)
    }
}

/// How a read ended.
enum Outcome {
    Restored(Restored),
    /// A record is not what its place says.
    Damaged(Box<RecordInfo>, String),
    /// A record is no longer there: it was evicted, or set aside when it was opened.
    Gone(RecordId),
}

/// Where a leaf wants its rows, and how many its buffers have.
fn runs(at: usize, leaf: &Cache, plan: &Plan, phases: Option<&[Leaf]>) -> (Vec<Run>, [usize; 2]) {
    if leaf.lookback() == Some(Lookback::Whole) {
        return (Vec::new(), [0, 0]);
    }
    leaf.runs_at(&boundary(at, plan, phases))
}

/// Where a leaf shall stand.
fn boundary(at: usize, plan: &Plan, phases: Option<&[Leaf]>) -> Boundary {
    Boundary { n_tokens: plan.n_tokens, phase: phases.and_then(|phases| phases[at].phase) }
}

/// A tensor that is restored as it is.
fn whole(open: &OpenRecord, source: usize, name: &str) -> Option<Assembly> {
    let tensor = open.tensors.get(name)?;
    let n_bytes = tensor.n_bytes as usize;
    // The assembly's rows: those of four axes, else its bytes.
    let n_rows = if let [_, _, rows, _] = tensor.shape[..] { rows } else { n_bytes };
    let piece = Piece { source, at: tensor.start, n_bytes, checksum: Some(tensor.checksum), rows: 0..n_rows, to: 0 };
    Some(Assembly { shape: dims(&tensor.shape), dtype: tensor.dtype, pieces: vec![piece] })
}

/// A buffer of `n_rows` of the rows that the records have of the tensor `name`.
fn gathered(
    name: &str,
    runs: &[Run],
    n_rows: usize,
    records: &[RecordInfo],
    open: &[OpenRecord],
) -> Result<Assembly, Damage> {
    let mut form: Option<(Vec<usize>, crate::array::Dtype)> = None;
    let mut pieces = Vec::new();
    for run in runs {
        let mut next = run.tokens.start;
        for (source, (record, open)) in records.iter().zip(open).enumerate() {
            let tokens = run.tokens.start.max(record.start)..run.tokens.end.min(record.end);
            if tokens.is_empty() {
                continue;
            }
            let damage = |expected: String, got: String| Damage {
                source: Some(source),
                error: Error::value("restore", expected, got),
            };
            let tensor = open.tensors.get(name).ok_or_else(|| damage(format!("rows '{name}'"), "none".to_owned()))?;
            let [_, _, in_record, _] = tensor.shape[..] else {
                return Err(damage(format!("'{name}' of four axes"), format!("{:?}", tensor.shape)));
            };
            // A record may lack its first rows, never its last.
            let first =
                record.end.checked_sub(in_record).filter(|&first| first >= record.start && first <= tokens.start);
            let first = first
                .ok_or_else(|| damage(format!("'{name}' of the tokens {tokens:?}"), format!("{in_record} rows")))?;
            let rest = |shape: &[usize]| [shape[0], shape[1], shape[3]];
            let (shape, dtype) = form.get_or_insert_with(|| (tensor.shape.clone(), tensor.dtype));
            if rest(shape) != rest(&tensor.shape) || *dtype != tensor.dtype {
                return Err(damage(
                    format!("'{name}' like {shape:?} {dtype:?}"),
                    format!("{:?} {:?}", tensor.shape, tensor.dtype),
                ));
            }
            pieces.push(Piece {
                source,
                at: tensor.start,
                n_bytes: tensor.n_bytes as usize,
                checksum: Some(tensor.checksum),
                rows: tokens.start - first..tokens.end - first,
                to: run.row + tokens.start - run.tokens.start,
            });
            next = tokens.end;
        }
        check_run(name, run, next)?;
    }
    let (mut shape, dtype) = form.ok_or_else(|| Error::value("restore", format!("rows '{name}'"), "none"))?;
    shape[2] = n_rows;
    Ok(Assembly { shape: dims(&shape), dtype, pieces })
}

/// Fails unless the rows of a run were found up to its end.
fn check_run(name: &str, Run { tokens, .. }: &Run, next: usize) -> Result<(), Damage> {
    if next == tokens.end {
        return Ok(());
    }
    Err(Error::value(
        "restore",
        format!("'{name}' of the tokens {tokens:?}"),
        Range { start: tokens.start, end: next }.len(),
    )
    .into())
}

fn dims(shape: &[usize]) -> Vec<i32> {
    shape.iter().map(|&dim| dim as i32).collect()
}
