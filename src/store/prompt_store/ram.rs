//! Records in memory: those that wait for the disk, and all where there is none.

use super::key::{Key, RecordKind};
use super::record::{NewRecord, Row};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// A record in memory.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub row: Row,
    pub tokens: Vec<u32>,
    pub record: Arc<NewRecord>,
}

#[derive(Debug)]
struct Entry {
    held: Held,
    /// When it was used last; the oldest goes first.
    used: u64,
    hits: u64,
    pins: bool,
    /// Records that follow it.
    n_children: usize,
    /// It waits to be written, and stays until then.
    is_queued: bool,
}

/// The records, and an order to evict them in.
#[derive(Debug, Default)]
pub(super) struct Ram {
    entries: HashMap<Key, Entry>,
    /// Children of a parent, by kind and tokens.
    places: BTreeMap<(Key, RecordKind, Vec<u32>), Key>,
    order: BTreeSet<(u64, Key)>,
    clock: u64,
    pub n_bytes: u64,
}

impl Ram {
    pub fn get(&self, key: &Key) -> Option<&Held> {
        self.entries.get(key).map(|entry| &entry.held)
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The greatest tokens of a kind behind `parent` that are not above `tokens`.
    pub fn floor(&self, parent: &Key, kind: RecordKind, tokens: &[u32]) -> Option<Held> {
        let low = (*parent, kind, Vec::new());
        let high = (*parent, kind, tokens.to_vec());
        self.places.range(low..=high).next_back().and_then(|(_, key)| self.get(key).cloned())
    }

    /// The least tokens of a kind behind `parent` that are not below `tokens`.
    pub fn ceiling(&self, parent: &Key, kind: RecordKind, tokens: &[u32]) -> Option<Held> {
        let low = (*parent, kind, tokens.to_vec());
        let next = self.places.range(low..).next();
        next.filter(|((p, k, _), _)| (p, *k) == (parent, kind)).and_then(|(_, key)| self.get(key).cloned())
    }

    pub fn touch(&mut self, key: &Key) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        self.clock += 1;
        self.order.remove(&(entry.used, *key));
        entry.used = self.clock;
        entry.hits += 1;
        self.order.insert((entry.used, *key));
    }

    /// Takes a record in, in the place of one with the same key.
    pub fn insert(&mut self, held: Held, is_queued: bool) {
        let key = held.row.key;
        let old = self.remove(&key);
        self.clock += 1;
        self.n_bytes += held.row.n_bytes;
        self.places.insert((held.row.parent, held.row.kind, held.tokens.clone()), key);
        if let Some(parent) = self.entries.get_mut(&held.row.parent) {
            parent.n_children += 1;
        }
        let n_children =
            self.places.range((key, RecordKind::Rows, Vec::new())..).take_while(|((p, ..), _)| *p == key).count();
        let pins = old.is_some_and(|old| old.pins);
        self.entries.insert(key, Entry { held, used: self.clock, hits: 0, pins, n_children, is_queued });
        self.order.insert((self.clock, key));
    }

    fn remove(&mut self, key: &Key) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        let Held { row, tokens, .. } = &entry.held;
        self.order.remove(&(entry.used, *key));
        self.places.remove(&(row.parent, row.kind, tokens.clone()));
        self.n_bytes -= row.n_bytes;
        if let Some(parent) = self.entries.get_mut(&row.parent) {
            parent.n_children = parent.n_children.saturating_sub(1);
        }
        Some(entry)
    }

    /// Drops a record and all that follow it; gives how many.
    pub fn drop_tree(&mut self, key: &Key) -> usize {
        let mut keys = vec![*key];
        let mut at = 0;
        while at < keys.len() {
            let parent = keys[at];
            let children = self.places.range((parent, RecordKind::Rows, Vec::new())..);
            keys.extend(children.take_while(|((p, ..), _)| *p == parent).map(|(_, key)| *key));
            at += 1;
        }
        keys.iter().filter(|key| self.remove(key).is_some()).count()
    }

    /// Drops the shorter parts of a record's block, which it holds too.
    pub fn supersede(&mut self, key: &Key) {
        let Some(Held { row, tokens, .. }) = self.get(key).cloned() else { return };
        let mut below = tokens.len();
        while row.kind == RecordKind::Rows && below > 1 {
            let Some(old) = self.floor(&row.parent, row.kind, &tokens[..below - 1]) else { break };
            let common = super::key::n_common(&old.tokens, &tokens);
            let is_held = row.complete_from <= old.row.complete_from && (row.grid != 0 || old.row.grid == 0);
            if common == old.tokens.len() && is_held {
                self.remove(&old.row.key);
            }
            below = common.min(below - 1);
        }
    }

    pub fn drop_one(&mut self, key: &Key) {
        self.remove(key);
    }

    /// The record was written, or will not be.
    pub fn settle(&mut self, key: &Key, stays: bool) {
        match self.entries.get_mut(key) {
            Some(entry) if stays => entry.is_queued = false,
            Some(_) => {
                self.remove(key);
            }
            None => {}
        }
    }

    pub fn pin(&mut self, key: &Key, pins: bool) -> bool {
        self.entries.get_mut(key).map(|entry| entry.pins = pins).is_some()
    }

    /// Drops the least recently used leaves until at most `n_bytes` are left; gives the bytes that went.
    pub fn evict_to(&mut self, n_bytes: u64) -> u64 {
        let before = self.n_bytes;
        while self.n_bytes > n_bytes {
            let is_free = |key: &&(u64, Key)| {
                self.entries.get(&key.1).is_some_and(|e| e.n_children == 0 && !e.pins && !e.is_queued)
            };
            let Some(&(_, key)) = self.order.iter().find(is_free) else { break };
            self.remove(&key);
        }
        before - self.n_bytes
    }

    /// All records, with hits and pins.
    pub fn all(&self) -> impl Iterator<Item = (&Held, u64, bool)> {
        self.entries.values().map(|entry| (&entry.held, entry.hits, entry.pins))
    }

    pub fn clear(&mut self) {
        *self = Self { clock: self.clock, ..Self::default() };
    }
}
