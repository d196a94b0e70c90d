//! Walks the tree of records along some tokens. Knows neither memory nor files.

use super::found::{Found, RecordInfo, Tier};
use super::key::{RecordId, Space};
use super::record::{Entry, RecordKind, Wanted, name};
use std::sync::Arc;

/// An index of records. What it gives may be wrong: the walk compares all of it.
pub(super) trait Tree {
    /// Where its records lie.
    fn tier(&self) -> Tier;
    /// The record of this name.
    fn get(&self, id: &RecordId) -> Option<Arc<Entry>>;
    /// Of the records of `kind` after the block `parent` the last one whose tokens are not after `tokens`.
    fn at_or_before(&self, parent: &RecordId, kind: RecordKind, tokens: &[u32]) -> Option<Arc<Entry>>;
    /// Of the same the first one whose tokens come after `tokens`.
    fn after(&self, parent: &RecordId, kind: RecordKind, tokens: &[u32]) -> Option<Arc<Entry>>;
    /// Whether there may be states in `space`.
    fn has_states(&self, space: &Space) -> bool;
}

/// The names of the blocks of some tokens, each found when it is asked for.
pub(super) struct Chain<'a> {
    space: Space,
    tokens: &'a [u32],
    block: usize,
    ids: Vec<RecordId>,
}

impl<'a> Chain<'a> {
    pub fn new(space: &Space, tokens: &'a [u32], block: usize) -> Self {
        Self { space: *space, tokens, block, ids: vec![RecordId::root(space, block)] }
    }

    /// Name of the block that ends at `n_blocks`, which must all be full.
    pub fn at(&mut self, n_blocks: usize) -> RecordId {
        for at in self.ids.len()..=n_blocks {
            let next = self.ids[at - 1].rows(&self.tokens[(at - 1) * self.block..at * self.block]);
            self.ids.push(next);
        }
        self.ids[n_blocks]
    }

    /// All names, the root first.
    pub fn all(&mut self) -> &[RecordId] {
        self.at(self.tokens.len() / self.block);
        &self.ids
    }

    /// The tokens after `n_blocks`, at most a block.
    fn rest(&self, n_blocks: usize) -> &'a [u32] {
        let rest = &self.tokens[n_blocks * self.block..];
        &rest[..rest.len().min(self.block)]
    }

    /// Whether `entry` is a record of `kind` after the first `n_blocks`.
    fn hangs_right(&mut self, entry: &Entry, kind: RecordKind, n_blocks: usize) -> bool {
        let length = entry.tokens.len();
        entry.kind == kind
            && entry.space == self.space
            && entry.parent == self.at(n_blocks)
            && entry.start == n_blocks * self.block
            && match kind {
                RecordKind::Rows => (1..=self.block).contains(&length),
                RecordKind::State => length < self.block,
            }
            && (entry.start..=entry.end()).contains(&entry.complete_from)
    }
}

/// What `trees` have for `tokens`; of two that have the same the first counts.
pub(super) fn find(trees: &[&dyn Tree], space: &Space, tokens: &[u32], block: usize) -> Found {
    let mut chain = Chain::new(space, tokens, block);
    let mut found = Found::default();
    for (at, window) in tokens.chunks_exact(block).enumerate() {
        let id = chain.at(at + 1);
        let block = trees.iter().find_map(|tree| {
            let entry = tree.get(&id).filter(|entry| entry.id == id && entry.tokens == window)?;
            chain.hangs_right(&entry, RecordKind::Rows, at).then(|| RecordInfo::new(entry, tree.tier(), window.len()))
        });
        let Some(block) = block else { break };
        found.blocks.push(block);
    }
    let partials = trees.iter().filter_map(|tree| partial(*tree, &mut chain, found.blocks.len()));
    // Of equals the first: `max_by_key` would take the last.
    found.partial = partials.rev().max_by_key(worth);
    found.states = states(trees, &mut chain);
    found
}

/// Longer first, then complete ones, then those on a grid.
fn worth(record: &RecordInfo) -> (usize, bool, bool) {
    (record.n_common, record.complete_from == record.start, record.grid != 0)
}

/// The rows after `n_blocks` that have most tokens in common with the rest: in the order of tokens they stand next to it.
fn partial(tree: &dyn Tree, chain: &mut Chain<'_>, n_blocks: usize) -> Option<RecordInfo> {
    let rest = chain.rest(n_blocks);
    if rest.is_empty() {
        return None;
    }
    let parent = chain.at(n_blocks);
    let before = tree.at_or_before(&parent, RecordKind::Rows, rest);
    let after = tree.after(&parent, RecordKind::Rows, rest);
    let near = before.into_iter().chain(after).filter_map(|entry| {
        let n_common = common(&entry.tokens, rest);
        let fits = n_common > 0 && chain.hangs_right(&entry, RecordKind::Rows, n_blocks) && entry.is_named_right();
        fits.then(|| RecordInfo::new(entry, tree.tier(), n_common))
    });
    near.max_by_key(worth)
}

/// All states on the way, the deepest first.
fn states(trees: &[&dyn Tree], chain: &mut Chain<'_>) -> Vec<RecordInfo> {
    let trees: Vec<_> = trees.iter().filter(|tree| tree.has_states(&chain.space)).collect();
    let mut states: Vec<RecordInfo> = Vec::new();
    if trees.is_empty() {
        return states;
    }
    for n_blocks in (0..=chain.tokens.len() / chain.block).rev() {
        let parent = chain.at(n_blocks);
        let rest = chain.rest(n_blocks);
        let rest = &rest[..rest.len().min(chain.block - 1)];
        let first = states.len();
        for tree in &trees {
            for entry in prefixes(**tree, &parent, RecordKind::State, rest) {
                let is_known = states[first..].iter().any(|known| known.id == entry.id);
                if !is_known && chain.hangs_right(&entry, RecordKind::State, n_blocks) && entry.is_named_right() {
                    let n_common = entry.tokens.len();
                    states.push(RecordInfo::new(entry, tree.tier(), n_common));
                }
            }
        }
        states[first..].sort_by_key(|state| std::cmp::Reverse(state.end));
    }
    states
}

/// The records after `parent` whose tokens `rest` starts with, the longest first.
///
/// In the order of tokens all of them stand before `rest`; what stands between shares less with it each time.
pub(super) fn prefixes(tree: &dyn Tree, parent: &RecordId, kind: RecordKind, rest: &[u32]) -> Vec<Arc<Entry>> {
    let mut found = Vec::new();
    let mut length = rest.len();
    while let Some(entry) = tree.at_or_before(parent, kind, &rest[..length]) {
        let same = common(&entry.tokens, &rest[..length]);
        let is_prefix = same == entry.tokens.len();
        // A damaged index may answer the same for ever.
        let next = if is_prefix { same.checked_sub(1) } else { Some(same.min(length.wrapping_sub(1))) };
        if is_prefix {
            found.push(entry);
        }
        match next {
            Some(next) if next < length => length = next,
            _ => break,
        }
    }
    found
}

/// Which of `wanted` are not stored, or stored with less. What cannot be stored at all is never missing.
pub(super) fn missing(
    trees: &[&dyn Tree],
    space: &Space,
    tokens: &[u32],
    block: usize,
    wanted: &[Wanted],
) -> Vec<bool> {
    let mut chain = Chain::new(space, tokens, block);
    let mut is_missing = |wanted: &Wanted| {
        let Wanted { kind, start, end, .. } = *wanted;
        let can_be = super::record::check_place(kind, start, end, tokens.len(), block).is_ok();
        can_be && !trees.iter().any(|tree| serving(*tree, &mut chain, wanted).is_some())
    };
    wanted.iter().map(&mut is_missing).collect()
}

/// The records of one tree that have what is `wanted`.
pub(super) fn present(
    tree: &dyn Tree,
    space: &Space,
    tokens: &[u32],
    block: usize,
    wanted: &[Wanted],
) -> Vec<RecordId> {
    let mut chain = Chain::new(space, tokens, block);
    let can_be = |wanted: &&Wanted| {
        super::record::check_place(wanted.kind, wanted.start, wanted.end, tokens.len(), block).is_ok()
    };
    let found = wanted.iter().filter(can_be).filter_map(|wanted| serving(tree, &mut chain, wanted));
    found.map(|entry| entry.id).collect()
}

/// The record that has what is `wanted`: one of its name, or rows that go on where it ends.
fn serving(tree: &dyn Tree, chain: &mut Chain<'_>, wanted: &Wanted) -> Option<Arc<Entry>> {
    let Wanted { kind, start, end, .. } = *wanted;
    let n_blocks = start / chain.block;
    let (parent, covered) = (chain.at(n_blocks), &chain.tokens[start..end]);
    let id = name(&parent, kind, covered);
    let mut serves = |entry: &Arc<Entry>| {
        entry.tokens.starts_with(covered)
            && chain.hangs_right(entry, kind, n_blocks)
            && !wanted.worth().replaces(entry.worth())
    };
    let same = tree.get(&id).filter(|entry| entry.id == id);
    let same = same.filter(&mut serves);
    if same.is_some() || kind != RecordKind::Rows {
        return same;
    }
    tree.after(&parent, kind, covered).filter(serves)
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
