//! The index of the records on disk: SQLite, which any number of processes share.
//!
//! Rows carry a checksum: one that was damaged is as if it were not there. Whatever SQLite finds damaged is told by
//! [`is_damaged`], and the index is then made anew from the records.

use super::key::{self, Key, RecordKind, Space};
use super::record::Row;
use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension as _, Params, Transaction, TransactionBehavior, params,
};
use std::path::Path;
use std::time::Duration;

pub(super) type SqlResult<T> = rusqlite::Result<T>;

/// How long a transaction waits for another process.
const BUSY: Duration = Duration::from_secs(10);
/// Statements that are kept prepared.
const STATEMENTS: usize = 64;

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS records(
        key BLOB PRIMARY KEY, parent BLOB NOT NULL, space BLOB NOT NULL, kind INTEGER NOT NULL,
        start INTEGER NOT NULL, stop INTEGER NOT NULL, n_bytes INTEGER NOT NULL, grid INTEGER NOT NULL,
        complete_from INTEGER NOT NULL, keep INTEGER NOT NULL, file TEXT NOT NULL, pinned INTEGER NOT NULL,
        digest INTEGER NOT NULL) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS records_parent ON records(parent);
    CREATE TABLE IF NOT EXISTS places(
        parent BLOB NOT NULL, kind INTEGER NOT NULL, tokens BLOB NOT NULL, key BLOB NOT NULL,
        PRIMARY KEY(parent, kind, tokens)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS uses(key BLOB PRIMARY KEY, used INTEGER NOT NULL, hits INTEGER NOT NULL) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS uses_used ON uses(used);
    CREATE TABLE IF NOT EXISTS dying(file TEXT PRIMARY KEY, n_bytes INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS reserved(key BLOB PRIMARY KEY, owner TEXT NOT NULL, n_bytes INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS leases(key BLOB NOT NULL, owner TEXT NOT NULL, lease INTEGER NOT NULL,
        PRIMARY KEY(key, owner, lease)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS written(day INTEGER PRIMARY KEY, n_bytes INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS rates(name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
";

const COLUMNS: &str = "key, parent, space, kind, start, stop, n_bytes, grid, complete_from, keep, file, pinned, digest";

/// A connection to the index.
#[derive(Debug)]
pub(super) struct Index {
    connection: Connection,
}

/// A row of the index, with what may change.
#[derive(Clone, Debug)]
pub(super) struct Listing {
    pub row: Row,
    pub hits: u64,
    pub used: i64,
    pub pinned: bool,
}

impl Index {
    pub fn open(path: &Path, read_only: bool) -> SqlResult<Self> {
        let access = if read_only {
            OpenFlags::SQLITE_OPEN_READ_ONLY
        } else {
            OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE
        };
        let connection = Connection::open_with_flags(path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        connection.busy_timeout(BUSY)?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS);
        if !read_only {
            // Records are durable by themselves, so that the last transactions may be lost: they are adopted again.
            connection.pragma_update(None, "journal_mode", "WAL")?;
            connection.pragma_update(None, "synchronous", "NORMAL")?;
            connection.pragma_update(None, "journal_size_limit", 4 << 20)?;
            connection.execute_batch(SCHEMA)?;
        }
        connection.pragma_update(None, "cache_size", -8192)?;
        // A file that is no index is found out here.
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get::<_, i64>(0))?;
        Ok(Self { connection })
    }

    /// Runs `read` over one state of the index.
    pub fn read<T>(&mut self, read: impl FnOnce(&Reader<'_>) -> SqlResult<T>) -> SqlResult<T> {
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Deferred)?;
        read(&Reader(&transaction))
    }

    /// Runs `write` as one change, which others wait for.
    pub fn write<T>(&mut self, write: impl FnOnce(&Reader<'_>) -> SqlResult<T>) -> SqlResult<T> {
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let done = write(&Reader(&transaction))?;
        transaction.commit()?;
        Ok(done)
    }

    /// SQLite's own check of the whole file.
    pub fn is_sound(&mut self) -> bool {
        let found = self.connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get::<_, String>(0));
        found.is_ok_and(|text| text == "ok")
    }
}

/// True if the index itself is damaged, not merely busy.
pub(super) fn is_damaged(error: &rusqlite::Error) -> bool {
    match error {
        rusqlite::Error::SqliteFailure(failure, _) => {
            matches!(
                failure.code,
                ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase | ErrorCode::Unknown | ErrorCode::SchemaChanged
            )
        }
        rusqlite::Error::FromSqlConversionFailure(..)
        | rusqlite::Error::IntegralValueOutOfRange(..)
        | rusqlite::Error::InvalidColumnType(..)
        | rusqlite::Error::SqlInputError { .. } => true,
        _ => false,
    }
}

/// One transaction.
pub(super) struct Reader<'a>(&'a Transaction<'a>);

impl Reader<'_> {
    fn one<T>(
        &self,
        sql: &str,
        params: impl Params,
        read: impl FnOnce(&rusqlite::Row<'_>) -> SqlResult<T>,
    ) -> SqlResult<Option<T>> {
        self.0.prepare_cached(sql)?.query_row(params, read).optional()
    }

    fn all<T>(
        &self,
        sql: &str,
        params: impl Params,
        read: impl FnMut(&rusqlite::Row<'_>) -> SqlResult<T>,
    ) -> SqlResult<Vec<T>> {
        self.0.prepare_cached(sql)?.query_map(params, read)?.collect()
    }

    fn run(&self, sql: &str, params: impl Params) -> SqlResult<usize> {
        self.0.prepare_cached(sql)?.execute(params)
    }

    /// The row of a key; None too if it was damaged.
    pub fn get(&self, key: &Key) -> SqlResult<Option<Row>> {
        let sql = "SELECT key, parent, space, kind, start, stop, n_bytes, grid, complete_from, keep, file, pinned, digest FROM records WHERE key = ?1";
        Ok(self
            .one(sql, params![key], |row| Ok(listed(row).map(|(row, _)| row)))?
            .flatten()
            .filter(|row| row.key == *key))
    }

    /// The greatest tokens of a kind behind `parent` that are not above `tokens`.
    pub fn floor(&self, parent: &Key, kind: RecordKind, tokens: &[u32]) -> SqlResult<Option<(Vec<u32>, Row)>> {
        let sql =
            "SELECT tokens FROM places WHERE parent = ?1 AND kind = ?2 AND tokens <= ?3 ORDER BY tokens DESC LIMIT 1";
        self.place(sql, parent, kind, tokens)
    }

    /// The least tokens of a kind behind `parent` that are not below `tokens`.
    pub fn ceiling(&self, parent: &Key, kind: RecordKind, tokens: &[u32]) -> SqlResult<Option<(Vec<u32>, Row)>> {
        let sql = "SELECT tokens FROM places WHERE parent = ?1 AND kind = ?2 AND tokens >= ?3 ORDER BY tokens LIMIT 1";
        self.place(sql, parent, kind, tokens)
    }

    fn place(&self, sql: &str, parent: &Key, kind: RecordKind, tokens: &[u32]) -> SqlResult<Option<(Vec<u32>, Row)>> {
        let found =
            self.one(sql, params![parent, kind.code(), key::bytes_of(tokens)], |row| row.get::<_, Vec<u8>>(0))?;
        let Some(tokens) = found.map(|bytes| key::tokens_of(&bytes)) else { return Ok(None) };
        // The key follows from the tokens: a damaged place leads nowhere.
        let row = self.get(&key::child(parent, kind, &tokens))?;
        Ok(row.filter(|row| row.kind == kind && row.end - row.start == tokens.len()).map(|row| (tokens, row)))
    }

    /// Takes a row in, in the place of one with the same key, whose file then dies.
    pub fn insert(&self, row: &Row, tokens: &[u32], now: i64) -> SqlResult<()> {
        let pinned = match self.pinned(&row.key)? {
            Some(pinned) => {
                self.doom(&row.key)?;
                pinned
            }
            None => false,
        };
        let digest = digest(row, pinned);
        self.run(
            "INSERT OR REPLACE INTO records VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
            params![
                row.key,
                row.parent,
                row.space.bytes(),
                row.kind.code(),
                row.start as i64,
                row.end as i64,
                row.n_bytes as i64,
                row.grid,
                row.complete_from as i64,
                row.keep,
                row.file,
                pinned,
                digest
            ],
        )?;
        self.run(
            "INSERT OR REPLACE INTO places VALUES(?1, ?2, ?3, ?4)",
            params![row.parent, row.kind.code(), key::bytes_of(tokens), row.key],
        )?;
        self.run(
            "INSERT OR REPLACE INTO uses VALUES(?1, ?2, coalesce((SELECT hits FROM uses WHERE key = ?1), 0))",
            params![row.key, now],
        )?;
        self.run("DELETE FROM reserved WHERE key = ?1", params![row.key])?;
        Ok(())
    }

    fn pinned(&self, key: &Key) -> SqlResult<Option<bool>> {
        self.one("SELECT pinned FROM records WHERE key = ?1", params![key], |row| row.get(0))
    }

    /// Takes a row out; its file is to be removed. Gives the file.
    pub fn doom(&self, key: &Key) -> SqlResult<Option<String>> {
        let sql = "SELECT file, n_bytes FROM records WHERE key = ?1";
        let found = self.one(sql, params![key], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)))?;
        let Some((file, n_bytes)) = found else { return Ok(None) };
        self.run("INSERT OR REPLACE INTO dying VALUES(?1, ?2)", params![file, n_bytes])?;
        self.forget(key)?;
        Ok(Some(file))
    }

    /// Takes a row out whose file is gone.
    pub fn forget(&self, key: &Key) -> SqlResult<()> {
        self.run(
            "DELETE FROM places WHERE key = ?1 AND parent = (SELECT parent FROM records WHERE key = ?1)",
            params![key],
        )?;
        self.run("DELETE FROM records WHERE key = ?1", params![key])?;
        self.run("DELETE FROM uses WHERE key = ?1", params![key])?;
        Ok(())
    }

    /// A record and all that follow it.
    pub fn tree(&self, key: &Key) -> SqlResult<Vec<Key>> {
        let sql =
            "WITH RECURSIVE tree(key) AS (SELECT ?1 UNION SELECT r.key FROM records r JOIN tree t ON r.parent = t.key)
            SELECT key FROM tree";
        self.all(sql, params![key], |row| row.get(0))
    }

    /// Files that are to be removed.
    pub fn dying(&self) -> SqlResult<Vec<String>> {
        self.all("SELECT file FROM dying", [], |row| row.get(0))
    }

    pub fn buried(&self, file: &str) -> SqlResult<()> {
        self.run("DELETE FROM dying WHERE file = ?1", params![file]).map(|_| ())
    }

    /// Bytes of all records, of those that die, and those that are reserved.
    pub fn n_bytes(&self) -> SqlResult<u64> {
        let sql = "SELECT coalesce((SELECT sum((n_bytes + 4095) / 4096 * 4096) FROM records), 0)
            + coalesce((SELECT sum((n_bytes + 4095) / 4096 * 4096) FROM dying), 0)
            + coalesce((SELECT sum(n_bytes) FROM reserved), 0)";
        Ok(self.one(sql, [], |row| row.get::<_, i64>(0))?.unwrap_or(0).max(0) as u64)
    }

    /// Reserves room for a record; false if somebody else is writing it.
    pub fn reserve(&self, key: &Key, owner: &str, n_bytes: u64) -> SqlResult<bool> {
        Ok(self.run("INSERT OR IGNORE INTO reserved VALUES(?1, ?2, ?3)", params![key, owner, n_bytes as i64])? == 1)
    }

    pub fn is_reserved(&self, key: &Key) -> SqlResult<bool> {
        Ok(self.one("SELECT 1 FROM reserved WHERE key = ?1", params![key], |_| Ok(()))?.is_some())
    }

    pub fn release(&self, key: &Key, owner: &str) -> SqlResult<()> {
        self.run("DELETE FROM reserved WHERE key = ?1 AND owner = ?2", params![key, owner]).map(|_| ())
    }

    /// The least recently used records that nothing follows, nobody reads and no pin holds: keys and bytes.
    pub fn victims(&self, limit: usize) -> SqlResult<Vec<(Key, u64)>> {
        let sql = "SELECT r.key, r.n_bytes FROM uses u JOIN records r ON r.key = u.key
            WHERE r.pinned = 0 AND NOT EXISTS (SELECT 1 FROM records c WHERE c.parent = r.key)
            AND NOT EXISTS (SELECT 1 FROM leases l WHERE l.key = r.key) ORDER BY u.used LIMIT ?1";
        self.all(sql, params![limit as i64], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?.max(0) as u64)))
    }

    /// Marks records as being read, and as used now.
    pub fn lease(&self, keys: &[Key], owner: &str, lease: i64, now: i64) -> SqlResult<()> {
        for (at, key) in keys.iter().enumerate() {
            self.run("INSERT OR REPLACE INTO leases VALUES(?1, ?2, ?3)", params![key, owner, lease])?;
            // What follows others goes first: it counts as used before them.
            self.run("UPDATE uses SET used = ?2, hits = hits + 1 WHERE key = ?1", params![key, now - at as i64])?;
        }
        Ok(())
    }

    pub fn unlease(&self, owner: &str, lease: i64) -> SqlResult<()> {
        self.run("DELETE FROM leases WHERE owner = ?1 AND lease = ?2", params![owner, lease]).map(|_| ())
    }

    /// All owners that the index names.
    pub fn owners(&self) -> SqlResult<Vec<String>> {
        self.all("SELECT owner FROM leases UNION SELECT owner FROM reserved", [], |row| row.get(0))
    }

    pub fn forget_owner(&self, owner: &str) -> SqlResult<()> {
        self.run("DELETE FROM leases WHERE owner = ?1", params![owner])?;
        self.run("DELETE FROM reserved WHERE owner = ?1", params![owner]).map(|_| ())
    }

    /// Sets or takes a pin; true if there is such a record.
    pub fn pin(&self, key: &Key, pinned: bool) -> SqlResult<bool> {
        let Some(row) = self.get(key)? else { return Ok(false) };
        self.run(
            "UPDATE records SET pinned = ?2, digest = ?3 WHERE key = ?1",
            params![key, pinned, digest(&row, pinned)],
        )?;
        Ok(true)
    }

    /// Every sound row.
    pub fn listings(&self) -> SqlResult<Vec<Listing>> {
        let sql = format!(
            "SELECT {COLUMNS}, coalesce((SELECT hits FROM uses u WHERE u.key = records.key), 0),
                coalesce((SELECT used FROM uses u WHERE u.key = records.key), 0) FROM records"
        );
        let read = |row: &rusqlite::Row<'_>| {
            let found = listed(row);
            let (hits, used) = (row.get::<_, i64>(13)?.max(0) as u64, row.get(14)?);
            Ok(found.map(|(row, pinned)| Listing { row, hits, used, pinned }))
        };
        Ok(self.all(&sql, [], read)?.into_iter().flatten().collect())
    }

    /// Keys and files as they stand there, sound or not.
    pub fn files(&self) -> SqlResult<Vec<(Key, String)>> {
        self.all("SELECT key, file FROM records", [], |row| Ok((row.get(0)?, row.get(1)?)))
    }

    /// Keys of states that were used or are pinned.
    pub fn used_states(&self) -> SqlResult<Vec<Key>> {
        let sql = "SELECT r.key FROM records r LEFT JOIN uses u ON u.key = r.key WHERE r.kind = 1 AND (r.pinned OR u.hits > 0)";
        self.all(sql, [], |row| row.get(0))
    }

    pub fn written(&self, day: i64) -> SqlResult<u64> {
        let found = self.one("SELECT n_bytes FROM written WHERE day = ?1", params![day], |row| row.get::<_, i64>(0))?;
        Ok(found.unwrap_or(0).max(0) as u64)
    }

    pub fn note_written(&self, day: i64, n_bytes: u64) -> SqlResult<()> {
        self.run("DELETE FROM written WHERE day < ?1", params![day])?;
        let sql =
            "INSERT INTO written VALUES(?1, ?2) ON CONFLICT(day) DO UPDATE SET n_bytes = n_bytes + excluded.n_bytes";
        self.run(sql, params![day, n_bytes as i64]).map(|_| ())
    }

    pub fn rate(&self, name: &str) -> SqlResult<Option<f64>> {
        self.one("SELECT value FROM rates WHERE name = ?1", params![name], |row| row.get(0))
    }

    pub fn set_rate(&self, name: &str, value: f64) -> SqlResult<()> {
        self.run("INSERT OR REPLACE INTO rates VALUES(?1, ?2)", params![name, value]).map(|_| ())
    }
}

/// The row of [`COLUMNS`] and its pin; None if it was damaged.
fn listed(row: &rusqlite::Row<'_>) -> Option<(Row, bool)> {
    let count = |at: usize| row.get::<_, i64>(at).ok().and_then(|value| usize::try_from(value).ok());
    let found = Row {
        key: row.get(0).ok()?,
        parent: row.get(1).ok()?,
        space: Space::new(row.get(2).ok()?),
        kind: RecordKind::of_code(row.get(3).ok()?)?,
        start: count(4)?,
        end: count(5)?,
        n_bytes: count(6)? as u64,
        grid: u32::try_from(count(7)?).ok()?,
        complete_from: count(8)?,
        keep: row.get(9).ok()?,
        file: row.get(10).ok()?,
    };
    let pinned = row.get(11).ok()?;
    (row.get::<_, i64>(12).ok()? == digest(&found, pinned)).then_some((found, pinned))
}

/// A checksum of all that a row says.
fn digest(row: &Row, pinned: bool) -> i64 {
    let Row { key, parent, space, kind, start, end, n_bytes, grid, complete_from, keep, file } = row;
    let mut bytes = Vec::with_capacity(256);
    for hash in [key, parent, space.bytes()] {
        bytes.extend_from_slice(hash);
    }
    for number in [*start as u64, *end as u64, *n_bytes, u64::from(*grid), *complete_from as u64] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&[kind.code(), u8::from(*keep), u8::from(pinned)]);
    bytes.extend_from_slice(file.as_bytes());
    twox_hash::XxHash3_64::oneshot(&bytes) as i64
}
