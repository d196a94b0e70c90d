//! Records and index brought together: files without a row are entered, rows without a file go, and an index that is
//! lost or damaged is built anew.

use super::file;
use super::index::{self, Damage, Index, hold, open_lock};
use super::query;
use super::room;
use super::row::{self, Row};
use super::{Disk, lock};
use crate::error::{Error, Result};
use crate::store::prompt_store::key::RecordId;
use rusqlite::{Connection, Transaction, params};
use rustix::fs::FlockOperation;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

/// A record's file, with the time of its last change in milliseconds.
type Orphan = (Row, u64);

/// What a damaged index still tells, as far as it can be read.
#[derive(Default)]
struct Salvage {
    pinned: HashSet<RecordId>,
    writes: Vec<(i64, i64)>,
    rates: Vec<(String, f64)>,
}

impl Disk {
    /// Enters files that the index lacks, and drops rows whose files are gone.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder or the index cannot be read.
    pub(super) fn reconcile(&self) -> Result<()> {
        let names = self.record_names()?;
        let known = |index: &Connection| {
            let rows: BTreeSet<(i64, u64)> = index
                .prepare_cached("SELECT slot, nonce FROM uses")?
                .query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)? as u64)))?
                .collect::<rusqlite::Result<_>>()?;
            let n_records = query::sum(index, "SELECT count(*) FROM records NOT INDEXED")?;
            // The two tables are always changed together.
            if n_records == rows.len() as u64 { Ok(rows) } else { Err(query::damaged()) }
        };
        let rows = lock(&self.writer).read(known)?;
        let mut files = BTreeSet::new();
        let mut orphans = Vec::new();
        for name in names {
            let Some((id, nonce)) = row::parse_file_name(&name) else {
                self.put_aside(&name, "not a record's name");
                continue;
            };
            let key = (row::slot(&id), nonce);
            if !rows.contains(&key) {
                orphans.push(name);
            }
            files.insert(key);
        }
        let gone: Vec<_> = rows.difference(&files).copied().collect();
        if orphans.is_empty() && gone.is_empty() {
            return Ok(());
        }
        // Their writers may still be about to enter them: looked at again below.
        let orphans: Vec<_> = orphans.iter().filter_map(|name| Some((name, self.read_orphan(name)?))).collect();
        let bad = self.write_index(|index| {
            let mut bad = Vec::new();
            for (name, orphan) in &orphans {
                self.adopt(index, name, orphan, &mut bad)?;
            }
            for &(slot, nonce) in &gone {
                let Some(row) = query::row_in(index, slot)?.filter(|row| row.entry.nonce == nonce) else { continue };
                if !self.folder.records().join(row.file_name()).exists() {
                    query::delete(index, slot)?;
                }
            }
            Ok(bad)
        })?;
        for (name, reason) in bad {
            self.put_aside(&name, &reason);
        }
        self.reap()
    }

    /// Enters a file that nobody else is about to enter or to remove.
    fn adopt(
        &self,
        index: &Transaction<'_>,
        name: &str,
        orphan: &Result<Orphan, String>,
        bad: &mut Vec<(String, String)>,
    ) -> rusqlite::Result<()> {
        let path = self.folder.records().join(name);
        let is_dying = index.prepare_cached("SELECT 1 FROM dying WHERE file = ?1")?.exists([name])?;
        let slot = row::parse_file_name(name).map_or(0, |(id, _)| row::slot(&id));
        let is_pending = index.prepare_cached("SELECT 1 FROM pending WHERE slot = ?1")?.exists([slot])?;
        if is_dying || is_pending || !path.exists() {
            return Ok(());
        }
        let (row, changed) = match orphan {
            Ok(orphan) => orphan,
            Err(reason) => {
                bad.push((name.to_owned(), reason.clone()));
                return Ok(());
            }
        };
        match query::row_in(index, slot)? {
            Some(old) if old.entry.nonce == row.entry.nonce => Ok(()),
            Some(old) if !is_better(row, &old) => {
                let sql = "INSERT OR REPLACE INTO dying(file, size, owner) VALUES (?1, ?2, ?3)";
                index.prepare_cached(sql)?.execute(params![name, row.size as i64, self.owner_name()])?;
                Ok(())
            }
            old => {
                if let Some(old) = old {
                    room::doom(index, &old, self.owner_name())?;
                }
                query::insert(index, row, *changed, 0)
            }
        }
    }

    /// Puts a new index in the place of `damaged`, unless somebody else has done so.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub(super) fn rebuild(&self, damaged: Damage) -> Result<()> {
        // Most of the work is done while others may still write.
        let mut known: BTreeMap<String, Result<Orphan, String>> = BTreeMap::new();
        self.read_orphans(&mut known)?;
        let lock_file = open_lock(&self.folder)?;
        hold(&lock_file, FlockOperation::LockExclusive, &self.folder)?;
        if self.folder.index_inode() != damaged.inode() {
            return Ok(());
        }
        self.read_orphans(&mut known)?;
        let salvage = self.salvage();
        let mut best: BTreeMap<RecordId, (Orphan, String)> = BTreeMap::new();
        let mut needless = Vec::new();
        for (name, orphan) in known {
            let Ok((mut row, changed)) = orphan else {
                self.put_aside(&name, "a damaged record");
                continue;
            };
            row.is_pinned = salvage.pinned.contains(&row.entry.id);
            let id = row.entry.id;
            match best.get(&id) {
                Some(((other, _), _)) if !is_better(&row, other) => needless.push(name),
                _ => needless.extend(best.insert(id, ((row, changed), name)).map(|(_, name)| name)),
            }
        }
        for name in needless {
            let _ = fs::remove_file(self.folder.records().join(name));
        }
        self.replace_index(|index| {
            for ((row, changed), _) in best.values() {
                query::insert(index, row, *changed, 0)?;
            }
            self.restore_rest(index, &salvage)
        })
    }

    fn restore_rest(&self, index: &Transaction<'_>, salvage: &Salvage) -> rusqlite::Result<()> {
        for (day, n_bytes) in &salvage.writes {
            index.execute("INSERT OR IGNORE INTO writes(day, n_bytes) VALUES (?1, ?2)", params![day, n_bytes])?;
        }
        for (name, value) in &salvage.rates {
            index.execute("INSERT OR IGNORE INTO rates(name, value) VALUES (?1, ?2)", params![name, value])?;
        }
        // What is being written has lost its reservation.
        for (owner, names) in self.temporaries() {
            for name in names {
                let put: i64 = name.split('-').nth(1).and_then(|put| put.parse().ok()).unwrap_or(0);
                let size = fs::metadata(self.folder.temporaries().join(&name)).map_or(0, |meta| meta.len());
                let sql = "INSERT INTO reservations(owner, put, size) VALUES (?1, ?2, ?3)
                           ON CONFLICT(owner, put) DO UPDATE SET size = size + excluded.size";
                index.execute(sql, params![owner, put, file::whole_pages(size) as i64])?;
            }
        }
        Ok(())
    }

    /// Builds a new index and gives it the name; the lock must be held.
    fn replace_index(&self, fill: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()>) -> Result<()> {
        let new = self.folder.new_index();
        let index = self.folder.index();
        let beside = |path: &std::path::Path, ending: &str| {
            let mut name = path.as_os_str().to_owned();
            name.push(ending);
            std::path::PathBuf::from(name)
        };
        let remove = |path: std::path::PathBuf| match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &path, error)),
            _ => Ok(()),
        };
        for ending in ["", "-wal", "-shm", "-journal"] {
            remove(beside(&new, ending))?;
        }
        index::create(&new, fill)?;
        // The old log must never meet the new index: it goes after the old index and before the new one comes.
        for ending in ["", "-wal", "-shm", "-journal"] {
            remove(beside(&index, ending))?;
        }
        fs::rename(&new, &index).map_err(|source| Error::io("name", &index, source))?;
        let synced = File::open(self.folder.root()).and_then(|folder| folder.sync_all());
        synced.map_err(|source| Error::io("sync", self.folder.root(), source))
    }

    fn record_names(&self) -> Result<Vec<String>> {
        let folder = self.folder.records();
        let fail = |source| Error::io("list", &folder, source);
        let entries = fs::read_dir(&folder).map_err(fail)?;
        entries.map(|entry| Ok(entry.map_err(fail)?.file_name().to_string_lossy().into_owned())).collect()
    }

    /// Reads the headers of those files in the folder that are not `known`, and forgets those that are gone.
    fn read_orphans(&self, known: &mut BTreeMap<String, Result<Orphan, String>>) -> Result<()> {
        let names: BTreeSet<_> = self.record_names()?.into_iter().collect();
        known.retain(|name, _| names.contains(name));
        for name in names {
            if !known.contains_key(&name)
                && let Some(orphan) = self.read_orphan(&name)
            {
                known.insert(name, orphan);
            }
        }
        Ok(())
    }

    /// What the header of the file `name` says; None if the file is gone, or the disk does not tell.
    fn read_orphan(&self, name: &str) -> Option<Result<Orphan, String>> {
        let Some((id, nonce)) = row::parse_file_name(name) else { return Some(Err("not a record's name".into())) };
        let path = self.folder.records().join(name);
        let file = file::open(&path).ok()?;
        let changed = file.metadata().map_or(0, |meta| meta.mtime().max(0) as u64 * 1000);
        match file::read(&path, &file) {
            Ok(contents) if contents.entry.id == id => {
                let mut row = Row { entry: contents.entry, size: contents.size, is_pinned: false };
                row.entry.nonce = nonce;
                Some(Ok((row, changed)))
            }
            Ok(_) => Some(Err("a record of another name".into())),
            Err(error @ Error::Format { .. }) => Some(Err(error.to_string())),
            Err(_) => None,
        }
    }

    /// What can still be read of the index: pins, and what was written and measured.
    fn salvage(&self) -> Salvage {
        let mut salvage = Salvage::default();
        // A connection of its own: whoever holds one of the others may be waiting for the lock that is held here.
        let _ = Index::new(&self.folder, None).and_then(|mut index| {
            index.read(|index| {
                let mut rows = index.prepare("SELECT day, n_bytes FROM writes")?;
                salvage.writes = rows.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.flatten().collect();
                let mut rows = index.prepare("SELECT name, value FROM rates")?;
                salvage.rates = rows.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.flatten().collect();
                let mut rows = index.prepare("SELECT slot, tokens, body FROM records")?;
                let rows = rows.query_map([], query::unpack)?;
                // A page that cannot be read ends it.
                let rows = rows.take_while(|row| !matches!(row, Err(rusqlite::Error::SqliteFailure(..)))).flatten();
                salvage.pinned = rows.filter(|row| row.is_pinned).map(|row| row.entry.id).collect();
                Ok(())
            })
        });
        salvage
    }
}

/// Whether `row` is to be kept rather than `other` of the same name.
fn is_better(row: &Row, other: &Row) -> bool {
    row.entry.worth().replaces(other.entry.worth())
}
