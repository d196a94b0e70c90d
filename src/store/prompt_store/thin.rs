//! States are large and many: of those along a prompt some stay.

use super::key::{self, Key, RecordKind, Space};
use super::record::{Row, Tier};
use super::{Shared, find::Walk, index::SqlResult};
use std::collections::HashSet;

/// The newest states that always stay.
const NEWEST: usize = 2;

impl Shared {
    /// Removes states along `tokens` but the last two, those to be kept, those that were used, and one for each doubling
    /// of the distance from the end.
    pub(super) fn thin(&self, space: &Space, tokens: &[u32]) {
        let states = self.walk(space, |walk| all_states(walk, tokens)).unwrap_or_default();
        let used: HashSet<Key> = self.used();
        let spare = spare(&states.iter().map(|(row, _)| row.end).collect::<Vec<_>>(), self.block);
        let gone: Vec<_> = states
            .into_iter()
            .zip(spare)
            .filter(|((row, _), is_spare)| *is_spare && !row.keep && !used.contains(&row.key))
            .map(|(state, _)| state)
            .collect();
        let on_disk: Vec<Key> = gone.iter().filter(|(_, tier)| *tier == Tier::Disk).map(|(row, _)| row.key).collect();
        for (row, _) in gone.iter().filter(|(_, tier)| *tier == Tier::Ram) {
            self.ram().drop_one(&row.key);
        }
        if let (Some(disk), false) = (&self.disk, on_disk.is_empty()) {
            disk.remove(&on_disk);
        }
    }

    /// Keys of states that were used, or are pinned.
    fn used(&self) -> HashSet<Key> {
        let is_used = |hits: u64, pinned: bool| hits > 0 || pinned;
        let mut used: HashSet<Key> = self
            .ram()
            .all()
            .filter(|(_, hits, pinned)| is_used(*hits, *pinned))
            .map(|(held, ..)| held.row.key)
            .collect();
        let listed = self.disk.as_ref().and_then(|disk| disk.read(|index| index.used_states())).unwrap_or_default();
        used.extend(listed);
        used
    }
}

/// All states along `tokens`, deepest first.
fn all_states(walk: &Walk<'_>, tokens: &[u32]) -> SqlResult<Vec<(Row, Tier)>> {
    let chain = key::chain(&walk.space, tokens, walk.block);
    let mut found = Vec::new();
    for (at, parent) in chain.iter().enumerate().rev() {
        let from = at * walk.block;
        let own = &tokens[from..tokens.len().min(from + walk.block)];
        found
            .extend(walk.prefixes(parent, RecordKind::State, from, own)?.into_iter().map(|(row, _, tier)| (row, tier)));
    }
    Ok(found)
}

/// Which of the states that end at these tokens, deepest first, may go.
fn spare(ends: &[usize], block: usize) -> Vec<bool> {
    let Some(last) = ends.first() else { return Vec::new() };
    let mut doublings = HashSet::new();
    let is_spare = |(at, end): (usize, &usize)| {
        let doubling = ((last - end) / block + 1).ilog2();
        at >= NEWEST && !doublings.insert(doubling)
    };
    ends.iter().enumerate().map(is_spare).collect()
}

#[cfg(test)]
mod tests {
    use super::spare;

    #[test]
    fn the_newest_two_and_one_for_each_doubling_stay() {
        let ends: Vec<usize> = (1..=64).rev().map(|chunk| chunk * 256).collect();
        let kept: Vec<_> =
            ends.iter().zip(spare(&ends, 256)).filter(|(_, is_spare)| !is_spare).map(|(end, _)| end / 256).collect();
        assert_eq!(
            kept,
            [64, 63, 61, 57, 49, 33, 1]
                .map(|chunk: usize| chunk)
                .into_iter()
                .filter(|c| kept.contains(c))
                .collect::<Vec<_>>()
        );
        assert!(kept.len() <= 8 && kept[..2] == [64, 63]);
        assert_eq!(spare(&[], 16), Vec::<bool>::new());
    }
}
