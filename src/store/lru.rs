//! Which entry goes next: least recently used within a kind, and mlx-lm's order of the kinds.

use std::collections::{BTreeMap, HashMap};

/// What the last tokens of a stored prompt are, as mlx-lm's server tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ends with what the model said.
    Assistant,
    /// Ends with what the user said.
    User,
    /// Ends with the system prompt, which many conversations share.
    System,
}

impl Kind {
    /// All, in the order in which they are given up.
    pub const ALL: [Self; 3] = [Self::Assistant, Self::User, Self::System];

    /// mlx-lm's word.
    pub const fn name(self) -> &'static str {
        ["assistant", "user", "system"][self as usize]
    }

    /// The kind that mlx-lm calls `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// Entries with a kind and a size in bytes. An entry's number is never given twice.
#[derive(Debug)]
pub struct Lru<T> {
    entries: HashMap<u64, Entry<T>>,
    /// Per kind the entries, by the turn at which each was used last.
    queues: [BTreeMap<u64, u64>; 3],
    /// Bytes per kind. Wider than one size, so that no sum overflows.
    n_bytes: [u128; 3],
    turn: u64,
}

#[derive(Debug)]
struct Entry<T> {
    kind: Kind,
    turn: u64,
    n_bytes: u64,
    item: T,
}

impl<T> Default for Lru<T> {
    fn default() -> Self {
        Self { entries: HashMap::new(), queues: Default::default(), n_bytes: [0; 3], turn: 0 }
    }
}

impl<T> Lru<T> {
    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of all entries.
    pub fn n_bytes(&self) -> u128 {
        self.n_bytes.iter().sum()
    }

    /// Number and bytes of the entries of one kind.
    pub fn stats(&self, kind: Kind) -> (usize, u128) {
        (self.queues[kind as usize].len(), self.n_bytes[kind as usize])
    }

    /// The entry `id`.
    pub fn get(&self, id: u64) -> Option<&T> {
        self.entries.get(&id).map(|entry| &entry.item)
    }

    /// All entries with their kinds, kind after kind, the least recently used first.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Kind, &T)> {
        let ids = self.queues.iter().flat_map(BTreeMap::values);
        ids.filter_map(|id| self.entries.get(id).map(|entry| (*id, entry.kind, &entry.item)))
    }

    /// Adds an entry as the one used last; `make` is told its number.
    pub fn push(&mut self, kind: Kind, n_bytes: u64, make: impl FnOnce(u64) -> T) -> u64 {
        self.turn += 1;
        let id = self.turn;
        let item = make(id);
        self.entries.insert(id, Entry { kind, turn: id, n_bytes, item });
        self.queues[kind as usize].insert(id, id);
        self.n_bytes[kind as usize] += u128::from(n_bytes);
        id
    }

    /// Makes `id` the one used last of its kind.
    pub fn touch(&mut self, id: u64) {
        if let Some(entry) = self.entries.get_mut(&id) {
            self.turn += 1;
            let queue = &mut self.queues[entry.kind as usize];
            queue.remove(&entry.turn);
            queue.insert(self.turn, id);
            entry.turn = self.turn;
        }
    }

    /// Sets the size of `id`.
    pub fn resize(&mut self, id: u64, n_bytes: u64) {
        if let Some(entry) = self.entries.get_mut(&id) {
            let total = &mut self.n_bytes[entry.kind as usize];
            *total = *total - u128::from(entry.n_bytes) + u128::from(n_bytes);
            entry.n_bytes = n_bytes;
        }
    }

    /// Takes an entry out.
    pub fn remove(&mut self, id: u64) -> Option<T> {
        let entry = self.entries.remove(&id)?;
        self.queues[entry.kind as usize].remove(&entry.turn);
        self.n_bytes[entry.kind as usize] -= u128::from(entry.n_bytes);
        Some(entry.item)
    }

    /// The entries of more than `n_bytes` bytes.
    pub fn larger_than(&self, n_bytes: u64) -> Vec<u64> {
        self.entries.iter().filter(|(_, entry)| entry.n_bytes > n_bytes).map(|(&id, _)| id).collect()
    }

    /// The entry that goes next: of the first kind that has at least as many entries as the kind after it, else of the
    /// last kind.
    pub fn victim(&self) -> Option<u64> {
        let [assistant, user, system] = &self.queues;
        let pairs = [(assistant, user), (user, system)];
        let queue = pairs.into_iter().find(|(queue, after)| !queue.is_empty() && queue.len() >= after.len());
        queue.map_or(system, |(queue, _)| queue).values().next().copied()
    }
}
