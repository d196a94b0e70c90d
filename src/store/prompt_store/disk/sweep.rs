//! What is done now and then: the dead are swept, doomed files unlinked, leases and uses entered.

use super::probe::{Step, reach};
use super::{Disk, SHORT, lock, owner, room};
use crate::error::{Error, Result};
use rusqlite::params;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::sync::atomic::Ordering;

/// Ending of temporary files, whose names begin with the owner's.
const TEMPORARY: &str = ".tmp";

impl Disk {
    /// Removes what dead owners left. Nothing here may fail a write; what cannot be removed stays for the next time.
    pub(in super::super) fn sweep(&self) {
        let mut names: BTreeSet<String> = owner::names(&self.folder).into_iter().collect();
        let temporaries = self.temporaries();
        names.extend(temporaries.keys().cloned());
        match lock(&self.writer).read(room::owners) {
            Ok(owners) => names.extend(owners),
            Err(error) => tracing::debug!(%error, "dead owners were not looked for in the index"),
        }
        names.remove(self.owner_name());
        let mut is_any_dead = false;
        for dead in names.iter().filter_map(|name| owner::dead(&self.folder, name)) {
            // The index first: what it still says of the dead keeps the lock's file.
            let heir = self.owner_name();
            if let Err(error) = self.write_index(|index| room::inherit(index, &dead.name, heir)) {
                tracing::debug!(%error, owner = dead.name, "a dead owner stays for now");
                continue;
            }
            for path in temporaries.get(&dead.name).into_iter().flatten() {
                let _ = fs::remove_file(self.folder.temporaries().join(path));
            }
            tracing::debug!(owner = dead.name, "swept a dead owner");
            dead.forget();
            is_any_dead = true;
        }
        if is_any_dead {
            // It may have named files that it did not enter.
            if let Err(error) = self.reap().and_then(|()| self.reconcile()) {
                tracing::debug!(%error, "files of a dead owner stay for now");
            }
        }
    }

    /// Temporary files by owner.
    pub(super) fn temporaries(&self) -> BTreeMap<String, Vec<String>> {
        let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for entry in fs::read_dir(self.folder.temporaries()).into_iter().flatten().flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            if let Some((owner, _)) = name.strip_suffix(TEMPORARY).and_then(|name| name.split_once('-')) {
                found.entry(owner.to_owned()).or_default().push(name);
            }
        }
        found
    }

    /// Unlinks the files that this owner doomed.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses; they still count then.
    pub(super) fn reap(&self) -> Result<()> {
        let files: Vec<String> = lock(&self.writer).read(|index| {
            let mut dying = index.prepare_cached("SELECT file FROM dying WHERE owner = ?1")?;
            dying.query_map([self.owner_name()], |row| row.get(0))?.collect()
        })?;
        if files.is_empty() {
            return Ok(());
        }
        for file in &files {
            // The index may be damaged: only names of records are unlinked.
            if super::row::parse_file_name(file).is_none() {
                continue;
            }
            let path = self.folder.records().join(file);
            match reach(Step::Unlink, self.folder.root()).and_then(|()| fs::remove_file(&path)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", &path, error)),
                _ => {}
            }
        }
        self.write_index(|index| {
            let mut forget = index.prepare_cached("DELETE FROM dying WHERE file = ?1")?;
            files.iter().try_for_each(|file| forget.execute([file]).map(|_| ()))
        })
    }

    /// Enters which records were used, and takes back the leases that were given back. Later, if the index is busy.
    pub(in super::super) fn flush(&self) {
        if self.owner.is_none() {
            return;
        }
        let released = std::mem::take(&mut *lock(&self.released));
        let touched = std::mem::take(&mut *lock(&self.touched));
        if released.is_empty() && touched.is_empty() {
            return;
        }
        let entered = lock(&self.writer).write(SHORT, |index| {
            let mut release = index.prepare_cached("DELETE FROM leases WHERE owner = ?1 AND lease = ?2")?;
            for lease in &released {
                release.execute(params![self.owner_name(), *lease as i64])?;
            }
            let sql = "UPDATE uses SET last_used = max(last_used, ?2), hits = hits + ?3 WHERE slot = ?1";
            let mut touch = index.prepare_cached(sql)?;
            for (slot, (last_used, hits)) in &touched {
                touch.execute(params![slot, *last_used as i64, *hits as i64])?;
            }
            Ok(())
        });
        if let Err(error) = entered {
            tracing::debug!(%error, "uses and leases are entered later");
            lock(&self.released).extend(released);
            let mut again = lock(&self.touched);
            for (slot, (last_used, hits)) in touched {
                let entry = again.entry(slot).or_default();
                *entry = (entry.0.max(last_used), entry.1 + hits);
            }
        }
    }

    /// What the background thread does between two puts; `is_due` for what need not be done each time.
    pub(in super::super) fn keep_house(&self, is_due: bool) {
        if self.owner.is_none() {
            return;
        }
        self.mend();
        self.flush();
        if is_due {
            self.sweep();
            let _ = self.reap();
        }
        self.empty_log();
    }

    /// Empties the index's log if it has grown.
    pub(super) fn empty_log(&self) {
        if self.folder.log_size() > self.limits.log().empty_from {
            lock(&self.writer).checkpoint();
        }
    }

    /// Builds the index anew if it turned out damaged.
    pub(super) fn mend(&self) {
        let damage = lock(&self.reader).damage.take();
        let damage = lock(&self.writer).damage.take().or(damage);
        let Some(damaged) = damage else { return };
        tracing::warn!(index = %self.folder.index().display(), "the index is damaged and is built anew from the records");
        match self.rebuild(damaged) {
            Ok(()) => drop(self.counts.n_rebuilds.fetch_add(1, Ordering::Relaxed)),
            Err(error) => {
                tracing::warn!(%error, "the index could not be built anew");
                lock(&self.writer).damage = Some(damaged);
            }
        }
    }
}

/// Takes out what the index says of `disk`, which goes.
pub(super) fn leave(disk: &Disk) {
    let left = disk.write_index(|index| room::inherit(index, disk.owner_name(), disk.owner_name()));
    if let Err(error) = left {
        tracing::debug!(%error, "the next store to be opened sweeps this one");
    }
}
