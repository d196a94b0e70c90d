//! Writes records: room first, then temporary files, their names, and the index last.

use super::file::{self, Frame};
use super::probe::{Step, reach};
use super::query;
use super::room::{self, Answer, Granted, Request};
use super::row::{self, Row};
use super::{Disk, SLOW};
use crate::error::{Error, Result};
use crate::store::prompt_store::handle::PutReport;
use crate::store::prompt_store::ram::is_needless;
use crate::store::prompt_store::record::{Class, Entry, Record, RecordKind};
use crate::store::prompt_store::walk::prefixes;
use rusqlite::Transaction;
use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

/// Records that are written together, and their bytes.
const BATCH: usize = 16;
const BATCH_BYTES: u64 = 64 << 20;
/// How long another process may take to write what is wanted here too.
const PATIENCE: Duration = Duration::from_secs(30);

/// A record with its frame and the name that it gets.
struct Ready {
    record: Arc<Record>,
    frame: Frame,
    row: Row,
    temporary: PathBuf,
}

impl Disk {
    /// Writes `records`, parents before what hangs on them, and tells `done` of each whether the disk has it now.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses; `done` was then told of some.
    pub fn write_records(
        &self,
        records: &[Arc<Record>],
        protected: &HashSet<i64>,
        done: &mut dyn FnMut(&Arc<Record>, bool),
    ) -> Result<PutReport> {
        let mut report = PutReport { is_durable: true, ..PutReport::default() };
        let mut rest = records;
        let mut size = BATCH;
        while !rest.is_empty() {
            let mut n_bytes = 0;
            let fits = rest.iter().take(size).take_while(|record| {
                n_bytes += record.entry.n_bytes;
                n_bytes <= BATCH_BYTES
            });
            let (batch, later) = rest.split_at(fits.count().max(1));
            if self.write_batch(batch, protected, &mut report)? {
                for record in batch {
                    done(record, true);
                }
                rest = later;
            } else if batch.len() > 1 {
                size = batch.len() / 2;
            } else {
                // What comes after hangs on this one, or is as large.
                for record in rest {
                    done(record, false);
                }
                report.n_in_memory += rest.len();
                report.is_durable = false;
                break;
            }
        }
        Ok(report)
    }

    /// Writes a few records; false if there is no room for all of them.
    fn write_batch(&self, records: &[Arc<Record>], protected: &HashSet<i64>, report: &mut PutReport) -> Result<bool> {
        let mut frames = Vec::new();
        for record in records {
            let frame = file::frame(record, self.compression)?;
            frames.push((frame.size(record), frame));
        }
        let mut waiting: Vec<_> =
            records.iter().cloned().zip(frames).map(|(record, (size, frame))| ((record, size), frame)).collect();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let put = self.next.fetch_add(1, Ordering::Relaxed);
            let (records, frames): (Vec<_>, Vec<_>) = waiting.into_iter().unzip();
            let request = Request { owner: self.owner_name(), put, records: &records, protected };
            let Some(Granted { write, n_present, elsewhere }) = self.reserve(&request)? else { return Ok(false) };
            report.n_present += n_present;
            let mut frames: Vec<_> = frames.into_iter().map(Some).collect();
            let mut take = |at: usize| frames[at].take().map(|frame| (records[at].clone(), frame));
            let ready: Vec<_> = write.into_iter().filter_map(&mut take).map(|one| self.ready(put, one)).collect();
            waiting = elsewhere.into_iter().filter_map(&mut take).collect();
            if !ready.is_empty() {
                let written = self.write_ready(put, &ready);
                if written.is_err() {
                    self.abandon(put, &ready);
                }
                written?;
                report.n_written += ready.len();
                report.n_bytes += ready.iter().map(|ready| ready.row.size).sum::<u64>();
            }
            if waiting.is_empty() {
                return Ok(true);
            }
            if Instant::now() > deadline {
                report.n_present += waiting.len();
                report.is_durable = false;
                return Ok(true);
            }
            self.sweep();
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Reserves room, evicting as needed; None if there is none.
    fn reserve(&self, request: &Request<'_>) -> Result<Option<Granted>> {
        self.flush();
        loop {
            let reached = reach(Step::Reserve, self.folder.root());
            reached.map_err(|source| Error::io("reserve room in", self.folder.root(), source))?;
            let admit = |index: &Transaction<'_>| {
                let answer = room::admit(index, &self.folder, &self.limits, request)?;
                if let Answer::AfterReaping { n_evicted } = answer {
                    // Before anybody can see that they are gone.
                    self.counts.n_evicted.fetch_add(n_evicted, Ordering::Relaxed);
                }
                Ok(answer)
            };
            match self.write_index(admit)? {
                Answer::Granted(granted) => return Ok(Some(granted)),
                Answer::Refused => return Ok(None),
                Answer::AfterReaping { .. } => self.reap()?,
            }
        }
    }

    fn ready(&self, put: u64, ((record, size), frame): ((Arc<Record>, u64), Frame)) -> Ready {
        let entry = Entry { nonce: room::nonce(), ..record.entry.clone() };
        let row = Row { entry, size, is_pinned: false };
        let temporary = self.folder.temporaries().join(self.temporary_name(put, row.entry.nonce));
        Ready { record, frame, row, temporary }
    }

    fn write_ready(&self, put: u64, batch: &[Ready]) -> Result<()> {
        for ready in batch {
            write_file(self.folder.root(), ready)?;
        }
        for ready in batch {
            let path = self.folder.records().join(ready.row.file_name());
            let renamed = reach(Step::Rename, self.folder.root()).and_then(|()| fs::rename(&ready.temporary, &path));
            renamed.map_err(|source| Error::io("name", &path, source))?;
        }
        let folder = self.folder.records();
        let synced = reach(Step::FolderSync, self.folder.root()).and_then(|()| File::open(&folder)?.sync_all());
        synced.map_err(|source| Error::io("sync", &folder, source))?;
        reach(Step::Index, self.folder.root())
            .map_err(|source| Error::io("enter records into", &self.folder.index(), source))?;
        self.write_index(|index| self.enter(index, put, batch))?;
        self.counts.n_written.fetch_add(batch.len() as u64, Ordering::Relaxed);
        let n_bytes = batch.iter().map(|ready| ready.row.size).sum();
        self.counts.written_bytes.fetch_add(n_bytes, Ordering::Relaxed);
        // They count until they are gone; a failure is no failure of the put.
        if let Err(error) = self.reap() {
            tracing::debug!(%error, "files that were replaced stay for now");
        }
        Ok(())
    }

    /// Enters a batch into the index; what it replaces or makes needless is doomed.
    fn enter(&self, index: &Transaction<'_>, put: u64, batch: &[Ready]) -> rusqlite::Result<()> {
        let now = room::now();
        for Ready { row, .. } in batch {
            let mut row = row.clone();
            let mut hits = 0;
            if let Some(old) = query::row_in(index, row.slot())? {
                row.is_pinned = old.is_pinned;
                hits = query::use_of(index, row.slot())?.map_or(0, |(_, hits)| hits);
                if old.entry.nonce != row.entry.nonce {
                    room::doom(index, &old, self.owner_name())?;
                }
            }
            query::insert(index, &row, now, hits)?;
            if row.entry.kind == RecordKind::Rows {
                self.doom_needless(index, &row)?;
            }
            index.prepare_cached("DELETE FROM pending WHERE slot = ?1")?.execute([row.slot()])?;
        }
        let sql = "DELETE FROM reservations WHERE owner = ?1 AND put = ?2";
        index.prepare_cached(sql)?.execute(rusqlite::params![self.owner_name(), put as i64])?;
        Ok(())
    }

    /// Dooms the tails that `row` goes on from.
    fn doom_needless(&self, index: &Transaction<'_>, row: &Row) -> rusqlite::Result<()> {
        let shorter = &row.entry.tokens[..row.entry.tokens.len() - 1];
        let snapshot = query::Snapshot::new(index);
        let prefixes = |class: &Class| prefixes(&snapshot, &row.entry.parent, *class, shorter);
        let tails: Vec<_> = Class::ROWS.iter().flat_map(prefixes).collect();
        for tail in snapshot.finish(tails)? {
            let slot = row::slot(&tail.id);
            if tail.tokens.is_empty() || !is_needless(&tail, &row.entry) || query::is_leased(index, slot)? {
                continue;
            }
            if let Some(old) = query::row_in(index, slot)?.filter(|old| !old.is_pinned) {
                room::doom(index, &old, self.owner_name())?;
            }
        }
        Ok(())
    }

    /// Takes back what a failed batch left. What cannot be taken back now is swept later.
    fn abandon(&self, put: u64, batch: &[Ready]) {
        for ready in batch {
            let _ = fs::remove_file(&ready.temporary);
            let _ = fs::remove_file(self.folder.records().join(ready.row.file_name()));
        }
        let undone = self.write_index(|index| {
            for ready in batch {
                let sql = "DELETE FROM pending WHERE slot = ?1 AND owner = ?2";
                index.prepare_cached(sql)?.execute(rusqlite::params![ready.row.slot(), self.owner_name()])?;
                // The commit may have been reported as failed and yet have been made.
                if query::row_in(index, ready.row.slot())?.is_some_and(|row| row.entry.nonce == ready.row.entry.nonce) {
                    query::delete(index, ready.row.slot())?;
                }
            }
            let sql = "DELETE FROM reservations WHERE owner = ?1 AND put = ?2";
            index.prepare_cached(sql)?.execute(rusqlite::params![self.owner_name(), put as i64])?;
            Ok(())
        });
        if let Err(error) = undone {
            tracing::warn!(%error, "a failed write keeps its reservation until the store is closed");
        }
    }

    /// Changes the index, waiting for others.
    pub(super) fn write_index<T>(&self, write: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>) -> Result<T> {
        super::lock(&self.writer).write(SLOW, write)
    }
}

/// Writes a temporary file and brings it to the disk.
fn write_file(root: &Path, ready: &Ready) -> Result<()> {
    let path = &ready.temporary;
    let fail = |op| move |source| Error::io(op, path, source);
    let created =
        reach(Step::Create, root).and_then(|()| OpenOptions::new().write(true).create_new(true).mode(0o600).open(path));
    let mut file = created.map_err(fail("create"))?;
    let mut write = |bytes: &[u8]| reach(Step::Write, root).and_then(|()| file.write_all(bytes)).map_err(fail("write"));
    ready.frame.parts(&ready.record).try_for_each(&mut write)?;
    reach(Step::Sync, root).and_then(|()| sync(&file)).map_err(fail("sync"))
}

/// Brings a file's bytes to the disk, past the disk's own cache too where the system can.
fn sync(file: &File) -> std::io::Result<()> {
    // The standard library does the full sync on Apple's systems.
    file.sync_all()
}
