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

mod found;
mod handle;
mod key;
mod open_record;
mod options;
mod ram;
mod record;
mod walk;

pub use found::{DiskState, Found, Listed, RecordInfo, Stats, Tier, Verified};
pub use handle::{PutHandle, PutReport};
pub use key::{RecordId, Space};
pub use open_record::{OpenRecord, RecordTensor};
pub use options::Options;
pub use record::{NewRecord, NewTensor, RecordKind, Wanted, checksum};

use crate::error::{Error, Result};
use ram::Ram;
use record::Record;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use walk::{Chain, Tree};

/// Tokens of a full block, unless the options say otherwise.
pub const BLOCK_TOKENS: usize = 256;

/// Prompts of any number of models. Shared between threads as it is; every process opens its own.
#[derive(Debug)]
pub struct PromptStore {
    options: Options,
    /// The process that opened it: a fork copies neither its thread nor its locks.
    process: u32,
    is_closed: AtomicBool,
    ram: Mutex<Ram>,
    rates: Mutex<std::collections::BTreeMap<String, f64>>,
    n_hits: AtomicU64,
    n_misses: AtomicU64,
    n_quarantined: AtomicU64,
}

impl PromptStore {
    /// Opens a store; its folder is made if it is not there.
    ///
    /// # Errors
    /// [`Error::Value`] for options that cannot be, a folder of a newer format, one that others may write to, or one on
    /// a network file system; [`Error::Io`] if the system refuses.
    pub fn open(options: Options) -> Result<Self> {
        if options.block_tokens < 2 || options.block_tokens > 1 << 20 {
            let got = options.block_tokens;
            return Err(Error::value("open a prompt store", format!("blocks of 2 to {} tokens", 1 << 20), got));
        }
        Ok(Self {
            ram: Mutex::new(Ram::new(options.ram_bytes)),
            options,
            process: std::process::id(),
            is_closed: AtomicBool::new(false),
            rates: Mutex::default(),
            n_hits: AtomicU64::new(0),
            n_misses: AtomicU64::new(0),
            n_quarantined: AtomicU64::new(0),
        })
    }

    /// Waits until everything that was put is written; the store then takes no more. Done again, it does nothing.
    pub fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
    }

    /// What is stored for `tokens` in `space`. Reads the index only.
    pub fn find(&self, space: &Space, tokens: &[u32]) -> Found {
        if self.check("find").is_err() {
            return Found::default();
        }
        let ram = SharedRam(&self.ram);
        let found = walk::find(&[&ram], space, tokens, self.options.block_tokens);
        let is_hit = !found.blocks.is_empty() || found.partial.is_some() || !found.states.is_empty();
        (if is_hit { &self.n_hits } else { &self.n_misses }).fetch_add(1, Ordering::Relaxed);
        found
    }

    /// Opens records that were found. Each is checked against what was found; None for one that is gone or not what it
    /// should be, which is then put aside.
    pub fn open_records(&self, records: &[RecordInfo]) -> Vec<Option<OpenRecord>> {
        if self.check("open_records").is_err() {
            return records.iter().map(|_| None).collect();
        }
        let mut ram = self.ram();
        // The deepest first: what hangs on another is then used before it, and goes before it.
        let mut opened: Vec<_> = records.iter().rev().map(|record| ram.open(&record.id)).collect();
        drop(ram);
        opened.reverse();
        opened.into_iter().map(|record| record.map(OpenRecord::in_memory)).collect()
    }

    /// Which of `wanted`, over `tokens`, are not stored yet, or stored with less.
    pub fn missing(&self, space: &Space, tokens: &[u32], wanted: &[Wanted]) -> Vec<bool> {
        if self.check("missing").is_err() {
            return vec![false; wanted.len()];
        }
        walk::missing(&[&SharedRam(&self.ram)], space, tokens, self.options.block_tokens, wanted)
    }

    /// Takes records over `tokens`. [`find`](Self::find) sees them from now on; they are written in the background.
    /// Waits while more than `ram_bytes` wait to be written.
    pub fn put(&self, space: &Space, tokens: &[u32], records: Vec<NewRecord>) -> PutHandle {
        PutHandle::finished(self.try_put(space, tokens, records))
    }

    fn try_put(&self, space: &Space, tokens: &[u32], records: Vec<NewRecord>) -> Result<PutReport> {
        self.check("put")?;
        let block = self.options.block_tokens;
        let mut chain = Chain::new(space, tokens, block);
        let chain = chain.all();
        let records = records.into_iter().map(|new| Record::new(new, space, tokens, chain, block).map(Arc::new));
        let records = records.collect::<Result<Vec<_>>>()?;
        let mut report = PutReport::default();
        let mut ram = self.ram();
        for record in records {
            let size = record.size();
            if ram.insert(record, false) {
                report.n_written += 1;
                report.n_bytes += size;
            } else {
                report.n_present += 1;
            }
        }
        report.n_in_memory = report.n_written;
        Ok(report)
    }

    /// Puts a record aside that turned out wrong, with all that hangs on it.
    pub fn quarantine(&self, record: &RecordInfo, reason: &str) {
        if self.check("quarantine").is_err() {
            return;
        }
        tracing::warn!(record = %record.id, reason, "a record is put aside");
        self.ram().remove_tree(&record.id);
        self.n_quarantined.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts.
    pub fn stats(&self) -> Stats {
        let ram = self.ram();
        Stats {
            ram_records: ram.len(),
            ram_bytes: ram.n_bytes(),
            ram_limit: self.options.ram_bytes,
            write_limit: self.options.write_bytes_per_day,
            n_pinned: ram.n_pinned(),
            n_hits: self.n_hits.load(Ordering::Relaxed),
            n_misses: self.n_misses.load(Ordering::Relaxed),
            n_evicted: ram.n_evicted(),
            n_quarantined: self.n_quarantined.load(Ordering::Relaxed),
            ..Stats::default()
        }
    }

    /// All records, blocks before what hangs on them.
    pub fn list(&self) -> Vec<Listed> {
        let mut listed = self.ram().list();
        listed.sort_by(|a, b| {
            let key = |listed: &Listed| (listed.record.start, listed.record.end, listed.record.id);
            (a.record.space(), key(a)).cmp(&(b.record.space(), key(b)))
        });
        listed
    }

    /// Keeps all records that `tokens` start with from eviction; gives the number of those that were not pinned yet.
    ///
    /// # Errors
    /// [`Error::Order`] for a store that is closed; [`Error::Io`] if the index refuses.
    pub fn pin(&self, space: &Space, tokens: &[u32]) -> Result<usize> {
        self.set_pinned("pin", space, tokens, true)
    }

    /// Undoes [`pin`](Self::pin).
    ///
    /// # Errors
    /// As [`pin`](Self::pin).
    pub fn unpin(&self, space: &Space, tokens: &[u32]) -> Result<usize> {
        self.set_pinned("unpin", space, tokens, false)
    }

    fn set_pinned(&self, op: &'static str, space: &Space, tokens: &[u32], is_pinned: bool) -> Result<usize> {
        self.check(op)?;
        let found = walk::find(&[&SharedRam(&self.ram)], space, tokens, self.options.block_tokens);
        let partial = found.partial.filter(|partial| partial.n_common == partial.end - partial.start);
        let mut ram = self.ram();
        let records = found.blocks.iter().chain(&partial).chain(&found.states);
        Ok(records.filter(|record| ram.set_pinned(&record.id, is_pinned)).count())
    }

    /// Evicts down to `target_bytes`, or to the limits; gives the bytes that were freed.
    ///
    /// # Errors
    /// As [`pin`](Self::pin).
    pub fn prune(&self, target_bytes: Option<u64>) -> Result<u64> {
        self.check("prune")?;
        Ok(self.ram().evict(target_bytes.unwrap_or(self.options.ram_bytes)))
    }

    /// Reads every byte of every record and every row of the index; `repair` puts aside what is wrong and builds the
    /// index anew if it is.
    ///
    /// # Errors
    /// As [`pin`](Self::pin). What is wrong with records and index is no error.
    pub fn verify(&self, repair: bool) -> Result<Verified> {
        self.check("verify")?;
        let ram = self.ram();
        Ok(Verified {
            n_checked: ram.len() as u64,
            n_bytes: ram.n_bytes(),
            faults: Vec::new(),
            is_repaired: repair && false,
        })
    }

    /// Removes everything, what is pinned too.
    ///
    /// # Errors
    /// As [`pin`](Self::pin).
    pub fn clear(&self) -> Result<()> {
        self.check("clear")?;
        self.ram().clear();
        Ok(())
    }

    /// The average noted under `name`.
    pub fn rate(&self, name: &str) -> Option<f64> {
        lock(&self.rates).get(name).copied()
    }

    /// Notes a measurement: averages forget the older ones step by step.
    pub fn note_rate(&self, name: &str, value: f64) {
        if value.is_finite() {
            lock(&self.rates).entry(name.to_owned()).and_modify(|rate| *rate += 0.2 * (value - *rate)).or_insert(value);
        }
    }

    fn ram(&self) -> MutexGuard<'_, Ram> {
        lock(&self.ram)
    }

    fn check(&self, op: &'static str) -> Result<()> {
        let order = |expected: &str, got: &str| Err(Error::Order { op, expected: expected.into(), got: got.into() });
        if self.process != std::process::id() {
            return order("the process that opened the store", "a fork of it; open the store there, or use `spawn`");
        }
        if self.is_closed.load(Ordering::Acquire) {
            return order("an open store", "one that is closed");
        }
        Ok(())
    }
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

    fn get(&self, id: &RecordId) -> Option<Arc<record::Entry>> {
        lock(self.0).get(id)
    }

    fn at_or_before(&self, parent: &RecordId, kind: RecordKind, tokens: &[u32]) -> Option<Arc<record::Entry>> {
        lock(self.0).at_or_before(parent, kind, tokens)
    }

    fn after(&self, parent: &RecordId, kind: RecordKind, tokens: &[u32]) -> Option<Arc<record::Entry>> {
        lock(self.0).after(parent, kind, tokens)
    }

    fn has_states(&self, space: &Space) -> bool {
        lock(self.0).has_states(space)
    }
}
