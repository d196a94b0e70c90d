//! The prompt store: rows and states of prompts by their tokens, in memory and in a folder that processes share.
//!
//! It knows bytes only. Which arrays they make, and when, is the caller's; a record comes back with the very bytes that
//! were put, or not at all.
//!
//! - Rows of a prompt lie in blocks of [`BLOCK_TOKENS`] tokens that all prompts with the same beginning share; what is
//!   left at the end lies in a tail. A block's name chains the name of the block before it and its tokens.
//! - States, of layers that cannot be cut, lie beside them at boundaries that the caller chooses.
//! - [`find`](PromptStore::find) and [`open_records`](PromptStore::open_records) never fail: whatever is wrong with a
//!   record, the index or the disk is a miss. A put tells what went wrong by its handle alone.

mod disk;
mod found;
mod handle;
mod key;
mod manage;
mod open_record;
mod options;
mod queue;
mod ram;
mod record;
mod thin;
mod walk;

#[doc(hidden)]
pub use disk::{Step, set_probe};
pub use found::{DiskState, Found, Listed, RecordInfo, Stats, Tier, Verified};
pub use handle::{PutHandle, PutReport};
pub use key::{RecordId, Space};
pub use open_record::{OpenRecord, RecordTensor};
pub use options::{Compression, DISK_BYTES, Options};
pub use record::{NewRecord, NewTensor, RecordKind, Wanted, checksum};

use crate::error::{Error, Result};
use disk::Disk;
use queue::{Job, Shared};
use ram::Ram;
use record::{Class, Entry, Record};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use walk::{Chain, Spot, Tree};

/// Tokens of a full block, unless the options say otherwise.
pub const BLOCK_TOKENS: usize = 256;
/// Environment variable that turns all folders off when it is `off`.
const SWITCH: &str = "MLXRS_PY_STORE";
/// How often a question is asked again when records went to the disk meanwhile.
const TRIES: usize = 3;

/// Prompts of any number of models. Shared between threads as it is; every process opens its own.
#[derive(Debug)]
pub struct PromptStore {
    options: Options,
    /// The process that opened it: a fork copies neither its thread nor its locks.
    process: u32,
    is_closed: AtomicBool,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    n_hits: AtomicU64,
    n_misses: AtomicU64,
    n_quarantined: AtomicU64,
}

impl PromptStore {
    /// Opens a store; its folder is made if it is not there. `MLXRS_PY_STORE=off` leaves the folder alone.
    ///
    /// # Errors
    /// [`Error::Value`] for options that cannot be, a folder of a newer format, one that others may write to, or one on
    /// a network file system; [`Error::Io`] if the system refuses.
    pub fn open(options: Options) -> Result<Self> {
        if options.block_tokens < 2 || options.block_tokens > 1 << 20 {
            let got = options.block_tokens;
            return Err(Error::value("open a prompt store", format!("blocks of 2 to {} tokens", 1 << 20), got));
        }
        let is_off = options.disk_bytes == Some(0) || std::env::var_os(SWITCH).is_some_and(|switch| switch == "off");
        let path = options.path.as_ref().filter(|_| !is_off);
        let disk = path.map(|path| Disk::open(&options, path)).transpose()?;
        let shared = Arc::new(Shared::new(options.block_tokens, Ram::new(options.ram_bytes), disk.clone()));
        let thread = disk.filter(|disk| disk.is_writable()).map(|disk| {
            let shared = Arc::clone(&shared);
            let run = move || shared.work(&disk);
            let spawned = thread::Builder::new().name("prompt-store".into()).spawn(run);
            spawned.map_err(|source| {
                Error::io("start the writer of", options.path.as_deref().unwrap_or("".as_ref()), source)
            })
        });
        Ok(Self {
            thread: Mutex::new(thread.transpose()?),
            shared,
            options,
            process: std::process::id(),
            is_closed: AtomicBool::new(false),
            n_hits: AtomicU64::new(0),
            n_misses: AtomicU64::new(0),
            n_quarantined: AtomicU64::new(0),
        })
    }

    /// Tokens of a full block.
    pub const fn block_tokens(&self) -> usize {
        self.options.block_tokens
    }

    /// Waits until everything that was put is written; the store then takes no more. Done again, it does nothing.
    pub fn close(&self) {
        if self.process != std::process::id() {
            return;
        }
        self.is_closed.store(true, Ordering::Release);
        self.shared.start_closing();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            // Its panics are caught, and told by the handles.
            let _ = thread.join();
        }
        self.shared.drop_disk();
    }

    /// What is stored for `tokens` in `space`. Reads the index only.
    pub fn find(&self, space: &Space, tokens: &[u32]) -> Found {
        if self.check("find").is_err() {
            return Found::default();
        }
        let found = self.ask(|trees| walk::find(trees, space, tokens, self.options.block_tokens));
        let is_hit = !found.blocks.is_empty() || !found.partials.is_empty() || !found.states.is_empty();
        (if is_hit { &self.n_hits } else { &self.n_misses }).fetch_add(1, Ordering::Relaxed);
        found
    }

    /// Rows that go on from the first `blocks` of what was found for `tokens`, as [`Found::partials`] has them: for whoever
    /// has no use for the next block, since it lacks rows or was computed in other windows.
    pub fn find_partials(&self, space: &Space, tokens: &[u32], blocks: &[RecordInfo]) -> Vec<RecordInfo> {
        if self.check("find_partials").is_err() {
            return Vec::new();
        }
        self.ask(|trees| walk::partials(trees, &Spot::after(space, tokens, blocks, self.options.block_tokens)))
    }

    /// Opens records that were found. Each is checked against what was found; None for one that is gone or not what it
    /// should be, which is then put aside.
    pub fn open_records(&self, records: &[RecordInfo]) -> Vec<Option<OpenRecord>> {
        if self.check("open_records").is_err() {
            return records.iter().map(|_| None).collect();
        }
        let mut ram = self.ram();
        // The deepest first: what hangs on another is then used before it, and goes before it.
        let in_memory = records.iter().rev().map(|record| {
            let opened = (record.tier == Tier::Ram).then(|| ram.open(&record.id))?;
            opened.filter(|opened| opened.entry == *record.entry)
        });
        let mut opened: Vec<_> = in_memory.map(|record| record.map(OpenRecord::in_memory)).collect();
        drop(ram);
        opened.reverse();
        if let Some(disk) = self.shared.disk() {
            // What was in memory when it was found may have been written since.
            let rest: Vec<_> = records.iter().zip(&opened).filter(|(_, opened)| opened.is_none()).collect();
            let rest: Vec<_> = rest.into_iter().map(|(record, _)| record).collect();
            let mut rest = disk.open_records(&rest).into_iter();
            for place in opened.iter_mut().filter(|place| place.is_none()) {
                *place = rest.next().flatten();
            }
        }
        opened
    }

    /// Which of `wanted`, over `tokens`, are not stored yet, or stored with less.
    pub fn missing(&self, space: &Space, tokens: &[u32], wanted: &[Wanted]) -> Vec<bool> {
        if self.check("missing").is_err() {
            return vec![false; wanted.len()];
        }
        self.ask(|trees| walk::missing(trees, space, tokens, self.options.block_tokens, wanted))
    }

    /// Takes records over `tokens`. [`find`](Self::find) sees them from now on; they are written in the background.
    /// Waits while more than `ram_bytes` wait to be written.
    pub fn put(&self, space: &Space, tokens: &[u32], records: Vec<NewRecord>) -> PutHandle {
        self.try_put(space, tokens, records).unwrap_or_else(|error| PutHandle::finished(Err(error)))
    }

    fn try_put(&self, space: &Space, tokens: &[u32], records: Vec<NewRecord>) -> Result<PutHandle> {
        self.check("put")?;
        let block = self.options.block_tokens;
        let mut chain = Chain::new(space, tokens, block);
        let chain = chain.all();
        let records = records.into_iter().map(|new| Record::new(new, space, tokens, chain, block).map(Arc::new));
        let mut records = records.collect::<Result<Vec<_>>>()?;
        // What others hang on comes first.
        records.sort_by_key(|record| (record.entry.kind, record.entry.start));
        if !self.shared.disk().is_some_and(|disk| disk.is_writable()) {
            return Ok(PutHandle::finished(Ok(self.put_in_memory(space, tokens, records))));
        }
        let n_bytes: u64 = records.iter().map(|record| record.size()).sum();
        self.shared.enter(n_bytes, self.options.ram_bytes)?;
        let mut ram = self.ram();
        // What is in memory may not be written yet, or may never have been: it is looked after with the rest.
        let take = |record: Arc<Record>| ram.insert(Arc::clone(&record), true).unwrap_or(record);
        let records: Vec<_> = records.into_iter().map(take).collect();
        drop(ram);
        let handle = PutHandle::default();
        let job = Job { space: *space, tokens: tokens.to_vec(), records, n_bytes, handle: handle.clone() };
        self.shared.hand_over(job);
        Ok(handle)
    }

    /// Looks after those of `wanted`, over `tokens`, that are in memory and not on the disk, as [`put`](Self::put) does
    /// with new records: they wait to be written, or the disk refused them. None if there are none, or no disk.
    pub fn put_again(&self, space: &Space, tokens: &[u32], wanted: &[Wanted]) -> Option<PutHandle> {
        if self.check("put").is_err() || !self.shared.disk().is_some_and(|disk| disk.is_writable()) {
            return None;
        }
        let mut ram = self.ram();
        let ids = walk::present(&*ram, space, tokens, self.options.block_tokens, wanted);
        let records: Vec<_> = ids.iter().filter_map(|id| ram.queue(id)).collect();
        drop(ram);
        if records.is_empty() {
            return None;
        }
        // They take no room that they did not take before.
        if let Err(error) = self.shared.enter(0, u64::MAX) {
            return Some(PutHandle::finished(Err(error)));
        }
        let handle = PutHandle::default();
        let job = Job { space: *space, tokens: tokens.to_vec(), records, n_bytes: 0, handle: handle.clone() };
        self.shared.hand_over(job);
        Some(handle)
    }

    fn put_in_memory(&self, space: &Space, tokens: &[u32], records: Vec<Arc<Record>>) -> PutReport {
        let mut report = PutReport::default();
        let has_states = records.iter().any(|record| record.entry.kind == RecordKind::State);
        let mut ram = self.ram();
        for record in records {
            let size = record.size();
            if ram.insert(record, false).is_some() {
                report.n_present += 1;
            } else {
                report.n_written += 1;
                report.n_bytes += size;
            }
        }
        if has_states {
            let states = walk::find(&[&*ram], space, tokens, self.options.block_tokens).states;
            ram.thin(&states);
        }
        report.n_in_memory = report.n_written;
        report
    }

    /// Puts a record aside that turned out wrong, with all that hangs on it.
    pub fn quarantine(&self, record: &RecordInfo, reason: &str) {
        if self.check("quarantine").is_err() {
            return;
        }
        tracing::warn!(record = %record.id, reason, "a record is taken out");
        if self.ram().remove_tree(&record.id) > 0 {
            self.n_quarantined.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(disk) = self.shared.disk() {
            disk.quarantine(record, reason);
        }
    }

    /// The average noted under `name`.
    pub fn rate(&self, name: &str) -> Option<f64> {
        lock(&self.shared.rates).get(name).copied()
    }

    /// Notes a measurement: averages forget the older ones step by step.
    pub fn note_rate(&self, name: &str, value: f64) {
        if value.is_finite() && self.check("note_rate").is_ok() {
            let mut rates = lock(&self.shared.rates);
            rates.entry(name.to_owned()).and_modify(|rate| *rate += 0.2 * (value - *rate)).or_insert(value);
            drop(rates);
            lock(&self.shared.new_rates).insert(name.to_owned());
        }
    }

    /// Calls `ask` with all tiers as trees; again if records went from one to the other meanwhile.
    fn ask<T>(&self, ask: impl Fn(&[&dyn Tree]) -> T) -> T {
        let ram = SharedRam(&self.shared.ram);
        let Some(disk) = self.shared.disk() else { return ask(&[&ram]) };
        let mut tries = 0;
        loop {
            tries += 1;
            let n_written = self.ram().n_written();
            let answer = disk.ask(|tree| ask(&[&ram, tree])).unwrap_or_else(|| ask(&[&ram]));
            if self.ram().n_written() == n_written || tries == TRIES {
                if disk.is_damaged() {
                    self.shared.wake();
                }
                return answer;
            }
        }
    }

    fn ram(&self) -> MutexGuard<'_, Ram> {
        lock(&self.shared.ram)
    }

    fn check(&self, op: &'static str) -> Result<()> {
        if self.process != std::process::id() {
            let expected = "the process that opened the store".into();
            return Err(Error::Order {
                op,
                expected,
                got: "a fork of it: open the store there, or use `spawn`".into(),
            });
        }
        if self.is_closed.load(Ordering::Acquire) { Err(closed(op)) } else { Ok(()) }
    }
}

impl Drop for PromptStore {
    fn drop(&mut self) {
        if self.process == std::process::id() {
            self.close();
        } else {
            // Nothing of the parent's may be closed, unlocked or waited for here.
            std::mem::forget(Arc::clone(&self.shared));
            std::mem::forget(lock(&self.thread).take());
        }
    }
}

fn closed(op: &'static str) -> Error {
    Error::Order { op, expected: "an open store".into(), got: "one that is closed".into() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory as a tree that is locked for each question only.
struct SharedRam<'a>(&'a Mutex<Ram>);

impl Tree for SharedRam<'_> {
    fn tier(&self) -> Tier {
        Tier::Ram
    }

    fn get(&self, id: &RecordId) -> Option<Arc<Entry>> {
        lock(self.0).get(id)
    }

    fn at_or_before(&self, parent: &RecordId, class: Class, tokens: &[u32]) -> Option<Arc<Entry>> {
        lock(self.0).at_or_before(parent, class, tokens)
    }

    fn after(&self, parent: &RecordId, class: Class, tokens: &[u32]) -> Option<Arc<Entry>> {
        lock(self.0).after(parent, class, tokens)
    }

    fn has_states(&self, space: &Space) -> bool {
        lock(self.0).has_states(space)
    }
}
