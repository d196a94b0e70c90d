//! Walks the tree of records along some tokens. Knows neither memory nor files.

use super::found::{Found, RecordInfo, Tier};
use super::key::{RecordId, Space};
use super::record::{Class, Entry, RecordKind, Wanted, name};
use std::sync::Arc;

/// An index of records. What it gives may be wrong: the walk compares all of it.
pub(super) trait Tree {
    /// Where its records lie.
    fn tier(&self) -> Tier;
    /// The record of this name.
    fn get(&self, id: &RecordId) -> Option<Arc<Entry>>;
    /// Of the records of `class` after the block `parent` the last one whose tokens are not after `tokens`.
    fn at_or_before(&self, parent: &RecordId, class: Class, tokens: &[u32]) -> Option<Arc<Entry>>;
    /// Of the same the first one whose tokens come after `tokens`.
    fn after(&self, parent: &RecordId, class: Class, tokens: &[u32]) -> Option<Arc<Entry>>;
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

    /// The place after `n_blocks`.
    fn spot(&mut self, n_blocks: usize) -> Spot<'a> {
        let parent = self.at(n_blocks);
        Spot::new(&self.space, parent, n_blocks * self.block, self.tokens, self.block)
    }
}

/// A place in the tree: after some blocks of a query.
pub(super) struct Spot<'a> {
    space: Space,
    parent: RecordId,
    start: usize,
    /// The query's tokens from there on, at most a block.
    rest: &'a [u32],
    block: usize,
}

impl<'a> Spot<'a> {
    fn new(space: &Space, parent: RecordId, start: usize, tokens: &'a [u32], block: usize) -> Self {
        let rest = tokens.get(start..).unwrap_or_default();
        Self { space: *space, parent, start, rest: &rest[..rest.len().min(block)], block }
    }

    /// The place after `blocks`, which were found for `tokens`.
    pub fn after(space: &Space, tokens: &'a [u32], blocks: &[RecordInfo], block: usize) -> Self {
        let (parent, start) =
            blocks.last().map_or_else(|| (RecordId::root(space, block), 0), |last| (last.id, last.end));
        Self::new(space, parent, start, tokens, block)
    }

    /// Whether `entry` is a record of `kind` there.
    fn has(&self, entry: &Entry, kind: RecordKind) -> bool {
        let length = entry.tokens.len();
        entry.kind == kind
            && entry.space == self.space
            && entry.parent == self.parent
            && entry.start == self.start
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
        let spot = chain.spot(at);
        let block = trees.iter().find_map(|tree| {
            let entry = tree.get(&id).filter(|entry| entry.id == id && entry.tokens == window)?;
            spot.has(&entry, RecordKind::Rows).then(|| RecordInfo::new(entry, tree.tier(), window.len()))
        });
        let Some(block) = block else { break };
        found.blocks.push(block);
    }
    found.partials = partials(trees, &chain.spot(found.blocks.len()));
    found.states = states(trees, &mut chain);
    found
}

/// The rows at `spot` that have most tokens in common with what the query goes on with, the longest first, and after it
/// only such as have more rows or another grid: in the order of tokens those of each class stand next to the query.
pub(super) fn partials(trees: &[&dyn Tree], spot: &Spot<'_>) -> Vec<RecordInfo> {
    let Spot { parent, rest, .. } = spot;
    let mut near = Vec::new();
    if rest.is_empty() {
        return near;
    }
    for (tree, class) in trees.iter().flat_map(|tree| Class::ROWS.map(|class| (*tree, class))) {
        let mut entries: Vec<_> = tree.after(parent, class, rest).into_iter().collect();
        entries.extend(tree.at_or_before(parent, class, rest));
        if class.lacks_rows() {
            // Those that end where the query goes on have there what a window looks back at; longer ones may not.
            entries.extend(prefixes(tree, parent, class, rest));
        }
        near.extend(entries.into_iter().filter_map(|entry| {
            let n_common = common(&entry.tokens, rest);
            let fits = n_common > 0 && spot.has(&entry, RecordKind::Rows) && entry.is_named_right();
            fits.then(|| RecordInfo::new(entry, tree.tier(), n_common))
        }));
    }
    // Of equals the first one stays, and the first tree counts.
    near.sort_by_key(|record| {
        std::cmp::Reverse((record.n_common, std::cmp::Reverse(record.complete_from), record.grid != 0))
    });
    let mut best: Vec<RecordInfo> = Vec::new();
    for record in near {
        let has_all = |longer: &RecordInfo| {
            longer.complete_from <= record.complete_from && (record.grid == 0 || longer.grid == record.grid)
        };
        if !best.iter().any(has_all) {
            best.push(record);
        }
    }
    best
}

/// All states on the way, the deepest first.
fn states(trees: &[&dyn Tree], chain: &mut Chain<'_>) -> Vec<RecordInfo> {
    let trees: Vec<_> = trees.iter().filter(|tree| tree.has_states(&chain.space)).collect();
    let mut states: Vec<RecordInfo> = Vec::new();
    if trees.is_empty() {
        return states;
    }
    for n_blocks in (0..=chain.tokens.len() / chain.block).rev() {
        let spot = chain.spot(n_blocks);
        let rest = &spot.rest[..spot.rest.len().min(spot.block - 1)];
        let first = states.len();
        for tree in &trees {
            for entry in prefixes(**tree, &spot.parent, Class::STATE, rest) {
                let is_known = states[first..].iter().any(|known| known.id == entry.id);
                if !is_known && spot.has(&entry, RecordKind::State) && entry.is_named_right() {
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
pub(super) fn prefixes(tree: &dyn Tree, parent: &RecordId, class: Class, rest: &[u32]) -> Vec<Arc<Entry>> {
    let mut found = Vec::new();
    let mut length = rest.len();
    while let Some(entry) = tree.at_or_before(parent, class, &rest[..length]) {
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
    let (spot, covered) = (chain.spot(start / chain.block), &chain.tokens[start..end]);
    let id = name(&spot.parent, kind, covered);
    let serves = |entry: &Arc<Entry>| {
        entry.tokens.starts_with(covered) && spot.has(entry, kind) && !wanted.worth().replaces(entry.worth())
    };
    let same = tree.get(&id).filter(|entry| entry.id == id && serves(entry));
    if same.is_some() || kind != RecordKind::Rows {
        return same;
    }
    Class::ROWS.iter().filter_map(|class| tree.after(&spot.parent, *class, covered)).find(serves)
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
