//! Questions to the index, all within one of its transactions.

use super::row::{Row, big_endian, prefix, slot};
use crate::store::prompt_store::found::Tier;
use crate::store::prompt_store::key::{RecordId, Space};
use crate::store::prompt_store::record::{Class, Entry};
use crate::store::prompt_store::walk::Tree;
use rusqlite::{Connection, OptionalExtension as _, Params, params};
use std::cell::RefCell;
use std::sync::Arc;

/// A state of the index as a tree. A failure is nothing found; `fault` holds the first one.
pub struct Snapshot<'a> {
    connection: &'a Connection,
    fault: RefCell<Option<rusqlite::Error>>,
}

impl<'a> Snapshot<'a> {
    pub const fn new(connection: &'a Connection) -> Self {
        Self { connection, fault: RefCell::new(None) }
    }

    /// `value`, or the failure that came between.
    pub fn finish<T>(self, value: T) -> rusqlite::Result<T> {
        match self.fault.into_inner() {
            Some(error) => Err(error),
            None => Ok(value),
        }
    }

    /// The failure, if there was one.
    pub fn into_fault(self) -> Option<rusqlite::Error> {
        self.fault.into_inner()
    }

    fn one(&self, sql: &str, params: impl Params) -> Option<Arc<Entry>> {
        match row(self.connection, sql, params) {
            Ok(row) => row.map(|row| Arc::new(row.entry)),
            Err(error) => {
                self.fault.borrow_mut().get_or_insert(error);
                None
            }
        }
    }
}

impl Tree for Snapshot<'_> {
    fn tier(&self) -> Tier {
        Tier::Disk
    }

    fn get(&self, id: &RecordId) -> Option<Arc<Entry>> {
        self.one("SELECT slot, tokens, body FROM records WHERE slot = ?1", [slot(id)])
    }

    fn at_or_before(&self, parent: &RecordId, class: Class, tokens: &[u32]) -> Option<Arc<Entry>> {
        let sql = "SELECT slot, tokens, body FROM records WHERE parent = ?1 AND class = ?2 AND tokens <= ?3
                   ORDER BY tokens DESC LIMIT 1";
        self.one(sql, params![slot(parent), class.number(), big_endian(tokens)])
    }

    fn after(&self, parent: &RecordId, class: Class, tokens: &[u32]) -> Option<Arc<Entry>> {
        let sql = "SELECT slot, tokens, body FROM records WHERE parent = ?1 AND class = ?2 AND tokens > ?3
                   ORDER BY tokens LIMIT 1";
        self.one(sql, params![slot(parent), class.number(), big_endian(tokens)])
    }

    fn has_states(&self, space: &Space) -> bool {
        let sql = "SELECT 1 FROM records WHERE class = 1 AND space = ?1 LIMIT 1";
        let found = self.connection.prepare_cached(sql).and_then(|mut found| found.exists([prefix(&space.0)]));
        found.unwrap_or_else(|error| {
            self.fault.borrow_mut().get_or_insert(error);
            false
        })
    }
}

/// The row that `sql` asks for as slot, tokens, body. One that is damaged is an error.
pub fn row(connection: &Connection, sql: &str, params: impl Params) -> rusqlite::Result<Option<Row>> {
    connection.prepare_cached(sql)?.query_row(params, unpack).optional()
}

/// The row in `slot`.
pub fn row_in(connection: &Connection, slot: i64) -> rusqlite::Result<Option<Row>> {
    row(connection, "SELECT slot, tokens, body FROM records WHERE slot = ?1", [slot])
}

/// Unpacks slot, tokens and body.
pub fn unpack(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
    let (tokens, body) = (row.get_ref(1)?, row.get_ref(2)?);
    Row::unpack(row.get(0)?, tokens.as_blob()?, body.as_blob()?).ok_or_else(damaged)
}

/// Enters `row`, in the place of one of the same name.
pub fn insert(connection: &Connection, row: &Row, last_used: u64, hits: u64) -> rusqlite::Result<()> {
    let entry = &row.entry;
    let sql =
        "INSERT OR REPLACE INTO records(slot, parent, class, space, tokens, body) VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
    connection.prepare_cached(sql)?.execute(params![
        row.slot(),
        slot(&entry.parent),
        entry.class().number(),
        prefix(&entry.space.0),
        big_endian(&entry.tokens),
        row.pack()
    ])?;
    let sql = "INSERT OR REPLACE INTO uses(slot, nonce, size, start, last_used, hits, pinned)
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
    let (nonce, size, start) = (entry.nonce as i64, row.size as i64, entry.start as i64);
    connection.prepare_cached(sql)?.execute(params![
        row.slot(),
        nonce,
        size,
        start,
        last_used as i64,
        hits as i64,
        row.is_pinned
    ])?;
    Ok(())
}

/// Takes the row in `slot` out.
pub fn delete(connection: &Connection, slot: i64) -> rusqlite::Result<()> {
    connection.prepare_cached("DELETE FROM records WHERE slot = ?1")?.execute([slot])?;
    connection.prepare_cached("DELETE FROM uses WHERE slot = ?1")?.execute([slot])?;
    Ok(())
}

/// Slots of the records that hang on the one in `slot`.
pub fn children(connection: &Connection, slot: i64) -> rusqlite::Result<Vec<i64>> {
    connection
        .prepare_cached("SELECT slot FROM records WHERE parent = ?1")?
        .query_map([slot], |row| row.get(0))?
        .collect()
}

/// Whether somebody reads the record in `slot`.
pub fn is_leased(connection: &Connection, slot: i64) -> rusqlite::Result<bool> {
    connection.prepare_cached("SELECT 1 FROM leases WHERE slot = ?1")?.exists([slot])
}

/// When and how often the record in `slot` was used.
pub fn use_of(connection: &Connection, slot: i64) -> rusqlite::Result<Option<(u64, u64)>> {
    let mut found = connection.prepare_cached("SELECT last_used, hits FROM uses WHERE slot = ?1")?;
    found.query_row([slot], |row| Ok((row.get::<_, i64>(0)? as u64, row.get::<_, i64>(1)? as u64))).optional()
}

/// A number that the index sums up.
pub fn sum(connection: &Connection, sql: &str) -> rusqlite::Result<u64> {
    let number: Option<i64> = connection.prepare_cached(sql)?.query_row([], |row| row.get(0))?;
    Ok(number.unwrap_or(0).max(0) as u64)
}

/// What stands for a row that is not as it was packed.
pub fn damaged() -> rusqlite::Error {
    rusqlite::Error::InvalidQuery
}
