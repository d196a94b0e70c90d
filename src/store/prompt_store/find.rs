//! What is stored of a prompt: a walk down the tree of blocks.

use super::index::{Reader, SqlResult};
use super::key::{self, Key, RecordKind, Space};
use super::ram::Ram;
use super::record::{RecordInfo, Row, Tier};
use std::sync::{Mutex, PoisonError};

/// States that one lookup gives at most; the deepest ones.
const MAX_STATES: usize = 64;

/// What is stored of a prompt.
#[derive(Clone, Debug, Default)]
pub struct StoreFound {
    /// Full blocks of the prompt's tokens, from the first on.
    pub blocks: Vec<RecordInfo>,
    /// The record behind them that has most tokens in common with what follows, at least one.
    pub partial: Option<RecordInfo>,
    /// States whose tokens are the prompt's, deepest first.
    pub states: Vec<RecordInfo>,
}

/// A walk over memory, and over the index if there is a disk.
pub(super) struct Walk<'a> {
    pub ram: &'a Mutex<Ram>,
    pub index: Option<&'a Reader<'a>>,
    pub space: Space,
    pub block: usize,
}

/// A record at a place, its tokens and where it is.
type Placed = (Row, Vec<u32>, Tier);

impl Walk<'_> {
    pub fn find(&self, tokens: &[u32], with_states: bool) -> SqlResult<StoreFound> {
        let mut found = StoreFound::default();
        let mut parents = vec![key::root(&self.space)];
        for (at, tokens) in tokens.chunks_exact(self.block).enumerate() {
            let parent = parents[at];
            let own = key::child(&parent, RecordKind::Rows, tokens);
            let Some((row, tier)) = self.get(&own)? else { break };
            if row.space != self.space || (row.start, row.end) != (at * self.block, (at + 1) * self.block) {
                break;
            }
            found.blocks.push(RecordInfo::new(row, tier, self.block, tokens.to_vec()));
            parents.push(own);
        }
        let done = found.blocks.len() * self.block;
        let rest = &tokens[done..tokens.len().min(done + self.block)];
        if let Some((row, own, tier)) = self.nearest(&parents[found.blocks.len()], done, rest)? {
            let n_common = key::n_common(&own, rest);
            found.partial = Some(RecordInfo::new(row, tier, n_common, own));
        }
        if with_states {
            for (at, parent) in parents.iter().enumerate().rev() {
                let from = at * self.block;
                let tokens = &tokens[from..tokens.len().min(from + self.block)];
                for (row, own, tier) in self.prefixes(parent, RecordKind::State, from, tokens)? {
                    found.states.push(RecordInfo::new(row, tier, own.len(), own));
                }
                if found.states.len() >= MAX_STATES {
                    break;
                }
            }
        }
        Ok(found)
    }

    pub fn get(&self, key: &Key) -> SqlResult<Option<(Row, Tier)>> {
        if let Some(held) = self.ram.lock().unwrap_or_else(PoisonError::into_inner).get(key) {
            return Ok(Some((held.row.clone(), Tier::Ram)));
        }
        let Some(index) = self.index else { return Ok(None) };
        Ok(index.get(key)?.map(|row| (row, Tier::Disk)))
    }

    /// Neighbours in the order of tokens: one of them has the longest common beginning.
    fn nearest(&self, parent: &Key, start: usize, rest: &[u32]) -> SqlResult<Option<Placed>> {
        if rest.is_empty() {
            return Ok(None);
        }
        let kind = RecordKind::Rows;
        let mut found: Vec<Placed> = Vec::new();
        {
            let ram = self.ram.lock().unwrap_or_else(PoisonError::into_inner);
            let held = ram.floor(parent, kind, rest).into_iter().chain(ram.ceiling(parent, kind, rest));
            found.extend(held.map(|held| (held.row, held.tokens, Tier::Ram)));
        }
        if let Some(index) = self.index {
            let on_disk = index.floor(parent, kind, rest)?.into_iter().chain(index.ceiling(parent, kind, rest)?);
            found.extend(on_disk.map(|(tokens, row)| (row, tokens, Tier::Disk)));
        }
        let worth = |(row, tokens, _): &Placed| {
            (key::n_common(tokens, rest), row.grid != 0, std::cmp::Reverse(row.complete_from))
        };
        let fits = |(row, tokens, _): &Placed| {
            row.space == self.space
                && row.start == start
                && row.end == start + tokens.len()
                && key::n_common(tokens, rest) > 0
        };
        Ok(found.into_iter().filter(fits).max_by_key(worth))
    }

    /// Records of a kind whose tokens are the first of `tokens`, longest first.
    pub fn prefixes(&self, parent: &Key, kind: RecordKind, start: usize, tokens: &[u32]) -> SqlResult<Vec<Placed>> {
        let mut found = Vec::new();
        let mut below = Some(tokens.len());
        while let Some(end) = below {
            let held = self.ram.lock().unwrap_or_else(PoisonError::into_inner).floor(parent, kind, &tokens[..end]);
            let held = held.map(|held| (held.row, held.tokens, Tier::Ram));
            let indexed = self.index.map(|index| index.floor(parent, kind, &tokens[..end])).transpose()?.flatten();
            let indexed = indexed.map(|(tokens, row)| (row, tokens, Tier::Disk));
            // Of the same tokens the one in memory is as good and nearer.
            let next = [indexed, held].into_iter().flatten().max_by(|a, b| a.1.cmp(&b.1));
            let Some((row, own, tier)) = next else { break };
            let common = key::n_common(&own, tokens);
            let is_prefix = common == own.len();
            // What lies between the common beginning and what was found is no beginning of the tokens.
            below = if is_prefix { own.len().checked_sub(1) } else { Some(common) };
            if is_prefix && row.space == self.space && (row.start, row.end) == (start, start + own.len()) {
                found.push((row, own, tier));
            }
        }
        Ok(found)
    }
}
