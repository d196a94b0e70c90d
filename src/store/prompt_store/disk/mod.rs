//! The folder of a store: records as files, an index that can be lost, and owners who are known by their locks.
//!
//! - A record is written to a temporary file, brought to the disk, named, and entered into the index last. Whatever a crash
//!   leaves is a temporary file of a dead owner, which anybody sweeps, or a named file, which is entered at the next start.
//! - Whoever writes reserves the bytes in the index first, so that all processes together keep the limit.
//! - Readers hold leases; only the deepest records that are read need one, since leaves go before what they hang on.

mod adopt;
mod file;
mod folder;
mod index;
mod owner;
mod pack;
mod probe;
mod quarantine;
mod query;
mod reading;
mod room;
mod row;
mod source;
mod sweep;
mod verify;
mod write;

pub use probe::{Step, set_probe};
pub(super) use row::slot;
pub(super) use source::FileSource;

use super::found::{DiskState, Listed, RecordInfo, Stats, Tier};
use super::lock;
use super::options::{Compression, DISK_BYTES, Options};
use super::thin::{self, Checkpoint};
use super::walk::Tree;
use crate::error::{Error, Result};
use folder::Folder;
use index::{Damage, Index};
use owner::Owner;
use query::Snapshot;
use room::Limits;
use rusqlite::params;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long a write waits for other processes.
const SLOW: Duration = Duration::from_secs(10);
/// How long what can also be done later, or not at all, waits for them.
const SHORT: Duration = Duration::from_millis(50);
/// Smallest limit: the index alone takes some of it.
const MIN_BYTES: u64 = 2 << 20;

/// What a store has done to its folder.
#[derive(Debug, Default)]
struct Counts {
    n_evicted: AtomicU64,
    n_quarantined: AtomicU64,
    n_rebuilds: AtomicU64,
    n_written: AtomicU64,
    written_bytes: AtomicU64,
}

/// An open folder.
#[derive(Debug)]
pub(super) struct Disk {
    folder: Folder,
    limits: Limits,
    compression: Option<Compression>,
    process: u32,
    /// None if the folder is only read.
    owner: Option<Owner>,
    /// For questions and leases, which must not wait for the writer.
    reader: Mutex<Index>,
    writer: Mutex<Index>,
    /// Time of the last use and number of uses, by slot, that are not entered yet.
    touched: Mutex<HashMap<i64, (u64, u64)>>,
    /// Leases that are given back.
    released: Mutex<Vec<u64>>,
    /// The next number of a put or a lease.
    next: AtomicU64,
    counts: Counts,
}

impl Disk {
    /// Opens the folder `options` names, sweeps what the dead left, and brings records and index together.
    pub fn open(options: &Options, path: &std::path::Path) -> Result<Arc<Self>> {
        if let Some(got) = options.disk_bytes.filter(|n_bytes| *n_bytes < MIN_BYTES) {
            let expected = format!("disk_bytes of 0 or at least {MIN_BYTES}");
            return Err(Error::value("open a prompt store", expected, got));
        }
        let folder = Folder::open(path, options.read_only, options.allow_network_fs)?;
        let owner = if options.read_only { None } else { Some(Owner::claim(&folder)?) };
        let kept = folder.limit().filter(|n_bytes| *n_bytes >= MIN_BYTES);
        let disk_bytes = options.disk_bytes.or(kept).unwrap_or(DISK_BYTES);
        let limits = Limits { disk_bytes, write_bytes_per_day: options.write_bytes_per_day };
        let log = (!options.read_only).then(|| limits.log());
        let index = || Index::new(&folder, log).map(Mutex::new);
        let disk = Self {
            limits,
            compression: options.compression,
            process: std::process::id(),
            owner,
            reader: index()?,
            writer: index()?,
            touched: Mutex::default(),
            released: Mutex::default(),
            next: AtomicU64::new(0),
            counts: Counts::default(),
            folder,
        };
        if !options.read_only {
            if options.disk_bytes.is_some() && kept != options.disk_bytes {
                disk.folder.keep_limit(disk_bytes, &disk.temporary_name(0, room::nonce()))?;
            }
            // Whoever gives no limit may only want to look.
            disk.start(options.disk_bytes.is_some())?;
        }
        Ok(Arc::new(disk))
    }

    fn start(&self, shrinks: bool) -> Result<()> {
        let tables = "SELECT count(*) FROM sqlite_master WHERE type IN ('table', 'index') AND sql IS NOT NULL";
        let is_whole = |index: &rusqlite::Connection| match query::sum(index, tables)? {
            index::N_OBJECTS => Ok(()),
            _ => Err(query::damaged()),
        };
        let checked = lock(&self.writer).read(is_whole);
        if let Err(error) = checked {
            let Some(damaged) = lock(&self.writer).damage.take() else { return Err(error) };
            self.rebuild(damaged)?;
            self.counts.n_rebuilds.fetch_add(u64::from(damaged != Damage::Lost), Ordering::Relaxed);
        }
        self.sweep();
        let shrink = || if shrinks { self.shrink(self.limits.usable(), false).map(|_| ()) } else { Ok(()) };
        let reconciled = self.reconcile().and_then(|()| shrink());
        if reconciled.is_err() && lock(&self.writer).damage.is_some() {
            self.mend();
            shrink()?;
        }
        Ok(())
    }

    /// Calls `ask` with the index as a tree; None if the index cannot be asked.
    pub fn ask<T>(&self, ask: impl FnOnce(&dyn Tree) -> T) -> Option<T> {
        let mut reader = lock(&self.reader);
        let answer = reader.read(|index| {
            let snapshot = Snapshot::new(index);
            let answer = ask(&snapshot);
            Ok((answer, snapshot.into_fault()))
        });
        match answer {
            Ok((answer, None)) => Some(answer),
            Ok((answer, Some(fault))) => {
                reader.note(&fault);
                Some(answer)
            }
            Err(error) => {
                tracing::debug!(%error, "the index cannot be asked");
                None
            }
        }
    }

    /// Whether the index waits to be built anew.
    pub fn is_damaged(&self) -> bool {
        lock(&self.reader).damage.is_some()
    }

    /// Evicts until at most `target` bytes are used, as far as it may; `all` takes pinned and leased records too.
    pub fn shrink(&self, target: u64, all: bool) -> Result<u64> {
        let mut n_freed = 0;
        loop {
            lock(&self.writer).checkpoint();
            let victims = self.write_index(|index| {
                let excess = room::used(index, &self.folder)?.saturating_sub(target);
                let mut victims: Vec<_> = if all {
                    let mut rows = index.prepare_cached("SELECT slot, tokens, body FROM records LIMIT ?1")?;
                    rows.query_map([room::ROUND as i64], query::unpack)?.collect::<rusqlite::Result<_>>()?
                } else {
                    room::victims(index, excess, &HashSet::new())?
                };
                victims.truncate(room::ROUND);
                victims.iter().try_for_each(|row| room::doom(index, row, self.owner_name()))?;
                self.counts.n_evicted.fetch_add(victims.len() as u64, Ordering::Relaxed);
                Ok(victims)
            })?;
            n_freed += victims.iter().map(|row| row.size).sum::<u64>();
            self.reap()?;
            if victims.len() < room::ROUND {
                return Ok(n_freed);
            }
        }
    }

    /// Removes everything, what is put aside too.
    pub fn clear(&self) -> Result<u64> {
        for entry in fs::read_dir(self.folder.quarantine()).into_iter().flatten().flatten() {
            let _ = fs::remove_file(entry.path());
        }
        let cleared = self.shrink(0, true);
        if cleared.is_err() {
            self.mend();
            return self.shrink(0, true);
        }
        cleared
    }

    /// Pins or unpins records; gives how many changed.
    pub fn set_pinned(&self, records: &[RecordInfo], is_pinned: bool) -> Result<usize> {
        self.write_index(|index| {
            let mut n_changed = 0;
            for record in records {
                let Some(mut row) = query::row_in(index, slot(&record.id))? else { continue };
                if row.entry.id == record.id && row.is_pinned != is_pinned {
                    row.is_pinned = is_pinned;
                    let sql = "UPDATE records SET body = ?2 WHERE slot = ?1";
                    index.prepare_cached(sql)?.execute(params![row.slot(), row.pack()])?;
                    let sql = "UPDATE uses SET pinned = ?2 WHERE slot = ?1";
                    index.prepare_cached(sql)?.execute(params![row.slot(), row.is_pinned])?;
                    n_changed += 1;
                }
            }
            Ok(n_changed)
        })
    }

    /// Drops those of `states`, the deepest first, that thinning does not keep.
    pub fn thin(&self, states: &[RecordInfo]) -> Result<usize> {
        let n_dropped = self.write_index(|index| {
            let mut kept = Vec::new();
            for state in states {
                let Some(row) = query::row_in(index, slot(&state.id))?.filter(|row| row.entry.id == state.id) else {
                    continue;
                };
                let (_, hits) = query::use_of(index, row.slot())?.unwrap_or_default();
                let must_stay = row.entry.keep || row.is_pinned || hits > 0 || query::is_leased(index, row.slot())?;
                kept.push((Checkpoint { end: row.entry.end(), must_stay }, row));
            }
            let checkpoints: Vec<_> = kept.iter().map(|(checkpoint, _)| *checkpoint).collect();
            let dropped = thin::dropped(&checkpoints);
            dropped.iter().try_for_each(|&at| room::doom(index, &kept[at].1, self.owner_name()))?;
            Ok(dropped.len())
        })?;
        self.reap()?;
        Ok(n_dropped)
    }

    /// All records.
    pub fn list(&self) -> Vec<Listed> {
        let sql = "SELECT slot, tokens, body, last_used, hits FROM records JOIN uses USING (slot)";
        let listed = lock(&self.reader).read(|index| {
            let mut rows = index.prepare_cached(sql)?;
            let rows = rows.query_map([], |row| {
                let (last_used, hits) = (row.get::<_, i64>(3)? as u64, row.get::<_, i64>(4)? as u64);
                Ok((query::unpack(row)?, last_used, hits))
            })?;
            rows.collect::<rusqlite::Result<Vec<_>>>()
        });
        let listed = listed.unwrap_or_default().into_iter().map(|(row, last_used, hits)| Listed {
            parent: row.entry.parent,
            is_pinned: row.is_pinned,
            hits,
            last_used: last_used / 1000,
            record: {
                let n_tokens = row.entry.tokens.len();
                RecordInfo::new(Arc::new(row.entry), Tier::Disk, n_tokens)
            },
        });
        listed.collect()
    }

    /// Adds what the disk has to the counts.
    pub fn count(&self, stats: &mut Stats) {
        let counted = lock(&self.reader).read(|index| {
            stats.disk_records = query::sum(index, "SELECT count(*) FROM uses")?;
            stats.disk_bytes = room::used(index, &self.folder)?;
            stats.written_today = room::written_today(index)?;
            stats.n_pinned += query::sum(index, "SELECT count(*) FROM uses WHERE pinned")?;
            Ok(())
        });
        stats.disk = match counted {
            Err(error) => DiskState::Broken(error.to_string()),
            Ok(()) if self.owner.is_none() => DiskState::ReadOnly,
            Ok(()) => DiskState::On,
        };
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        stats.disk_limit = self.limits.disk_bytes;
        stats.n_written = count(&self.counts.n_written);
        stats.written_bytes = count(&self.counts.written_bytes);
        stats.n_evicted += count(&self.counts.n_evicted);
        stats.n_quarantined += count(&self.counts.n_quarantined);
        stats.n_rebuilds = count(&self.counts.n_rebuilds);
    }

    /// The averages that the index keeps.
    pub fn rates(&self) -> BTreeMap<String, f64> {
        let rates = lock(&self.reader).read(|index| {
            let mut rates = index.prepare_cached("SELECT name, value FROM rates")?;
            rates.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        });
        rates.unwrap_or_default()
    }

    /// Keeps averages, if the index is not busy.
    pub fn keep_rates(&self, rates: &BTreeMap<String, f64>) -> Result<()> {
        lock(&self.writer).write(SHORT, |index| {
            let mut keep = index.prepare_cached("INSERT OR REPLACE INTO rates(name, value) VALUES (?1, ?2)")?;
            rates.iter().try_for_each(|rate| keep.execute(params![rate.0, rate.1]).map(|_| ()))
        })
    }

    /// Bytes that records may fill.
    pub fn usable(&self) -> u64 {
        self.limits.usable()
    }

    /// Whether anything is written.
    pub const fn is_writable(&self) -> bool {
        self.owner.is_some()
    }

    /// Name of a temporary file of this owner, under which it is swept.
    fn temporary_name(&self, put: u64, nonce: u64) -> String {
        format!("{}-{put}-{nonce:016x}.tmp", self.owner_name())
    }

    fn owner_name(&self) -> &str {
        self.owner.as_ref().map_or("", |owner| &owner.name)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            lock(&self.reader).leak();
            lock(&self.writer).leak();
            std::mem::forget(self.owner.take());
            return;
        }
        if self.owner.is_some() {
            self.flush();
            let _ = self.reap();
            sweep::leave(self);
            lock(&self.writer).checkpoint();
        }
    }
}
