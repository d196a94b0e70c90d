//! What people ask of a store: what it holds, what may go, whether it is sound.

use super::key::{self, RecordKind, Space};
use super::record::{self, OpenRecord, Tier};
use super::{PromptStore, Shared};
use crate::error::{Error, Result};
use std::sync::atomic::Ordering;

/// Numbers of a store.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Records on disk, and bytes of all files of the store.
    pub n_disk: usize,
    /// Bytes of everything in the folder.
    pub disk_bytes: u64,
    /// The cap on them.
    pub disk_limit: u64,
    /// Records in memory.
    pub n_ram: usize,
    /// Their bytes.
    pub ram_bytes: u64,
    /// The cap on them.
    pub ram_limit: u64,
    /// Bytes that wait to be written.
    pub queued_bytes: u64,
    /// Lookups of this process that found something, and those that did not.
    pub n_hits: u64,
    /// Lookups that found nothing.
    pub n_misses: u64,
    /// Damaged records that were set aside.
    pub n_quarantined: usize,
    /// Bytes written today.
    pub written_today: u64,
    /// The budget for a day.
    pub write_limit: Option<u64>,
    /// Times that this process made the index anew.
    pub n_rebuilds: u64,
}

/// One record, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Names the record.
    pub id: String,
    /// Names the record before it.
    pub parent: String,
    /// Names the model and all that goes with it.
    pub space: String,
    /// What it holds.
    pub kind: RecordKind,
    /// Its first token.
    pub start: usize,
    /// The token behind its last.
    pub end: usize,
    /// Bytes.
    pub n_bytes: u64,
    /// Times that it was restored.
    pub hits: u64,
    /// Microseconds since 1970; 0 in memory.
    pub used: i64,
    /// It is kept from eviction.
    pub pinned: bool,
    /// Where it lies.
    pub tier: Tier,
}

/// What a check of the whole store found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Records that were read from their first byte to their last.
    pub n_records: usize,
    /// Their bytes.
    pub n_bytes: u64,
    /// Names of those that are damaged.
    pub damaged: Vec<String>,
    /// Files that the index does not know, and rows of the index without a file.
    pub n_unknown: usize,
    /// The index is sound.
    pub is_index_sound: bool,
}

impl Verified {
    /// True if nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.damaged.is_empty() && self.n_unknown == 0 && self.is_index_sound
    }
}

impl PromptStore {
    /// Numbers of the store.
    pub fn stats(&self) -> Stats {
        let shared = &self.shared;
        // Apart: within one expression the first lock would still be held at the second.
        let (n_ram, ram_bytes) = {
            let ram = shared.ram();
            (ram.len(), ram.n_bytes)
        };
        let mut stats = Stats {
            n_ram,
            ram_bytes,
            ram_limit: shared.ram_bytes,
            queued_bytes: shared.queue.n_bytes(),
            n_hits: shared.n_hits.load(Ordering::Relaxed),
            n_misses: shared.n_misses.load(Ordering::Relaxed),
            ..Stats::default()
        };
        if let Some(disk) = shared.disk.as_ref().filter(|_| self.is_usable()) {
            stats.n_disk = disk.read(|index| index.files()).map_or(0, |files| files.len());
            stats.disk_bytes = disk.folder.n_bytes();
            (stats.disk_limit, stats.write_limit) = disk.limits();
            stats.n_quarantined = disk.folder.quarantined().0;
            stats.written_today = disk.written_today();
            stats.n_rebuilds = disk.rebuilds.load(Ordering::Relaxed);
        }
        stats
    }

    /// All records, parents before their children.
    pub fn list(&self) -> Vec<Listed> {
        if !self.is_usable() {
            return Vec::new();
        }
        let shared = &self.shared;
        let listed = |row: &record::Row, hits, used, pinned, tier| Listed {
            id: key::hex(&row.key),
            parent: key::hex(&row.parent),
            space: key::hex(row.space.bytes()),
            kind: row.kind,
            start: row.start,
            end: row.end,
            n_bytes: row.n_bytes,
            hits,
            used,
            pinned,
            tier,
        };
        let mut all: Vec<_> =
            shared.ram().all().map(|(held, hits, pinned)| listed(&held.row, hits, 0, pinned, Tier::Ram)).collect();
        let on_disk = shared.disk.as_ref().and_then(|disk| disk.read(|index| index.listings())).unwrap_or_default();
        all.extend(on_disk.iter().map(|l| listed(&l.row, l.hits, l.used, l.pinned, Tier::Disk)));
        all.sort_by(|a, b| (&a.space, a.start, a.end, &a.id).cmp(&(&b.space, b.start, b.end, &b.id)));
        all.dedup_by(|a, b| a.id == b.id);
        all
    }

    /// Keeps all records of a prompt from eviction; gives how many.
    ///
    /// # Errors
    /// [`Error::Value`] for a store that is closed, or in a forked child.
    pub fn pin(&self, space: &Space, tokens: &[u32]) -> Result<usize> {
        self.set_pins("PromptStore.pin", space, tokens, true)
    }

    /// Takes the pins of a prompt's records back; gives how many.
    ///
    /// # Errors
    /// As [`pin`](Self::pin).
    pub fn unpin(&self, space: &Space, tokens: &[u32]) -> Result<usize> {
        self.set_pins("PromptStore.unpin", space, tokens, false)
    }

    fn set_pins(&self, op: &'static str, space: &Space, tokens: &[u32], pins: bool) -> Result<usize> {
        self.check_usable(op)?;
        let found = self.shared.find(space, tokens, true);
        let whole = found.partial.filter(|partial| partial.n_common == partial.end - partial.start);
        let keys: Vec<_> =
            found.blocks.iter().chain(&whole).chain(&found.states).map(|record| record.row.key).collect();
        Ok(self.shared.pin_keys(&keys, pins))
    }

    /// Pins or unpins the record whose name begins with `id`, and those before it; gives how many.
    ///
    /// # Errors
    /// [`Error::Value`] if there is no such record, or more than one.
    pub fn pin_id(&self, id: &str, pins: bool) -> Result<usize> {
        let op = "PromptStore.pin";
        self.check_usable(op)?;
        let all = self.list();
        let mut found = all.iter().filter(|listed| listed.id.starts_with(id));
        let (Some(only), None) = (found.next(), found.next()) else {
            return Err(Error::value(op, "the beginning of one record's name", id));
        };
        let mut path = vec![only];
        while let Some(parent) = all.iter().find(|listed| listed.id == path[path.len() - 1].parent) {
            path.push(parent);
        }
        let keys: Vec<_> = path.iter().filter_map(|listed| record::unhex(&listed.id)).collect();
        Ok(self.shared.pin_keys(&keys, pins))
    }

    /// Evicts the least recently used until at most `target` bytes of records are left, or none that may go; gives the
    /// bytes. None: dead owners' leftovers alone go.
    ///
    /// # Errors
    /// [`Error::Value`] for a store that is closed, or in a forked child.
    pub fn prune(&self, target: Option<u64>) -> Result<u64> {
        self.check_usable("PromptStore.prune")?;
        let mut freed = 0;
        if let Some(target) = target {
            freed += self.shared.ram().evict_to(target);
        }
        if let Some(disk) = self.shared.disk.as_ref().filter(|disk| !disk.is_read_only()) {
            let before = disk.folder.n_bytes();
            disk.sweep();
            disk.reconcile();
            if let Some(target) = target {
                disk.shrink_to(target);
            }
            freed += before.saturating_sub(disk.folder.n_bytes());
        }
        Ok(freed)
    }

    /// Reads every record and compares it with its checksums and the index. With `repair` what is damaged is set aside
    /// and the index made right.
    ///
    /// # Errors
    /// [`Error::Value`] for a store that is closed, or in a forked child.
    pub fn verify(&self, repair: bool) -> Result<Verified> {
        self.check_usable("PromptStore.verify")?;
        let mut found = Verified { is_index_sound: true, ..Verified::default() };
        let Some(disk) = &self.shared.disk else { return Ok(found) };
        let repair = repair && !disk.is_read_only();
        found.is_index_sound = disk.is_index_sound();
        if !found.is_index_sound && repair {
            disk.rebuild();
        }
        let listings = disk.read(|index| index.listings()).unwrap_or_default();
        let named = disk.read(|index| index.files()).unwrap_or_default().len();
        // A row that does not fit its checksum.
        found.is_index_sound &= named == listings.len();
        for (file, n_bytes) in disk.folder.records() {
            let row = listings.iter().map(|listing| &listing.row).find(|row| row.file == file);
            found.n_unknown += usize::from(row.is_none());
            found.n_records += 1;
            found.n_bytes += n_bytes;
            let sound = record::open(&disk.folder.record(&file)).and_then(|decoded| {
                let is_listed = row.is_none_or(|row| *row == decoded.row);
                let fault = || Error::value("verify", "the record that the index names", "another");
                OpenRecord::verify(&decoded.open).and(if is_listed { Ok(()) } else { Err(fault()) })
            });
            if let Err(error) = sound {
                tracing::warn!(%error, file, "a damaged record");
                if repair {
                    match row {
                        Some(row) => disk.quarantine(row),
                        None => disk.folder.set_aside(&file),
                    }
                }
                found.damaged.push(file);
            }
        }
        found.n_unknown += listings.iter().filter(|listing| !disk.folder.record(&listing.row.file).exists()).count();
        if repair && !found.is_sound() {
            disk.rebuild();
            disk.sweep();
        }
        Ok(found)
    }

    /// Removes every record; pinned ones too.
    ///
    /// # Errors
    /// [`Error::Value`] for a store that is closed, or in a forked child.
    pub fn clear(&self) -> Result<()> {
        self.check_usable("PromptStore.clear")?;
        self.shared.ram().clear();
        if let Some(disk) = self.shared.disk.as_ref().filter(|disk| !disk.is_read_only()) {
            let keys: Vec<_> =
                disk.read(|index| index.files()).unwrap_or_default().into_iter().map(|(key, _)| key).collect();
            disk.remove(&keys);
            disk.reconcile();
        }
        Ok(())
    }

    /// The average of a measured rate, such as bytes per second of restores.
    pub fn rate(&self, name: &str) -> Option<f64> {
        if self.is_usable() { self.shared.rate(name) } else { None }
    }

    /// Takes a measured rate into its average.
    pub fn note_rate(&self, name: &str, value: f64) {
        if self.is_usable() {
            self.shared.note_rate(name, value);
        }
    }
}

impl Shared {
    fn pin_keys(&self, keys: &[key::Key], pins: bool) -> usize {
        let mut n_pinned = 0;
        for key in keys {
            let in_ram = self.ram().pin(key, pins);
            let on_disk = self.disk.as_ref().and_then(|disk| disk.write(|index| index.pin(key, pins)));
            n_pinned += usize::from(in_ram || on_disk == Some(true));
        }
        n_pinned
    }
}
