//! Room under the limit: what counts, who goes, and reservations before anything is written.

use super::file::whole_pages;
use super::folder::{Folder, files_size};
use super::index::LogLimits;
use super::owner;
use super::query::{self, Snapshot};
use super::row::Row;
use crate::store::prompt_store::ram::is_needless;
use crate::store::prompt_store::record::{Class, Record, RecordKind};
use crate::store::prompt_store::walk::Tree as _;
use rusqlite::{Connection, OptionalExtension as _, Transaction, params};
use std::collections::HashSet;
use std::fs;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes that a record may add to the index and its log, and to the folder: a few pages each.
const PER_RECORD: u64 = 32 << 10;
/// Bytes of the folders themselves.
const FOLDERS: u64 = 64 << 10;
/// Bytes of a record's name in its folder.
const NAME: u64 = 128;
/// Records that go at most in one change of the index, so that its log grows by little at a time.
pub const ROUND: usize = 64;

/// What may be written.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of the folder.
    pub disk_bytes: u64,
    /// Bytes written in a day.
    pub write_bytes_per_day: Option<u64>,
}

impl Limits {
    /// What records may fill.
    pub fn usable(&self) -> u64 {
        self.disk_bytes - self.rest()
    }

    /// What the index's log may fill. It takes half of the rest; the other half is for the one change that begins when it
    /// is as long as it may be, and for leases and uses, which reserve nothing.
    pub fn log(&self) -> LogLimits {
        let rest = self.rest();
        LogLimits { empty_from: (rest / 4).min(4 << 20), most: rest / 2 }
    }

    fn rest(&self) -> u64 {
        (self.disk_bytes / 8).min(64 << 20)
    }
}

/// Who writes, and what.
pub struct Request<'a> {
    pub owner: &'a str,
    pub put: u64,
    /// With the bytes of their files.
    pub records: &'a [(Arc<Record>, u64)],
    /// What must not go for it: the blocks that the records hang on.
    pub protected: &'a HashSet<i64>,
}

/// Places of a request's records.
#[derive(Debug)]
pub struct Granted {
    /// Those that are to be written.
    pub write: Vec<usize>,
    /// Number of those that are there.
    pub n_present: usize,
    /// Those that others are writing.
    pub elsewhere: Vec<usize>,
}

/// What became of a request.
#[derive(Debug)]
pub enum Answer {
    /// Room is reserved.
    Granted(Granted),
    /// Records were doomed; ask again when their files are gone.
    AfterReaping { n_evicted: u64 },
    /// There is no room, or the day's budget is spent.
    Refused,
}

/// Milliseconds since 1970: what is used within a second has an order too.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

fn today() -> i64 {
    (now() / 86_400_000) as i64
}

/// Bytes written today.
pub fn written_today(connection: &Connection) -> rusqlite::Result<u64> {
    let mut found = connection.prepare_cached("SELECT n_bytes FROM writes WHERE day = ?1")?;
    Ok(found.query_row([today()], |row| row.get::<_, i64>(0)).optional()?.unwrap_or(0).max(0) as u64)
}

/// All that counts against the limit.
pub fn used(connection: &Connection, folder: &Folder) -> rusqlite::Result<u64> {
    let sum = |sql| query::sum(connection, sql);
    let records = sum("SELECT sum(size) FROM uses")? + NAME * sum("SELECT count(*) FROM uses")?;
    let going = sum("SELECT sum(size) FROM dying")? + sum("SELECT sum(size) FROM reservations")?;
    Ok(records + going + folder.index_size() + files_size(&folder.quarantine()) + FOLDERS)
}

/// The same but for the log, which has room of its own: what an eviction enters there must not ask for the next one.
pub fn claimed(connection: &Connection, folder: &Folder, limits: &Limits) -> rusqlite::Result<u64> {
    Ok(used(connection, folder)? - folder.log_size().min(limits.log().most))
}

/// Reserves room for those of the records that are wanted, or dooms others to make it.
pub fn admit(
    transaction: &Transaction<'_>,
    folder: &Folder,
    limits: &Limits,
    request: &Request<'_>,
) -> rusqlite::Result<Answer> {
    let (mut write, mut n_present, mut elsewhere) = (Vec::new(), 0, Vec::new());
    let mut slots = HashSet::new();
    for (at, (record, _)) in request.records.iter().enumerate() {
        let slot = super::row::slot(&record.entry.id);
        if !slots.insert(slot) || is_stored(transaction, folder, record)? {
            n_present += 1;
            continue;
        }
        let mut pending = transaction.prepare_cached("SELECT owner FROM pending WHERE slot = ?1")?;
        let writer: Option<String> = pending.query_row([slot], |row| row.get(0)).optional()?;
        match writer {
            Some(writer) if writer != request.owner => elsewhere.push(at),
            _ => write.push(at),
        }
    }
    let n_bytes: u64 = write.iter().map(|&at| request.records[at].1).sum();
    if !write.is_empty() {
        if limits.write_bytes_per_day.is_some_and(|limit| {
            written_today(transaction).is_ok_and(|written| written.saturating_add(n_bytes) > limit)
        }) {
            return Ok(Answer::Refused);
        }
        let size = n_bytes + PER_RECORD * write.len() as u64;
        let excess = (claimed(transaction, folder, limits)? + size).saturating_sub(limits.usable());
        if excess > 0 {
            let victims = victims(transaction, excess, request.protected)?;
            if victims.iter().map(|row| row.size).sum::<u64>() < excess {
                return Ok(Answer::Refused);
            }
            let now = &victims[..victims.len().min(ROUND)];
            now.iter().try_for_each(|row| doom(transaction, row, request.owner))?;
            return Ok(Answer::AfterReaping { n_evicted: now.len() as u64 });
        }
        let reserve = "INSERT OR REPLACE INTO reservations(owner, put, size) VALUES (?1, ?2, ?3)";
        transaction.prepare_cached(reserve)?.execute(params![request.owner, request.put as i64, size as i64])?;
        for &at in &write {
            let slot = super::row::slot(&request.records[at].0.entry.id);
            let pend = "INSERT OR REPLACE INTO pending(slot, owner) VALUES (?1, ?2)";
            transaction.prepare_cached(pend)?.execute(params![slot, request.owner])?;
        }
        let count = "INSERT INTO writes(day, n_bytes) VALUES (?1, ?2)
                     ON CONFLICT(day) DO UPDATE SET n_bytes = n_bytes + excluded.n_bytes";
        transaction.prepare_cached(count)?.execute(params![today(), n_bytes as i64])?;
        transaction.prepare_cached("DELETE FROM writes WHERE day < ?1 - 31")?.execute([today()])?;
    }
    Ok(Answer::Granted(Granted { write, n_present, elsewhere }))
}

/// Whether the disk has all that `record` has: itself, or rows that go on where it ends. A look at the file tells whether
/// it is still there, and whole.
fn is_stored(transaction: &Transaction<'_>, folder: &Folder, record: &Record) -> rusqlite::Result<bool> {
    let entry = &record.entry;
    let serves = |row: &Row| {
        let stored = &row.entry;
        let size = fs::symlink_metadata(folder.records().join(row.file_name())).map(|meta| whole_pages(meta.len()));
        !entry.worth().replaces(stored.worth()) && size.is_ok_and(|size| size == row.size)
    };
    let same = query::row_in(transaction, super::row::slot(&entry.id))?;
    if same.is_some_and(|row| row.entry.id == entry.id && serves(&row)) {
        return Ok(true);
    }
    if entry.kind != RecordKind::Rows {
        return Ok(false);
    }
    let snapshot = Snapshot::new(transaction);
    let longer = Class::ROWS.iter().filter_map(|&class| snapshot.after(&entry.parent, class, &entry.tokens)).collect();
    for longer in snapshot.finish::<Vec<_>>(longer)? {
        let goes_on =
            longer.parent == entry.parent && longer.tokens.starts_with(&entry.tokens) && is_needless(entry, &longer);
        if goes_on && query::row_in(transaction, super::row::slot(&longer.id))?.is_some_and(|row| serves(&row)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Records of `n_bytes` or more, as far as there are any to go: leaves before what they hang on, the least recently used
/// first, none that is pinned or read.
pub fn victims(connection: &Connection, n_bytes: u64, protected: &HashSet<i64>) -> rusqlite::Result<Vec<Row>> {
    let mut oldest =
        connection.prepare_cached("SELECT slot FROM uses WHERE NOT pinned ORDER BY last_used, start DESC")?;
    let mut slots = oldest.query([])?;
    let (mut victims, mut gone, mut passed, mut n_freed) = (Vec::new(), HashSet::new(), HashSet::new(), 0);
    while n_freed < n_bytes {
        let Some(slot) = slots.next()? else { break };
        let mut next: i64 = slot.get(0)?;
        passed.insert(next);
        // What was passed over, since something hung on it, goes right after that.
        while n_freed < n_bytes && passed.contains(&next) {
            let is_leaf = query::children(connection, next)?.iter().all(|child| gone.contains(child));
            if !is_leaf || protected.contains(&next) || query::is_leased(connection, next)? {
                break;
            }
            let row = query::row_in(connection, next)?.ok_or_else(query::damaged)?;
            if row.is_pinned || !gone.insert(next) {
                break;
            }
            n_freed += row.size;
            next = super::row::slot(&row.entry.parent);
            victims.push(row);
        }
    }
    Ok(victims)
}

/// Takes a row out and remembers its file, which counts until it is unlinked.
pub fn doom(connection: &Connection, row: &Row, owner: &str) -> rusqlite::Result<()> {
    let sql = "INSERT OR REPLACE INTO dying(file, size, owner) VALUES (?1, ?2, ?3)";
    connection.prepare_cached(sql)?.execute(params![row.file_name(), row.size as i64, owner])?;
    query::delete(connection, row.slot())
}

/// Takes out all that belongs to a dead owner but the files it doomed, which `heir` will unlink.
pub fn inherit(connection: &Connection, dead: &str, heir: &str) -> rusqlite::Result<()> {
    for sql in [
        "DELETE FROM leases WHERE owner = ?1",
        "DELETE FROM reservations WHERE owner = ?1",
        "DELETE FROM pending WHERE owner = ?1",
    ] {
        connection.prepare_cached(sql)?.execute([dead])?;
    }
    connection.prepare_cached("UPDATE dying SET owner = ?2 WHERE owner = ?1")?.execute([dead, heir])?;
    Ok(())
}

/// All owners that the index knows.
pub fn owners(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    let sql = "SELECT owner FROM leases UNION SELECT owner FROM reservations UNION SELECT owner FROM pending
               UNION SELECT owner FROM dying";
    connection.prepare_cached(sql)?.query_map([], |row| row.get(0))?.collect()
}

/// A new number for a file.
pub fn nonce() -> u64 {
    owner::random()
}
