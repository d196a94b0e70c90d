//! Prompts on disk and in memory, in blocks that prompts with one beginning share. Bytes only: it knows neither caches
//! nor models.
//!
//! A record is named by a hash that chains its parent block, its tokens and the [`Space`]. Records are files; an index
//! tells what there is, and is made anew from them if it is lost. Whatever is doubtful is as if it were not there.

mod admin;
mod disk;
mod fault;
mod find;
mod folder;
mod index;
mod key;
mod lease;
mod queue;
mod ram;
mod record;
mod thin;

use crate::error::{Error, Result};
use disk::Disk;
use find::Walk;
use folder::Folder;
use key::Key;
use lease::Lease;
use queue::{Job, Queue};
use ram::{Held, Ram};
use record::Row;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

pub use admin::{Listed, Stats, Verified};
#[doc(hidden)]
pub use fault::fail_after;
pub use find::StoreFound;
pub use key::{RecordKind, Space};
pub use queue::{PutHandle, PutReport};
pub use record::{FORMAT, NewRecord, NewTensor, OpenRecord, RecordInfo, RecordTensor, Tier, Wanted, checksum};

/// Bytes of a header, about; the exact number is known when it is written.
const HEADER: u64 = 8192;
/// How much of an average the newest value is.
const NEWEST: f64 = 0.3;

/// How a store is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its folder; None keeps everything in memory.
    pub path: Option<PathBuf>,
    /// Memory for records that wait to be written, and, without a disk, for all.
    pub ram_bytes: u64,
    /// Everything in the folder stays below it; 0 keeps everything in memory.
    pub disk_bytes: u64,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Most bytes written in a day.
    pub write_bytes_per_day: Option<u64>,
    /// What is put stays in memory.
    pub read_only: bool,
    /// A folder on a network file system is taken.
    pub allow_network_fs: bool,
}

/// A store of prompts.
#[derive(Debug)]
pub struct PromptStore {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
    /// The process that opened it.
    process: u32,
}

/// What the threads of a store have in common.
#[derive(Debug)]
struct Shared {
    ram: Mutex<Ram>,
    disk: Option<Arc<Disk>>,
    queue: Queue,
    ram_bytes: u64,
    block: usize,
    is_closed: AtomicBool,
    n_hits: AtomicU64,
    n_misses: AtomicU64,
    rates: Mutex<std::collections::HashMap<String, f64>>,
}

impl PromptStore {
    /// Opens or makes a store.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be used, is someone else's, may be written by others, or is on a network file
    /// system; [`Error::Value`] for a store of another format, or a block of no tokens.
    pub fn open(options: Options) -> Result<Self> {
        let Options { path, ram_bytes, disk_bytes, block_tokens, write_bytes_per_day, read_only, allow_network_fs } =
            options;
        if block_tokens == 0 {
            return Err(Error::value("PromptStore", "blocks of at least 1 token", block_tokens));
        }
        let path = path.filter(|_| disk_bytes > 0);
        let disk = path.map(|path| {
            let folder = Folder::open(&path, read_only, allow_network_fs)?;
            Disk::open(folder, read_only, disk_bytes, write_bytes_per_day).map(Arc::new)
        });
        let shared = Shared {
            ram: Mutex::default(),
            disk: disk.transpose()?,
            queue: Queue::default(),
            ram_bytes,
            block: block_tokens,
            is_closed: AtomicBool::new(false),
            n_hits: AtomicU64::new(0),
            n_misses: AtomicU64::new(0),
            rates: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared), writer: Mutex::new(None), process: std::process::id() })
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.shared.block
    }

    /// Waits for what is being written. Later puts fail, and nothing is found any more.
    pub fn close(&self) {
        if self.is_forked() {
            return;
        }
        self.shared.queue.close();
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer {
            let _ = writer.join();
        }
        self.shared.is_closed.store(true, Ordering::Release);
        self.shared.ram().clear();
    }

    /// A child of a fork has no writer, and SQLite must not be used in it.
    fn is_forked(&self) -> bool {
        self.process != std::process::id()
    }

    fn is_usable(&self) -> bool {
        !self.is_forked() && !self.shared.is_closed.load(Ordering::Acquire)
    }

    fn check_usable(&self, op: &'static str) -> Result<()> {
        if self.is_forked() {
            return Err(Error::value(op, "the process that opened the store", "a forked child: open it there"));
        }
        if !self.is_usable() {
            return Err(Error::value(op, "an open store", "a closed one"));
        }
        Ok(())
    }

    /// What is stored of `tokens`. Reads the index only, and never fails: doubt is a miss.
    pub fn find(&self, space: &Space, tokens: &[u32], with_states: bool) -> StoreFound {
        if self.is_usable() { self.shared.find(space, tokens, with_states) } else { StoreFound::default() }
    }

    /// Opens records that were found. None for one that is gone, or whose header turned out to be damaged: it is then set
    /// aside.
    pub fn open_records(&self, records: &[RecordInfo]) -> Vec<Option<OpenRecord>> {
        if !self.is_usable() {
            return records.iter().map(|_| None).collect();
        }
        let shared = &self.shared;
        let keys: Vec<Key> = records.iter().filter(|r| r.tier == Tier::Disk).map(|record| record.row.key).collect();
        let lease = match &shared.disk {
            Some(disk) if !keys.is_empty() => {
                disk.lease(&keys).map(|number| Arc::new(Lease::new(Arc::clone(disk), number)))
            }
            _ => None,
        };
        {
            let mut ram = shared.ram();
            // Those that follow others are used before them, so that they go first.
            for record in records.iter().rev().filter(|record| record.tier == Tier::Ram) {
                ram.touch(&record.row.key);
            }
        }
        records.iter().map(|record| shared.open_record(record, lease.as_ref())).collect()
    }

    /// Which of `wanted` are not stored, or stored with less.
    pub fn missing(&self, space: &Space, tokens: &[u32], wanted: &[Wanted]) -> Vec<bool> {
        if !self.is_usable() {
            return vec![false; wanted.len()];
        }
        let shared = &self.shared;
        let end = wanted.iter().map(|wanted| wanted.start).max().unwrap_or(0);
        let chain = key::chain(space, &tokens[..end.min(tokens.len())], shared.block);
        let row = |wanted: &Wanted| shared.row(space, &chain, tokens, wanted);
        let rows: Vec<_> = wanted.iter().map(row).collect();
        let is_missing = |walk: &Walk<'_>, row: &Option<Row>| {
            let Some(row) = row else { return Ok(false) };
            Ok(walk.get(&row.key)?.is_none_or(|(old, _)| row.replaces(&old)))
        };
        shared
            .walk(space, |walk| rows.iter().map(|row| is_missing(walk, row)).collect())
            .unwrap_or_else(|| vec![true; wanted.len()])
    }

    /// Takes records of `tokens` in. They are found by this process at once, and written by a thread of its own; this
    /// waits while more than `ram_bytes` are queued.
    pub fn put(&self, space: &Space, tokens: &[u32], records: Vec<NewRecord>) -> PutHandle {
        let handle = PutHandle::default();
        match self.check_usable("PromptStore.put").and_then(|()| self.shared.take_in(space, tokens, records)) {
            Err(error) => handle.finish(PutReport::default(), Some(&error)),
            Ok(job) => {
                let is_written = self.shared.disk.as_ref().is_some_and(|disk| !disk.is_read_only());
                if !is_written || job.keys.is_empty() {
                    handle.finish(PutReport { n_written: job.keys.len(), n_bytes: job.n_bytes }, None);
                    self.shared.keep_in_ram(&job.keys);
                } else {
                    self.start_writer();
                    let keys = job.keys.clone();
                    if !self.shared.queue.push(Job { handle: handle.clone(), ..job }, self.shared.ram_bytes) {
                        self.shared.keep_in_ram(&keys);
                        handle.finish(
                            PutReport::default(),
                            Some(&Error::value("PromptStore.put", "an open store", "a closed one")),
                        );
                    }
                }
            }
        }
        handle
    }

    fn start_writer(&self) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if writer.is_none() {
            let shared = Arc::clone(&self.shared);
            let started = std::thread::Builder::new().name("mlxrs-store".to_owned()).spawn(move || shared.write_all());
            match started {
                Ok(thread) => *writer = Some(thread),
                Err(error) => tracing::error!(%error, "the prompt store has no thread to write with"),
            }
        }
    }

    /// Takes a record that was found damaged out of the store, and what follows it.
    pub fn quarantine(&self, record: &RecordInfo, reason: &str) {
        tracing::warn!(record = record.id(), reason, "a record of the prompt store was set aside");
        if self.is_usable() {
            self.shared.ram().drop_tree(&record.row.key);
            if let (Some(disk), Tier::Disk) = (&self.shared.disk, record.tier) {
                disk.quarantine(&record.row);
            }
        }
    }
}

impl Drop for PromptStore {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn ram(&self) -> std::sync::MutexGuard<'_, Ram> {
        self.ram.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `run` over memory and one state of the index; over memory alone if the index cannot be read.
    fn walk<T>(&self, space: &Space, run: impl Fn(&Walk<'_>) -> index::SqlResult<T>) -> Option<T> {
        let (ram, space, block) = (&self.ram, *space, self.block);
        let read = |index: &index::Reader<'_>| run(&Walk { ram, index: Some(index), space, block });
        let read = self.disk.as_ref().and_then(|disk| disk.read(read));
        read.or_else(|| run(&Walk { ram, index: None, space, block }).ok())
    }

    fn find(&self, space: &Space, tokens: &[u32], with_states: bool) -> StoreFound {
        let found = self.walk(space, |walk| walk.find(tokens, with_states)).unwrap_or_default();
        let is_hit = !found.blocks.is_empty() || found.partial.is_some();
        if is_hit { &self.n_hits } else { &self.n_misses }.fetch_add(1, Ordering::Relaxed);
        found
    }

    fn open_record(&self, info: &RecordInfo, lease: Option<&Arc<Lease>>) -> Option<OpenRecord> {
        if let Some(held) = self.ram().get(&info.row.key)
            && held.tokens == info.tokens
        {
            return Some(OpenRecord::in_ram(&held.record));
        }
        let disk = self.disk.as_ref()?;
        // It was in memory when it was found, and is written now.
        let row = if info.tier == Tier::Ram {
            disk.read(|index| index.get(&info.row.key)).flatten()?
        } else {
            info.row.clone()
        };
        match record::open(&disk.folder.record(&row.file)) {
            Ok(decoded) if decoded.row == row && decoded.tokens == info.tokens => Some(decoded.open.under(lease)),
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                // Evicted meanwhile, or lost: the index shall not lead here again.
                disk.write(|index| match index.get(&row.key)? {
                    Some(now) if now.file != row.file => Ok(()),
                    _ => index.forget(&row.key),
                });
                None
            }
            other => {
                let reason = other.err().map_or_else(|| "it is of other tokens".to_owned(), |error| error.to_string());
                tracing::warn!(file = row.file, reason, "a record of the prompt store was set aside");
                disk.quarantine(&row);
                None
            }
        }
    }

    /// The row of a record of `tokens`, whose blocks have the keys `chain`; None if there are not that many.
    fn row(&self, space: &Space, chain: &[Key], tokens: &[u32], wanted: &Wanted) -> Option<Row> {
        let Wanted { kind, start, end, grid, complete_from } = *wanted;
        let is_place = start.is_multiple_of(self.block) && start <= end && end - start <= self.block;
        let own = tokens.get(start..end).filter(|own| is_place && (!own.is_empty() || kind == RecordKind::State))?;
        let parent = *chain.get(start / self.block)?;
        let key = key::child(&parent, kind, own);
        let file = String::new();
        Some(Row { key, parent, space: *space, kind, start, end, n_bytes: 0, grid, complete_from, keep: false, file })
    }

    /// Puts records into memory, in the places of worse ones.
    fn take_in(&self, space: &Space, tokens: &[u32], records: Vec<NewRecord>) -> Result<Job> {
        let end = records.iter().map(|record| record.start).max().unwrap_or(0).min(tokens.len());
        let chain = key::chain(space, &tokens[..end], self.block);
        let mut job = Job { keys: Vec::new(), n_bytes: 0, handle: PutHandle::default(), thin: None };
        let is_queued = self.disk.as_ref().is_some_and(|disk| !disk.is_read_only());
        for record in records {
            let NewRecord { kind, start, end, grid, complete_from, keep, .. } = record;
            let wanted = Wanted { kind, start, end, grid, complete_from };
            let Some(row) = self.row(space, &chain, tokens, &wanted) else {
                let expected = format!("records of {} tokens in blocks of {}", tokens.len(), self.block);
                return Err(Error::value("PromptStore.put", expected, format!("one of {start}..{end}")));
            };
            let data: usize = record.tensors.iter().map(|tensor| tensor.bytes.len()).sum();
            let row = Row { n_bytes: data as u64 + HEADER, keep, ..row };
            let mut ram = self.ram();
            if ram.get(&row.key).is_some_and(|old| !row.replaces(&old.row)) {
                continue;
            }
            job.n_bytes += row.n_bytes;
            job.keys.push(row.key);
            if kind == RecordKind::State {
                job.thin = Some((*space, tokens.to_vec()));
            }
            let own = tokens[start..end].to_vec();
            ram.insert(Held { row, tokens: own, record: Arc::new(record) }, is_queued);
        }
        Ok(job)
    }

    /// Records that stay in memory are like any others there.
    fn keep_in_ram(&self, keys: &[Key]) {
        let mut ram = self.ram();
        for key in keys {
            ram.settle(key, true);
            ram.supersede(key);
        }
        ram.evict_to(self.ram_bytes);
    }

    /// The writing thread.
    fn write_all(&self) {
        let Some(disk) = &self.disk else { return };
        while let Some(job) = self.queue.next() {
            let mut report = PutReport::default();
            let mut failure = None;
            for key in &job.keys {
                let Some(held) = self.ram().get(key).cloned() else { continue };
                let written = disk.put(&held.row, &held.tokens, &held.record);
                match &written {
                    Ok(true) => {
                        report.n_written += 1;
                        report.n_bytes += held.row.n_bytes;
                    }
                    Ok(false) => {}
                    Err(error) => tracing::warn!(%error, "a record of the prompt store was not written"),
                }
                let mut ram = self.ram();
                // A better one may have taken its place meanwhile.
                if ram.get(key).is_some_and(|now| Arc::ptr_eq(&now.record, &held.record)) {
                    ram.settle(key, written.is_err());
                }
                failure = failure.or(written.err());
            }
            if let Some((space, tokens)) = &job.thin {
                self.thin(space, tokens);
            }
            self.ram().evict_to(self.ram_bytes);
            job.handle.finish(report, failure.as_ref());
            self.queue.done(job.n_bytes);
        }
    }

    /// The average of a measured rate.
    fn rate(&self, name: &str) -> Option<f64> {
        let known = self.rates.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied();
        known.or_else(|| self.disk.as_ref()?.read(|index| index.rate(name)).flatten())
    }

    fn note_rate(&self, name: &str, value: f64) {
        if !value.is_finite() || value <= 0.0 {
            return;
        }
        let value = self.rate(name).map_or(value, |old| old + NEWEST * (value - old));
        self.rates.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), value);
        if let Some(disk) = &self.disk {
            disk.write(|index| index.set_rate(name, value));
        }
    }
}
