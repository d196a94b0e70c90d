//! What a store has for some tokens.

use super::key::{RecordId, Space};
use super::record::{Entry, RecordKind};
use std::sync::Arc;

/// Where a record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tier {
    /// In this process's memory.
    Ram,
    /// In a file.
    Disk,
}

/// A record, as the index tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordInfo {
    /// Its name.
    pub id: RecordId,
    /// What it holds.
    pub kind: RecordKind,
    /// First token.
    pub start: usize,
    /// Token after the last.
    pub end: usize,
    /// Bytes of its tensors.
    pub n_bytes: u64,
    /// The step in whose full windows all rows were computed; 0 if there is none.
    pub grid: u32,
    /// First token from which the rows of all layers with a window are there.
    pub complete_from: usize,
    /// A state that thinning leaves.
    pub keep: bool,
    /// Where it lies.
    pub tier: Tier,
    /// Tokens from `start` on that equal the query's.
    pub n_common: usize,
    pub(super) entry: Arc<Entry>,
}

impl RecordInfo {
    pub(super) fn new(entry: Arc<Entry>, tier: Tier, n_common: usize) -> Self {
        let Entry { id, kind, start, n_bytes, grid, complete_from, keep, .. } = *entry;
        let end = entry.end();
        Self { id, kind, start, end, n_bytes, grid, complete_from, keep, tier, n_common, entry }
    }

    /// The tokens that it covers.
    pub fn tokens(&self) -> &[u32] {
        &self.entry.tokens
    }

    /// The space that it was put into.
    pub fn space(&self) -> &Space {
        &self.entry.space
    }
}

/// What a store has for a query.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Full blocks from token 0 on, without a gap.
    pub blocks: Vec<RecordInfo>,
    /// Records after the last of `blocks` that have most tokens in common with the rest of the query, at least one: tails,
    /// or full blocks that go on differently or longer. The longest first; each of the others has more rows of windowed
    /// layers than those before it, or is on a grid of its own.
    pub partials: Vec<RecordInfo>,
    /// States at boundaries of the query, all of whose tokens are the query's; the deepest first.
    pub states: Vec<RecordInfo>,
}

/// A record, as lists show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// What the index knows of it; `n_common` is the number of its tokens.
    pub record: RecordInfo,
    /// The block before it; of the first block of a space a name that no record has.
    pub parent: RecordId,
    /// Whether eviction leaves it.
    pub is_pinned: bool,
    /// How often it was opened.
    pub hits: u64,
    /// When it was opened or put last, in seconds since 1970; 0 in memory.
    pub last_used: u64,
}

/// What stands between a store and its folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DiskState {
    /// Not asked for, or turned off by the environment.
    #[default]
    Off,
    /// In use.
    On,
    /// Read, never written.
    ReadOnly,
    /// Out of order for now: what went wrong.
    Broken(String),
}

/// Counts of a store. Those of events are this process's, since it opened the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Records in memory.
    pub ram_records: usize,
    /// Their bytes.
    pub ram_bytes: u64,
    /// What they may take.
    pub ram_limit: u64,
    /// Records that wait to be written.
    pub n_queued: usize,
    /// Their bytes.
    pub queued_bytes: u64,
    /// Whether the folder is in use.
    pub disk: DiskState,
    /// Records on the disk.
    pub disk_records: u64,
    /// All that counts against the limit: records, temporary files, reservations, quarantine, index and its log.
    pub disk_bytes: u64,
    /// What they may take.
    pub disk_limit: u64,
    /// Records of either tier that are pinned.
    pub n_pinned: u64,
    /// Bytes written today, by all processes.
    pub written_today: u64,
    /// What may be written in a day.
    pub write_limit: Option<u64>,
    /// Queries that found something.
    pub n_hits: u64,
    /// Queries that found nothing.
    pub n_misses: u64,
    /// Records written to the disk.
    pub n_written: u64,
    /// Bytes of them.
    pub written_bytes: u64,
    /// Records evicted for room, from either tier.
    pub n_evicted: u64,
    /// Records found damaged or doubtful.
    pub n_quarantined: u64,
    /// How often the index was built anew from the records.
    pub n_rebuilds: u64,
}

/// What a check of a store found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Records whose every byte was read.
    pub n_checked: u64,
    /// Bytes of them.
    pub n_bytes: u64,
    /// What is wrong: the file or the part of the index, and how. Empty for a store in order.
    pub faults: Vec<String>,
    /// Whether the faults were mended.
    pub is_repaired: bool,
}
