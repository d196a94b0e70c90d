//! The records on disk, and the caps on them.

use super::folder::{Folder, Owner, on_disk};
use super::index::{Index, Reader, SqlResult, is_damaged};
use super::key::Key;
use super::record::{self, NewRecord, Row};
use crate::error::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Room that the index may take until it is measured again.
const MARGIN: u64 = 256 << 10;
/// Victims that are looked at once.
const VICTIMS: usize = 64;
const SECONDS_A_DAY: u64 = 86_400;

/// The folder of a store with its index.
#[derive(Debug)]
pub(super) struct Disk {
    pub folder: Folder,
    /// None if this store only reads.
    owner: Option<Owner>,
    cap: u64,
    per_day: Option<u64>,
    /// One connection for lookups, one for changes, which may take long: none waits for the other.
    reader: Connection,
    writer: Connection,
    leases: AtomicI64,
    /// Times that the index was made anew, for tests and statistics.
    pub rebuilds: AtomicU64,
}

/// An index, and the file that it was when it was opened.
#[derive(Debug, Default)]
struct Connection(Mutex<Option<(Index, (u64, u64))>>);

/// Microseconds since 1970.
pub(super) fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as i64)
}

fn today() -> i64 {
    (now() as u64 / 1_000_000 / SECONDS_A_DAY) as i64
}

impl Disk {
    pub fn open(folder: Folder, read_only: bool, cap: u64, per_day: Option<u64>) -> Result<Self> {
        let owner = if read_only { None } else { Some(Owner::new(&folder)?) };
        let disk = Self {
            folder,
            owner,
            cap,
            per_day,
            reader: Connection::default(),
            writer: Connection::default(),
            leases: AtomicI64::new(0),
            rebuilds: AtomicU64::new(0),
        };
        if !read_only {
            disk.sweep();
            disk.reconcile();
            // The cap may be another than last time.
            disk.make_room(0).unwrap_or_else(|error| tracing::warn!(%error, "the prompt store is above its cap"));
        }
        Ok(disk)
    }

    pub const fn is_read_only(&self) -> bool {
        self.owner.is_none()
    }

    /// Runs `read` over the index; None if that cannot be done now.
    pub fn read<T>(&self, read: impl Fn(&Reader<'_>) -> SqlResult<T>) -> Option<T> {
        self.with(&self.reader, |index| index.read(&read))
    }

    /// Runs `write` as one change of the index; None if that cannot be done now.
    pub fn write<T>(&self, write: impl Fn(&Reader<'_>) -> SqlResult<T>) -> Option<T> {
        if self.is_read_only() {
            return None;
        }
        self.with(&self.writer, |index| index.write(&write))
    }

    /// An index that turns out to be damaged is made anew once; a second failure is a failure.
    fn with<T>(&self, connection: &Connection, run: impl Fn(&mut Index) -> SqlResult<T>) -> Option<T> {
        for attempt in 0..2 {
            let error = match self.once(connection, &run) {
                Ok(done) => return Some(done),
                Err(error) => error,
            };
            tracing::warn!(%error, "the prompt store's index failed");
            if attempt == 1 || !is_damaged(&error) || self.is_read_only() || !self.rebuild() {
                return None;
            }
        }
        None
    }

    fn once<T>(&self, connection: &Connection, run: impl Fn(&mut Index) -> SqlResult<T>) -> SqlResult<T> {
        let mut slot = connection.0.lock().unwrap_or_else(PoisonError::into_inner);
        let there = self.index_file();
        // Another process may have made the index anew.
        if slot.as_ref().is_some_and(|(_, opened)| Some(*opened) != there) {
            *slot = None;
        }
        if slot.is_none() {
            let index = Index::open(&self.folder.index(), self.is_read_only())?;
            *slot = self.index_file().map(|file| (index, file));
        }
        match slot.as_mut() {
            Some((index, _)) => run(index),
            None => Err(rusqlite::Error::InvalidPath(self.folder.index())),
        }
    }

    fn index_file(&self) -> Option<(u64, u64)> {
        fs::metadata(self.folder.index()).ok().map(|meta| (meta.dev(), meta.ino()))
    }

    /// Makes the index anew from the records. One process does it, the others then find it done.
    pub fn rebuild(&self) -> bool {
        let before = self.index_file();
        let path = self.folder.path.join("rebuild.lock");
        let Ok(lock) = File::options().create(true).truncate(false).write(true).open(&path) else { return false };
        if flock(&lock, FlockOperation::LockExclusive).is_err() {
            return false;
        }
        for connection in [&self.reader, &self.writer] {
            *connection.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        if self.index_file() == before {
            tracing::warn!("the prompt store's index is made anew from the records");
            let index = self.folder.index();
            for ending in ["", "-wal", "-shm", "-journal"] {
                let mut name = index.clone().into_os_string();
                name.push(ending);
                let _ = fs::remove_file(name);
            }
            self.rebuilds.fetch_add(1, Ordering::Relaxed);
            self.reconcile();
        }
        true
    }

    /// Takes dead owners' reservations, leases and temporary files away, and the files of records that were evicted.
    pub fn sweep(&self) {
        let named = self.read(|index| index.owners()).unwrap_or_default();
        let temporaries = self.folder.temporaries();
        let dead = Owner::dead(
            &self.folder,
            named.into_iter().chain(temporaries.iter().map(|(_, owner)| owner.clone())).collect(),
        );
        for (path, _) in temporaries.iter().filter(|(_, owner)| dead.contains(owner)) {
            let _ = fs::remove_file(path);
        }
        if !dead.is_empty() {
            self.write(|index| dead.iter().try_for_each(|owner| index.forget_owner(owner)));
        }
        self.bury();
    }

    /// Removes the files of records that left the index.
    fn bury(&self) {
        let dying = self.read(|index| index.dying()).unwrap_or_default();
        if dying.is_empty() {
            return;
        }
        for file in &dying {
            self.folder.remove(file);
        }
        self.write(|index| dying.iter().try_for_each(|file| index.buried(file)));
    }

    /// Makes the index tell what lies in the folder: after a crash one of them may know more.
    pub fn reconcile(&self) {
        let known: HashMap<String, Key> =
            self.read(|index| index.files()).unwrap_or_default().into_iter().map(|(key, file)| (file, key)).collect();
        let dying = self.read(|index| index.dying()).unwrap_or_default();
        let mut there: HashMap<String, u64> = self.folder.records().into_iter().collect();
        for (file, key) in &known {
            if there.remove(file).is_none() && !self.folder.record(file).exists() {
                self.write(|index| match index.get(key)? {
                    Some(row) if row.file != *file => Ok(()),
                    _ => index.forget(key),
                });
            }
        }
        for file in there.into_keys().filter(|file| !dying.contains(file)) {
            self.adopt(&file);
        }
    }

    /// Takes a record's file in that the index does not know.
    fn adopt(&self, file: &str) {
        let decoded = match record::open(&self.folder.record(file)) {
            Ok(decoded) if file.starts_with(&super::key::hex(&decoded.row.key)) => decoded,
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return,
            _ => {
                tracing::warn!(file, "a damaged record was set aside");
                return self.folder.set_aside(file);
            }
        };
        let (row, tokens) = (decoded.row, decoded.tokens);
        let is_spare = self.write(|index| {
            if index.is_reserved(&row.key)? {
                return Ok(false); // Its writer is about to.
            }
            match index.get(&row.key)? {
                Some(old) if old.file == row.file => Ok(false),
                Some(old) if !row.replaces(&old) => Ok(true),
                _ => index.insert(&row, &tokens, now()).map(|()| false),
            }
        });
        if is_spare == Some(true) {
            self.folder.remove(file);
        }
    }

    /// Evicts until `n_bytes` more fit under the cap.
    pub fn make_room(&self, n_bytes: u64) -> Result<()> {
        self.room(n_bytes, |_| Ok(true)).map(|_| ())
    }

    /// Runs `reserve` in the transaction that found enough room, after evicting what was in its way.
    fn room(&self, n_bytes: u64, reserve: impl Fn(&Reader<'_>) -> SqlResult<bool>) -> Result<bool> {
        enum Step {
            Done(bool),
            Evicted,
            Full,
        }
        loop {
            let overhead = self.folder.overhead() + MARGIN;
            let step = self.write(|index| {
                let needed = (index.n_bytes()? + overhead + n_bytes).saturating_sub(self.cap);
                if needed == 0 {
                    return reserve(index).map(Step::Done);
                }
                let mut freed = 0;
                for (key, n_bytes) in index.victims(VICTIMS)? {
                    if freed >= needed {
                        break;
                    }
                    index.doom(&key)?;
                    freed += on_disk(n_bytes);
                }
                // Records that are dying already are still counted.
                Ok(if freed == 0 && index.dying()?.is_empty() { Step::Full } else { Step::Evicted })
            });
            match step {
                Some(Step::Done(reserved)) => return Ok(reserved),
                Some(Step::Evicted) => self.bury(),
                Some(Step::Full) => {
                    let text = format!("{n_bytes} bytes more do not fit under the cap of {}", self.cap);
                    return Err(self.refused(io::ErrorKind::StorageFull, text));
                }
                None => {
                    return Err(self.refused(io::ErrorKind::ResourceBusy, "the index cannot be changed now".to_owned()));
                }
            }
        }
    }

    fn refused(&self, kind: io::ErrorKind, text: String) -> Error {
        Error::io("store a prompt in", &self.folder.path, io::Error::new(kind, text))
    }

    /// Writes a record, durably; false if there is nothing to do: one as good is there, or on its way.
    pub fn put(&self, row: &Row, tokens: &[u32], record: &NewRecord) -> Result<bool> {
        let Some(owner) = &self.owner else { return Ok(false) };
        let is_there = self.read(|index| Ok(index.get(&row.key)?.is_some_and(|old| !row.replaces(&old))));
        if is_there == Some(true) {
            return Ok(false);
        }
        let (head, seal) = record::encode(row, tokens, record)?;
        let data: usize = record.tensors.iter().map(|tensor| tensor.bytes.len()).sum();
        let n_bytes = (head.len() + data + seal.len()) as u64;
        if let Some(per_day) = self.per_day {
            let written = self.read(|index| index.written(today())).unwrap_or(0);
            if written + n_bytes > per_day {
                let text =
                    format!("{written} of the {per_day} bytes of today are written, and {n_bytes} more were to be");
                return Err(self.refused(io::ErrorKind::QuotaExceeded, text));
            }
        }
        if !self.room(on_disk(n_bytes), |index| index.reserve(&row.key, &owner.name, on_disk(n_bytes)))? {
            return Ok(false);
        }
        let written = self.write_file(row, record, &head, &seal, &owner.name);
        let done = written.and_then(|file| {
            let row = Row { file, n_bytes, ..row.clone() };
            let inserted = self.write(|index| {
                index.insert(&row, tokens, now())?;
                self.supersede(index, &row, tokens)?;
                index.note_written(today(), n_bytes)
            });
            inserted.ok_or_else(|| {
                self.folder.remove(&row.file);
                self.refused(io::ErrorKind::ResourceBusy, "the index cannot be changed now".to_owned())
            })
        });
        if done.is_err() {
            self.write(|index| index.release(&row.key, &owner.name));
        }
        self.bury();
        done.map(|()| true)
    }

    fn write_file(&self, row: &Row, record: &NewRecord, head: &[u8], seal: &[u8], owner: &str) -> Result<String> {
        let file = Folder::new_name(&row.key)?;
        let (path, mut temporary) = self.folder.temporary(owner)?;
        let written = super::fault::reach()
            .and_then(|()| temporary.write_all(head))
            .and_then(|()| record.tensors.iter().try_for_each(|tensor| temporary.write_all(&tensor.bytes)))
            .and_then(|()| temporary.write_all(seal))
            .and_then(|()| temporary.sync_all())
            .map_err(|error| Error::io("write", &path, error));
        let placed = written.and_then(|()| self.folder.place(&path, &file));
        if placed.is_err() {
            let _ = fs::remove_file(&path);
        }
        placed.map(|()| file)
    }

    /// Shorter parts of the same block, which the new record holds too, go.
    fn supersede(&self, index: &Reader<'_>, row: &Row, tokens: &[u32]) -> SqlResult<()> {
        if row.kind != record::RecordKind::Rows {
            return Ok(());
        }
        let mut below = tokens.len();
        while below > 1 {
            let Some((found, old)) = index.floor(&row.parent, row.kind, &tokens[..below - 1])? else { break };
            let common = super::key::n_common(&found, tokens);
            if common == found.len() && row.complete_from <= old.complete_from && (row.grid != 0 || old.grid == 0) {
                index.doom(&old.key)?;
            }
            below = common.min(below - 1);
        }
        Ok(())
    }

    /// Marks records as being read; None if the index cannot be changed now, which does not keep anybody from reading.
    pub fn lease(&self, keys: &[Key]) -> Option<i64> {
        let owner = self.owner.as_ref()?;
        let number = self.leases.fetch_add(1, Ordering::Relaxed);
        self.write(|index| index.lease(keys, &owner.name, number, now())).map(|()| number)
    }

    pub fn unlease(&self, number: i64) {
        if let Some(owner) = &self.owner {
            self.write(|index| index.unlease(&owner.name, number));
        }
    }

    /// Takes a record that was found damaged, and all that follow it, out of the store.
    pub fn quarantine(&self, row: &Row) {
        self.folder.set_aside(&row.file);
        self.write(|index| index.tree(&row.key)?.iter().try_for_each(|key| index.doom(key).map(|_| ())));
        self.bury();
    }

    /// Takes records out, whatever follows them.
    pub fn remove(&self, keys: &[Key]) {
        self.write(|index| keys.iter().try_for_each(|key| index.doom(key).map(|_| ())));
        self.bury();
    }

    /// Evicts the least recently used until the records take at most `n_bytes`; gives what was freed.
    pub fn shrink_to(&self, target: u64) -> u64 {
        let mut freed = 0;
        loop {
            let step = self.write(|index| {
                let above = index.n_bytes()?.saturating_sub(target);
                let mut gone = 0;
                for (key, n_bytes) in index.victims(VICTIMS)? {
                    if gone >= above {
                        break;
                    }
                    index.doom(&key)?;
                    gone += on_disk(n_bytes);
                }
                Ok(gone)
            });
            self.bury();
            match step {
                Some(gone) if gone > 0 => freed += gone,
                _ => return freed,
            }
        }
    }

    /// True if the whole index is sound.
    pub fn is_index_sound(&self) -> bool {
        self.with(&self.reader, |index| Ok(index.is_sound())).unwrap_or(false)
    }

    /// The cap, and the bytes of today's budget.
    pub const fn limits(&self) -> (u64, Option<u64>) {
        (self.cap, self.per_day)
    }

    /// Bytes written today.
    pub fn written_today(&self) -> u64 {
        self.read(|index| index.written(today())).unwrap_or(0)
    }
}
