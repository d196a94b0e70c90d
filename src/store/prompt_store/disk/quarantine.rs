//! Records that are doubtful are put aside, a few of them, for whoever wants to know what happened.

use super::row::parse_file_name;
use super::{Disk, file, query, room, row};
use crate::store::prompt_store::found::RecordInfo;
use std::fs;
use std::sync::atomic::Ordering;

/// Files that are kept aside.
const MAX_FILES: usize = 16;
/// What they may take at most; less in a small store.
const MAX_BYTES: u64 = 64 << 20;

impl Disk {
    /// Puts a record's file aside and takes its row out, with all that hangs on it.
    pub(in super::super) fn quarantine(&self, record: &RecordInfo, reason: &str) {
        if self.owner.is_none() {
            return;
        }
        let (id, nonce) = (record.id, record.entry.nonce);
        let taken = self.write_index(|index| {
            let slot = row::slot(&id);
            let Some(row) = query::row_in(index, slot)?.filter(|row| row.entry.id == id) else { return Ok(None) };
            // A newer record of the same name is another record.
            if nonce != 0 && row.entry.nonce != nonce {
                return Ok(None);
            }
            let mut waiting = query::children(index, slot)?;
            query::delete(index, slot)?;
            while let Some(child) = waiting.pop() {
                waiting.extend(query::children(index, child)?);
                if let Some(row) = query::row_in(index, child)? {
                    room::doom(index, &row, self.owner_name())?;
                }
            }
            Ok(Some(row.file_name()))
        });
        match taken {
            Ok(Some(name)) => self.put_aside(&name, reason),
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, "a doubtful record stays in the index"),
        }
        if let Err(error) = self.reap() {
            tracing::debug!(%error, "files below a doubtful record stay for now");
        }
    }

    /// Moves a file of the records aside, or removes it if there is no room.
    pub(super) fn put_aside(&self, name: &str, reason: &str) {
        tracing::warn!(record = name, reason, "a record is put aside");
        self.counts.n_quarantined.fetch_add(1, Ordering::Relaxed);
        let from = self.folder.records().join(name);
        let size = fs::symlink_metadata(&from).map_or(0, |meta| file::whole_pages(meta.len()));
        let limit = MAX_BYTES.min(self.limits.disk_bytes / 32);
        let is_kept = parse_file_name(name).is_some() && size <= limit && self.make_room_aside(limit - size);
        if !is_kept || fs::rename(&from, self.folder.quarantine().join(name)).is_err() {
            let _ = fs::remove_file(&from);
        }
    }

    /// Removes the oldest of what is aside until at most `n_bytes` are left.
    fn make_room_aside(&self, n_bytes: u64) -> bool {
        let entries = fs::read_dir(self.folder.quarantine()).into_iter().flatten().flatten();
        let mut files: Vec<_> = entries
            .filter_map(|entry| {
                let meta = entry.metadata().ok()?;
                Some((meta.modified().ok()?, file::whole_pages(meta.len()), entry.path()))
            })
            .collect();
        files.sort();
        let mut total: u64 = files.iter().map(|(_, size, _)| size).sum();
        let mut n_files = files.len();
        for (_, size, path) in files {
            if total <= n_bytes && n_files < MAX_FILES {
                break;
            }
            if fs::remove_file(&path).is_ok() {
                total -= size;
                n_files -= 1;
            }
        }
        total <= n_bytes && n_files < MAX_FILES
    }
}
