//! Stored prompts of several models under two limits: the trees of their tokens and the order in which they go.

use super::lru::{Kind, Lru};
use super::radix::{Key, Radix};
use std::collections::HashMap;

/// How much may be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Entries.
    pub n_prompts: u64,
    /// Bytes of all entries.
    pub n_bytes: u64,
}

/// An entry that was found, and its number of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its number.
    pub id: u64,
    /// Tokens under which it was stored.
    pub n_tokens: usize,
}

/// What there is for a query; see [`Match`](super::Match).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nearest {
    /// Stored under exactly the query.
    pub exact: Option<Found>,
    /// Stored under the longest proper prefix of the query.
    pub shorter: Option<Found>,
    /// The shortest that goes on from the common prefix.
    pub longer: Option<Found>,
    /// Tokens that `longer` and the query have in common.
    pub common_prefix: usize,
}

/// What was taken out; kept by the caller, who may not want it dropped at once.
#[derive(Debug)]
pub struct Gone<C> {
    /// The values.
    pub values: Vec<C>,
    /// Models of which nothing is left.
    pub models: Vec<u64>,
}

impl<C> Default for Gone<C> {
    fn default() -> Self {
        Self { values: Vec::new(), models: Vec::new() }
    }
}

#[derive(Debug)]
struct Stored<C> {
    model: u64,
    key: Key,
    value: C,
}

/// Values under the tokens of a prompt, per model. The limits hold after each [`settle`](Self::settle).
#[derive(Debug)]
pub struct Prompts<C> {
    limits: Limits,
    trees: HashMap<u64, Radix<u64>>,
    order: Lru<Stored<C>>,
}

impl<C> Prompts<C> {
    /// Nothing yet.
    pub fn new(limits: Limits) -> Self {
        Self { limits, trees: HashMap::new(), order: Lru::default() }
    }

    /// How much may be stored.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Bytes of all entries.
    pub fn n_bytes(&self) -> u128 {
        self.order.n_bytes()
    }

    /// Number and bytes of the entries of one kind.
    pub fn stats(&self, kind: Kind) -> (usize, u128) {
        self.order.stats(kind)
    }

    /// The value of an entry.
    pub fn get(&self, id: u64) -> Option<&C> {
        self.order.get(id).map(|stored| &stored.value)
    }

    /// All entries: number, kind, model and value; of each kind the least recently used first.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Kind, u64, &C)> {
        self.order.iter().map(|(id, kind, stored)| (id, kind, stored.model, &stored.value))
    }

    /// The tokens under which an entry is stored.
    pub fn tokens(&self, id: u64) -> Option<Vec<i64>> {
        let stored = self.order.get(id)?;
        Some(self.trees.get(&stored.model)?.tokens(stored.key))
    }

    /// What there is for a query, in time linear in it. Counts as no use.
    pub fn nearest(&self, model: u64, tokens: &[i64]) -> Nearest {
        let Some(tree) = self.trees.get(&model) else { return Nearest::default() };
        let found = tree.search(tokens);
        let entry = |key: Key| tree.get(key).map(|&id| Found { id, n_tokens: tree.depth(key) });
        Nearest {
            exact: found.exact.and_then(entry),
            shorter: found.shorter.and_then(|(key, _)| entry(key)),
            longer: found.longer.and_then(entry),
            common_prefix: found.common_prefix,
        }
    }

    /// Stores a value as the one used last, in the place of one under the same tokens. `replaces_prefixes` takes out
    /// all that is stored under proper prefixes. A value that no limit leaves room for is refused: nothing changes.
    pub fn insert(
        &mut self,
        model: u64,
        tokens: &[i64],
        (kind, n_bytes, value): (Kind, u64, C),
        replaces_prefixes: bool,
        gone: &mut Gone<C>,
    ) {
        if n_bytes > self.limits.n_bytes || self.limits.n_prompts == 0 {
            gone.values.push(value);
            gone.models.extend((!self.trees.contains_key(&model)).then_some(model));
            return;
        }
        let tree = self.trees.entry(model).or_default();
        let mut replaced = Vec::new();
        self.order.push(kind, n_bytes, |id| {
            let (key, same) = tree.insert(tokens, id);
            replaced.extend(same);
            Stored { model, key, value }
        });
        if replaces_prefixes {
            replaced.extend(tree.remove_prefixes(tokens).into_iter().flatten().map(|(_, id)| id));
        }
        // Their places in the tree are gone already.
        gone.values.extend(replaced.into_iter().filter_map(|id| self.order.remove(id)).map(|stored| stored.value));
    }

    /// Makes an entry the one used last of its kind.
    pub fn touch(&mut self, id: u64) {
        self.order.touch(id);
    }

    /// Takes over what an entry now measures.
    pub fn resize(&mut self, id: u64, n_bytes: u64) {
        self.order.resize(id, n_bytes);
    }

    /// Sets the limits.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Makes the limits hold: what alone has too many bytes goes alone, then others in their order.
    pub fn settle(&mut self, gone: &mut Gone<C>) {
        if self.n_bytes() > u128::from(self.limits.n_bytes) {
            for id in self.order.larger_than(self.limits.n_bytes) {
                self.take(id, gone);
            }
        }
        self.evict(self.limits, gone);
    }

    /// Takes out entries, in their order, until no more than `limits` are left.
    pub fn evict(&mut self, limits: Limits, gone: &mut Gone<C>) {
        while self.len() as u64 > limits.n_prompts || self.n_bytes() > u128::from(limits.n_bytes) {
            let Some(id) = self.order.victim() else { return };
            self.take(id, gone);
        }
    }

    fn take(&mut self, id: u64, gone: &mut Gone<C>) {
        let Some(Stored { model, key, value }) = self.order.remove(id) else { return };
        gone.values.push(value);
        let Some(tree) = self.trees.get_mut(&model) else { return };
        tree.remove(key);
        if tree.is_empty() {
            self.trees.remove(&model);
            gone.models.push(model);
        }
    }
}
