//! Reads records from their files.

use super::row::{Row, file_name};
use super::source::FileSource;
use super::{Disk, SHORT, file, lock, query, room, slot};
use crate::error::{Error, Result};
use crate::store::prompt_store::found::RecordInfo;
use crate::store::prompt_store::key::RecordId;
use crate::store::prompt_store::open_record::OpenRecord;
use crate::store::prompt_store::record::Entry;
use rusqlite::params;
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Records whose headers one thread reads at least, and threads that do.
const OPENED_AT_ONCE: usize = 4;
const MAX_OPENERS: usize = 8;

/// What keeps records from being evicted; given back when the last of them is closed.
#[derive(Debug)]
pub(super) struct Lease {
    disk: Arc<Disk>,
    number: u64,
}

impl Drop for Lease {
    fn drop(&mut self) {
        lock(&self.disk.released).push(self.number);
    }
}

/// Why a record cannot be opened.
enum Miss {
    /// It is not there any more.
    Gone,
    /// It is not what the index says.
    Wrong(String),
    /// The system does not tell.
    Unknown(Error),
}

impl Disk {
    /// Opens records; None for those that are gone, or wrong, which are put aside.
    pub(in super::super) fn open_records(self: &Arc<Self>, records: &[&RecordInfo]) -> Vec<Option<OpenRecord>> {
        let lease = self.lease(records).map(Arc::new);
        let share = records.len().div_ceil(MAX_OPENERS).max(OPENED_AT_ONCE);
        if records.len() <= share {
            return self.open_some(records, lease.as_ref());
        }
        // Reading and checking a header takes a millisecond or so, which many records would add up.
        std::thread::scope(|scope| {
            let lease = lease.as_ref();
            let open = |records| scope.spawn(move || self.open_some(records, lease));
            let openers: Vec<_> = records.chunks(share).map(open).collect();
            let opened = openers.into_iter().map(|o| o.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            opened.flatten().collect()
        })
    }

    fn open_some(&self, records: &[&RecordInfo], lease: Option<&Arc<Lease>>) -> Vec<Option<OpenRecord>> {
        let now = room::now();
        let opened = records.iter().map(|record| match self.open_record(record, lease) {
            Ok(opened) => {
                let mut touched = lock(&self.touched);
                let uses = touched.entry(slot(&record.id)).or_default();
                *uses = (now, uses.1 + 1);
                Some(opened)
            }
            Err(Miss::Wrong(reason)) => {
                self.quarantine(record, &reason);
                None
            }
            Err(Miss::Gone) => None,
            Err(Miss::Unknown(error)) => {
                tracing::warn!(%error, "a record cannot be read");
                None
            }
        });
        opened.collect()
    }

    fn open_record(&self, record: &RecordInfo, lease: Option<&Arc<Lease>>) -> Result<OpenRecord, Miss> {
        let mut nonce = record.entry.nonce;
        let mut opened = (nonce != 0).then(|| self.open_file(&record.id, nonce));
        if opened.as_ref().is_none_or(is_missing) {
            // It was in memory when it was found, or has been replaced since.
            let row = self.current(&record.id).ok_or(Miss::Gone)?;
            if row.entry.nonce == nonce {
                self.forget(&row);
                return Err(Miss::Gone);
            }
            nonce = row.entry.nonce;
            opened = Some(self.open_file(&record.id, nonce));
        }
        let path = self.folder.records().join(file_name(&record.id, nonce));
        let file = match opened {
            Some(Ok(file)) => file,
            Some(Err(source)) => return Err(Miss::Unknown(Error::io("open", &path, source))),
            None => return Err(Miss::Gone),
        };
        let contents = file::read(&path, &file).map_err(|error| match error {
            Error::Format { .. } => Miss::Wrong(error.to_string()),
            Error::Io { ref source, .. } if source.kind() == io::ErrorKind::UnexpectedEof => {
                Miss::Wrong(error.to_string())
            }
            error => Miss::Unknown(error),
        })?;
        let is_same_file = nonce == record.entry.nonce;
        if !says_the_same(&contents.entry, &record.entry, is_same_file) {
            return Err(Miss::Wrong("other tokens, another place or another space than the index says".into()));
        }
        Ok(FileSource::open(path, file, contents, lease.map(Arc::clone)))
    }

    fn open_file(&self, id: &RecordId, nonce: u64) -> io::Result<File> {
        file::open(&self.folder.records().join(file_name(id, nonce)))
    }

    /// What the index says of `id` now.
    fn current(&self, id: &RecordId) -> Option<Row> {
        let row = lock(&self.reader).read(|index| query::row_in(index, slot(id)));
        row.ok().flatten().filter(|row| row.entry.id == *id)
    }

    /// Takes out the row of a file that has vanished.
    fn forget(&self, row: &Row) {
        if self.owner.is_none() {
            return;
        }
        let forgotten = lock(&self.reader).write(SHORT, |index| {
            let now = query::row_in(index, row.slot())?;
            if now.is_some_and(|now| now == *row) && !self.folder.records().join(row.file_name()).exists() {
                query::delete(index, row.slot())?;
            }
            Ok(())
        });
        if let Err(error) = forgotten {
            tracing::debug!(%error, "the row of a vanished file stays for now");
        }
    }

    /// Leases the deepest of `records`; what they hang on is then no leaf. None if it cannot be had at once.
    fn lease(self: &Arc<Self>, records: &[&RecordInfo]) -> Option<Lease> {
        if self.owner.is_none() || records.is_empty() {
            return None;
        }
        let parents: HashSet<_> = records.iter().map(|record| record.entry.parent).collect();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let leased = lock(&self.reader).write(SHORT, |index| {
            let sql = "INSERT OR IGNORE INTO leases(owner, lease, slot) VALUES (?1, ?2, ?3)";
            let mut lease = index.prepare_cached(sql)?;
            for record in records.iter().filter(|record| !parents.contains(&record.id)) {
                lease.execute(params![self.owner_name(), number as i64, slot(&record.id)])?;
            }
            Ok(())
        });
        match leased {
            Ok(()) => Some(Lease { disk: Arc::clone(self), number }),
            Err(error) => {
                tracing::debug!(%error, "records are read without a lease");
                None
            }
        }
    }
}

fn is_missing(opened: &io::Result<File>) -> bool {
    opened.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Whether a file holds what the index said; one that replaced it may serve better.
fn says_the_same(file: &Entry, index: &Entry, is_same_file: bool) -> bool {
    let place = |entry: &Entry| (entry.id, entry.parent, entry.space, entry.kind, entry.start);
    let worth = |entry: &Entry| (entry.grid, entry.complete_from, entry.keep, entry.n_bytes);
    place(file) == place(index)
        && file.tokens == index.tokens
        && (!is_same_file || worth(file) == worth(index))
        && (is_same_file || file.complete_from <= index.complete_from && (file.grid != 0 || index.grid == 0))
}
