//! Reads everything there is and compares it.

use super::index::Damage;
use super::row::{self, Row};
use super::source::FileSource;
use super::{Disk, file, lock, query};
use crate::error::Result;
use crate::store::prompt_store::found::{RecordInfo, Tier, Verified};
use crate::store::prompt_store::open_record::{OpenRecord, RecordTensor};
use crate::store::prompt_store::record::checksum;
use rusqlite::Connection;
use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

/// What the index says, and what is wrong with it.
#[derive(Default)]
struct Told {
    rows: BTreeMap<String, Row>,
    pending: Vec<i64>,
    faults: Vec<String>,
}

impl Disk {
    /// Checks all records and the index; with `repair` puts aside what is wrong, and builds the index anew if it is.
    pub(in super::super) fn verify(&self, repair: bool) -> Result<Verified> {
        let mut verified = Verified::default();
        let repair = repair && self.is_writable();
        let ask = || {
            let told = lock(&self.writer).read(tell);
            told.unwrap_or_else(|error| Told { faults: vec![error.to_string()], ..Told::default() })
        };
        let mut told = ask();
        verified.faults.extend(told.faults.iter().map(|fault| format!("index: {fault}")));
        if repair && !told.faults.is_empty() {
            self.rebuild(self.folder.index_inode().map_or(Damage::Lost, Damage::Of))?;
            lock(&self.writer).damage = None;
            lock(&self.reader).damage = None;
            // Only now it tells which records there are.
            told = ask();
        }
        let is_index_whole = told.faults.is_empty();
        let mut is_even = true;
        for (name, row) in &told.rows {
            match self.check_record(row) {
                Ok(n_bytes) => {
                    verified.n_checked += 1;
                    verified.n_bytes += n_bytes;
                }
                Err(reason) if !self.is_still_there(row) => tracing::debug!(name, reason, "gone meanwhile"),
                Err(reason) => {
                    verified.faults.push(format!("records/{name}: {reason}"));
                    if repair {
                        let info = RecordInfo::new(Arc::new(row.entry.clone()), Tier::Disk, 0);
                        self.quarantine(&info, &reason);
                    }
                }
            }
        }
        for entry in fs::read_dir(self.folder.records()).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let slot = row::parse_file_name(&name).map(|(id, _)| row::slot(&id));
            let is_awaited = slot.is_some_and(|slot| told.pending.contains(&slot));
            if is_index_whole && !told.rows.contains_key(&name) && !is_awaited && !self.is_known(&name) {
                verified.faults.push(format!("records/{name}: not in the index"));
                is_even = false;
            }
        }
        if repair && !is_even {
            self.reconcile()?;
        }
        verified.is_repaired = repair && is_index_whole;
        Ok(verified)
    }

    /// Reads every byte of a record; gives their number, or what is wrong.
    fn check_record(&self, row: &Row) -> Result<u64, String> {
        let path = self.folder.records().join(row.file_name());
        let opened = file::open(&path).map_err(|error| error.to_string())?;
        let contents = file::read(&path, &opened).map_err(|error| error.to_string())?;
        let mut entry = contents.entry.clone();
        entry.nonce = row.entry.nonce;
        if entry != row.entry || contents.size != row.size {
            return Err("not what the index says".into());
        }
        let n_bytes = entry.n_bytes;
        check_tensors(&FileSource::open(path, opened, contents, None))?;
        Ok(n_bytes)
    }

    /// Whether the index still has exactly this row.
    fn is_still_there(&self, row: &Row) -> bool {
        let now = lock(&self.writer).read(|index| query::row_in(index, row.slot()));
        now.is_ok_and(|now| now.is_some_and(|now| now.entry == row.entry))
    }

    /// Whether the index knows the file `name` by now.
    fn is_known(&self, name: &str) -> bool {
        let Some((id, nonce)) = row::parse_file_name(name) else { return false };
        let known = lock(&self.writer).read(|index| {
            let row = query::row_in(index, row::slot(&id))?;
            let is_dying = index.prepare_cached("SELECT 1 FROM dying WHERE file = ?1")?.exists([name])?;
            Ok(is_dying || row.is_some_and(|row| row.entry.nonce == nonce))
        });
        known.unwrap_or(false) || !self.folder.records().join(name).exists()
    }
}

/// Compares the bytes of every tensor with its checksum.
fn check_tensors(record: &OpenRecord) -> Result<(), String> {
    for (name, tensor) in &record.tensors {
        let RecordTensor { checksum: expected, .. } = *tensor;
        let bytes = record.read(tensor).map_err(|error| error.to_string())?;
        if checksum(&bytes) != expected {
            return Err(format!("'{name}': bytes with another checksum"));
        }
    }
    Ok(())
}

/// All rows, with everything that is wrong about them and the tables around them.
fn tell(index: &Connection) -> rusqlite::Result<Told> {
    let mut told = Told::default();
    let mut check = index.prepare("PRAGMA integrity_check")?;
    for line in check.query_map([], |row| row.get::<_, String>(0))? {
        let line = line?;
        if line != "ok" {
            told.faults.push(line);
        }
    }
    let mut rows = index.prepare(
        "SELECT slot, tokens, body, parent, class, space, nonce, size, start, pinned FROM records LEFT JOIN uses USING (slot)",
    )?;
    let mut rows = rows.query([])?;
    while let Some(columns) = rows.next()? {
        let Ok(row) = query::unpack(columns) else {
            told.faults.push(format!("row {}: not as it was written", columns.get::<_, i64>(0)?));
            continue;
        };
        let entry = &row.entry;
        let expected = [
            row::slot(&entry.parent),
            i64::from(entry.class().number()),
            row::prefix(&entry.space.0),
            entry.nonce as i64,
            row.size as i64,
            entry.start as i64,
            i64::from(row.is_pinned),
        ];
        let is_right =
            (3..10).zip(expected).all(|(at, expected)| columns.get::<_, i64>(at).is_ok_and(|n| n == expected));
        if !is_right || !entry.is_named_right() {
            told.faults.push(format!("record {}: columns that say something else", entry.id));
        }
        told.rows.insert(row.file_name(), row);
    }
    let n_uses = query::sum(index, "SELECT count(*) FROM uses")?;
    if n_uses != told.rows.len() as u64 && told.faults.is_empty() {
        told.faults.push(format!("{n_uses} uses of {} records", told.rows.len()));
    }
    let mut pending = index.prepare("SELECT slot FROM pending")?;
    told.pending = pending.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    Ok(told)
}
