//! What a person does with a store: look at it, keep some of it, clear it.

use super::found::{DiskState, Listed, RecordInfo, Stats, Verified};
use super::key::Space;
use super::{PromptStore, walk};
use crate::error::Result;
use std::collections::HashSet;
use std::sync::atomic::Ordering;

impl PromptStore {
    /// Counts.
    pub fn stats(&self) -> Stats {
        if self.check("stats").is_err() {
            return Stats::default();
        }
        let ram = self.ram();
        let (n_queued, queued_bytes) = self.shared.queued();
        let mut stats = Stats {
            ram_records: ram.len(),
            ram_bytes: ram.n_bytes(),
            ram_limit: self.options.ram_bytes,
            n_queued,
            queued_bytes,
            write_limit: self.options.write_bytes_per_day,
            n_pinned: ram.n_pinned(),
            n_hits: self.n_hits.load(Ordering::Relaxed),
            n_misses: self.n_misses.load(Ordering::Relaxed),
            n_evicted: ram.n_evicted(),
            n_quarantined: self.n_quarantined.load(Ordering::Relaxed),
            disk: DiskState::Off,
            ..Stats::default()
        };
        drop(ram);
        if let Some(disk) = self.shared.disk() {
            disk.count(&mut stats);
        }
        stats
    }

    /// All records, each after those that it hangs on.
    pub fn list(&self) -> Vec<Listed> {
        if self.check("list").is_err() {
            return Vec::new();
        }
        let mut listed = self.ram().list();
        if let Some(disk) = self.shared.disk() {
            let in_memory: HashSet<_> = listed.iter().map(|listed| listed.record.id).collect();
            listed.extend(disk.list().into_iter().filter(|listed| !in_memory.contains(&listed.record.id)));
        }
        listed.sort_by_key(|listed| {
            let record = &listed.record;
            (*record.space(), record.start, record.end, record.id)
        });
        listed
    }

    /// Keeps all records that `tokens` start with from eviction; gives the number of those that were not pinned yet.
    /// Waits for what is being written.
    ///
    /// # Errors
    /// [`Order`](crate::Error::Order) for a store that is closed; [`Io`](crate::Error::Io) if the index refuses.
    pub fn pin(&self, space: &Space, tokens: &[u32]) -> Result<usize> {
        self.set_pinned("pin", space, tokens, true)
    }

    /// Undoes [`pin`](Self::pin).
    ///
    /// # Errors
    /// As [`pin`](Self::pin).
    pub fn unpin(&self, space: &Space, tokens: &[u32]) -> Result<usize> {
        self.set_pinned("unpin", space, tokens, false)
    }

    fn set_pinned(&self, op: &'static str, space: &Space, tokens: &[u32], is_pinned: bool) -> Result<usize> {
        self.check(op)?;
        self.shared.settle();
        let found = self.ask(|trees| walk::find(trees, space, tokens, self.options.block_tokens));
        let partials = found.partials.into_iter().filter(|partial| partial.n_common == partial.end - partial.start);
        let records: Vec<RecordInfo> = found.blocks.into_iter().chain(partials).chain(found.states).collect();
        let mut ram = self.ram();
        let n_in_memory = records.iter().filter(|record| ram.set_pinned(&record.id, is_pinned)).count();
        drop(ram);
        let n_on_disk = match self.shared.disk().filter(|disk| disk.is_writable()) {
            Some(disk) => disk.set_pinned(&records, is_pinned)?,
            None => 0,
        };
        Ok(n_in_memory + n_on_disk)
    }

    /// Evicts down to `target_bytes` of the folder (of memory, if there is none), or to the limits; gives the bytes that
    /// were freed. What is pinned or being read stays.
    ///
    /// # Errors
    /// As [`pin`](Self::pin).
    pub fn prune(&self, target_bytes: Option<u64>) -> Result<u64> {
        self.check("prune")?;
        self.shared.settle();
        match self.shared.disk().filter(|disk| disk.is_writable()) {
            Some(disk) => {
                disk.flush();
                disk.shrink(target_bytes.unwrap_or(u64::MAX).min(disk.usable()), false)
            }
            None => Ok(self.ram().evict(target_bytes.unwrap_or(self.options.ram_bytes))),
        }
    }

    /// Reads every byte of every record on the disk and every row of the index; `repair` puts aside what is wrong and
    /// builds the index anew if it is.
    ///
    /// # Errors
    /// As [`pin`](Self::pin). What is wrong with records and index is no error.
    pub fn verify(&self, repair: bool) -> Result<Verified> {
        self.check("verify")?;
        self.shared.settle();
        let Some(disk) = self.shared.disk() else {
            let ram = self.ram();
            let (n_checked, n_bytes) = (ram.len() as u64, ram.n_bytes());
            return Ok(Verified { n_checked, n_bytes, ..Verified::default() });
        };
        disk.verify(repair)
    }

    /// Removes everything, what is pinned too.
    ///
    /// # Errors
    /// As [`pin`](Self::pin).
    pub fn clear(&self) -> Result<()> {
        self.check("clear")?;
        self.shared.settle();
        self.ram().clear();
        match self.shared.disk().filter(|disk| disk.is_writable()) {
            Some(disk) => disk.clear().map(|_| ()),
            None => Ok(()),
        }
    }
}
