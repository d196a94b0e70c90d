//! The records in this process's memory: those that wait to be written and, without a disk, all.

use super::found::{Listed, RecordInfo, Tier};
use super::key::{RecordId, Space};
use super::record::{Class, Entry, Record, RecordKind};
use super::thin::{self, Checkpoint};
use super::walk::{Tree, prefixes};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// Place of a record among the others after its parent.
type Place = (RecordId, Class, Vec<u32>);

/// Records under a limit of bytes; leaves of the tree go first, of them the least recently used.
#[derive(Debug)]
pub(super) struct Ram {
    limit: u64,
    slots: HashMap<RecordId, Slot>,
    places: BTreeMap<Place, RecordId>,
    /// Records that none hangs on, by the turn of their last use.
    leaves: BTreeSet<(u64, RecordId)>,
    n_states: HashMap<Space, usize>,
    n_bytes: u64,
    turn: u64,
    /// Records that went to the disk: who walked meanwhile may have missed them both here and there.
    n_written: u64,
    n_evicted: u64,
}

#[derive(Debug)]
struct Slot {
    record: Arc<Record>,
    entry: Arc<Entry>,
    turn: u64,
    hits: u64,
    is_pinned: bool,
    /// Waits to be written.
    is_queued: bool,
}

impl Ram {
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            slots: HashMap::new(),
            places: BTreeMap::new(),
            leaves: BTreeSet::new(),
            n_states: HashMap::new(),
            n_bytes: 0,
            turn: 0,
            n_written: 0,
            n_evicted: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub const fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    pub const fn n_written(&self) -> u64 {
        self.n_written
    }

    pub const fn n_evicted(&self) -> u64 {
        self.n_evicted
    }

    pub fn n_pinned(&self) -> u64 {
        self.slots.values().filter(|slot| slot.is_pinned).count() as u64
    }

    /// Takes a record, unless what is there already has all of it: then that is given. Tails that it makes needless go.
    pub fn insert(&mut self, record: Arc<Record>, is_queued: bool) -> Option<Arc<Record>> {
        let entry = &record.entry;
        let id = entry.id;
        if let Some(slot) = self.present(entry).and_then(|id| self.slots.get_mut(&id)) {
            slot.is_queued |= is_queued;
            return Some(Arc::clone(&slot.record));
        }
        let old = self.slots.get(&id).map_or((0, false), |slot| (slot.hits, slot.is_pinned));
        self.remove(&id);
        if entry.kind == RecordKind::Rows {
            self.supersede(entry);
        }
        self.turn += 1;
        self.n_bytes += record.size();
        if entry.kind == RecordKind::State {
            *self.n_states.entry(entry.space).or_default() += 1;
        }
        self.places.insert(place(entry), id);
        if let Some(parent) = self.slots.get(&entry.parent) {
            self.leaves.remove(&(parent.turn, entry.parent));
        }
        let entry = Arc::new(entry.clone());
        let slot = Slot { record, entry, turn: self.turn, hits: old.0, is_pinned: old.1, is_queued };
        self.slots.insert(id, slot);
        self.settle(id);
        self.evict(self.limit);
        None
    }

    /// The record that has all that `new` has: one of its name, or one that goes on where it ends.
    fn present(&self, new: &Entry) -> Option<RecordId> {
        let serves = |entry: &Entry| !new.worth().replaces(entry.worth());
        if let Some(slot) = self.slots.get(&new.id) {
            return serves(&slot.entry).then_some(new.id);
        }
        if new.kind != RecordKind::Rows {
            return None;
        }
        let mut longer = Class::ROWS.iter().filter_map(|&class| self.after(&new.parent, class, &new.tokens));
        let goes_on =
            |longer: &Arc<Entry>| longer.tokens.starts_with(&new.tokens) && is_needless(new, longer) && serves(longer);
        longer.find(goes_on).map(|longer| longer.id)
    }

    fn supersede(&mut self, new: &Entry) {
        let shorter = &new.tokens[..new.tokens.len() - 1];
        let prefixes = |class: &Class| prefixes(&*self, &new.parent, *class, shorter);
        let tails: Vec<_> = Class::ROWS
            .iter()
            .flat_map(prefixes)
            .filter(|tail| !tail.tokens.is_empty() && is_needless(tail, new))
            .map(|tail| tail.id)
            .collect();
        for id in tails {
            let slot = self.slots.get(&id);
            if slot.is_some_and(|slot| !slot.is_queued && !slot.is_pinned) {
                self.remove(&id);
            }
        }
    }

    /// The record `id`, used now.
    pub fn open(&mut self, id: &RecordId) -> Option<Arc<Record>> {
        self.turn += 1;
        let turn = self.turn;
        let slot = self.slots.get_mut(id)?;
        self.leaves.remove(&(slot.turn, *id));
        slot.turn = turn;
        slot.hits += 1;
        let record = Arc::clone(&slot.record);
        self.settle(*id);
        Some(record)
    }

    /// The record `id`, which waits to be written from now on.
    pub fn queue(&mut self, id: &RecordId) -> Option<Arc<Record>> {
        let slot = self.slots.get_mut(id)?;
        slot.is_queued = true;
        Some(Arc::clone(&slot.record))
    }

    /// The record has been written, or could not be: it no longer waits.
    pub fn release(&mut self, record: &Arc<Record>, is_written: bool) {
        let id = record.entry.id;
        // A better one may have taken its place, which waits itself.
        let Some(slot) = self.slots.get_mut(&id).filter(|slot| Arc::ptr_eq(&slot.record, record)) else { return };
        slot.is_queued = false;
        if is_written {
            self.n_written += 1;
            self.remove(&id);
        } else {
            self.evict(self.limit);
        }
    }

    /// Pins or unpins; whether that changed anything.
    pub fn set_pinned(&mut self, id: &RecordId, is_pinned: bool) -> bool {
        let slot = self.slots.get_mut(id);
        slot.is_some_and(|slot| std::mem::replace(&mut slot.is_pinned, is_pinned) != is_pinned)
    }

    /// Evicts until at most `target` bytes are left, as far as it may; gives the bytes that went.
    pub fn evict(&mut self, target: u64) -> u64 {
        let before = self.n_bytes;
        // What must stay is set aside, so that the first leaf is always one to look at.
        let mut kept = Vec::new();
        while self.n_bytes > target {
            let Some((turn, id)) = self.leaves.pop_first() else { break };
            let slot = &self.slots[&id];
            if slot.is_queued || slot.is_pinned {
                kept.push((turn, id));
            } else {
                self.remove(&id);
                self.n_evicted += 1;
            }
        }
        self.leaves.extend(kept);
        before - self.n_bytes
    }

    /// Takes a record out, and all that hangs on it.
    pub fn remove_tree(&mut self, id: &RecordId) -> usize {
        let mut waiting = vec![*id];
        let mut n_removed = 0;
        while let Some(id) = waiting.pop() {
            waiting.extend(self.children(&id));
            n_removed += usize::from(self.remove(&id));
        }
        n_removed
    }

    /// Takes all out that nobody waits for.
    pub fn clear(&mut self) {
        let ids: Vec<_> = self.slots.iter().filter(|(_, slot)| !slot.is_queued).map(|(id, _)| *id).collect();
        for id in ids {
            self.remove(&id);
        }
    }

    pub fn list(&self) -> Vec<Listed> {
        let listed = self.slots.values().map(|slot| Listed {
            record: RecordInfo::new(Arc::clone(&slot.entry), Tier::Ram, slot.entry.tokens.len()),
            parent: slot.entry.parent,
            is_pinned: slot.is_pinned,
            hits: slot.hits,
            last_used: 0,
        });
        listed.collect()
    }

    /// Drops those of `states`, the deepest first, that thinning does not keep.
    pub fn thin(&mut self, states: &[RecordInfo]) {
        let slots = states.iter().filter_map(|state| self.slots.get(&state.id));
        let known: Vec<_> = slots
            .map(|slot| {
                let must_stay = slot.entry.keep || slot.is_pinned || slot.is_queued || slot.hits > 0;
                (Checkpoint { end: slot.entry.end(), must_stay }, slot.entry.id)
            })
            .collect();
        let checkpoints: Vec<_> = known.iter().map(|(checkpoint, _)| *checkpoint).collect();
        for at in thin::dropped(&checkpoints) {
            self.remove(&known[at].1);
        }
    }

    /// Takes one record out, whatever hangs on it.
    pub fn remove(&mut self, id: &RecordId) -> bool {
        let Some(slot) = self.slots.remove(id) else { return false };
        self.leaves.remove(&(slot.turn, *id));
        self.places.remove(&place(&slot.entry));
        self.n_bytes -= slot.record.size();
        if slot.entry.kind == RecordKind::State
            && let Some(n_states) = self.n_states.get_mut(&slot.entry.space)
        {
            *n_states -= 1;
            if *n_states == 0 {
                self.n_states.remove(&slot.entry.space);
            }
        }
        self.settle(slot.entry.parent);
        true
    }

    /// Puts `id` among the leaves if it is one.
    fn settle(&mut self, id: RecordId) {
        if let Some(slot) = self.slots.get(&id)
            && self.children(&id).next().is_none()
        {
            self.leaves.insert((slot.turn, id));
        }
    }

    fn children(&self, id: &RecordId) -> impl Iterator<Item = RecordId> {
        let id = *id;
        let from = self.places.range((id, Class::ROWS[0], Vec::new())..);
        from.take_while(move |(place, _)| place.0 == id).map(|(_, child)| *child)
    }
}

fn place(entry: &Entry) -> Place {
    (entry.parent, entry.class(), entry.tokens.clone())
}

/// Whether `new`, which goes on where `tail` ends, has all that `tail` has.
pub(super) const fn is_needless(tail: &Entry, new: &Entry) -> bool {
    new.complete_from <= tail.complete_from && (new.grid != 0 || tail.grid == 0)
}

impl Tree for Ram {
    fn tier(&self) -> Tier {
        Tier::Ram
    }

    fn get(&self, id: &RecordId) -> Option<Arc<Entry>> {
        self.slots.get(id).map(|slot| Arc::clone(&slot.entry))
    }

    fn at_or_before(&self, parent: &RecordId, class: Class, tokens: &[u32]) -> Option<Arc<Entry>> {
        let place = (*parent, class, tokens.to_vec());
        let (place, id) = self.places.range(..=place).next_back()?;
        (place.0 == *parent && place.1 == class).then(|| self.get(id))?
    }

    fn after(&self, parent: &RecordId, class: Class, tokens: &[u32]) -> Option<Arc<Entry>> {
        let place = (*parent, class, tokens.to_vec());
        let (place, id) = self.places.range((std::ops::Bound::Excluded(place), std::ops::Bound::Unbounded)).next()?;
        (place.0 == *parent && place.1 == class).then(|| self.get(id))?
    }

    fn has_states(&self, space: &Space) -> bool {
        self.n_states.contains_key(space)
    }
}
