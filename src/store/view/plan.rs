//! Which records a restore takes, and where it ends.

use super::View;
use crate::store::prompt_store::{Found, RecordId, RecordInfo};
use std::collections::HashSet;

/// The records for a boundary.
pub(super) struct Plan {
    pub n_tokens: usize,
    /// The rows of its tokens, from the first on.
    pub rows: Vec<RecordInfo>,
    pub state: Option<RecordInfo>,
    pub is_exact: bool,
}

impl View {
    /// The deepest boundary that every layer can restore, without what turned out `bad`.
    pub(super) fn plan(&self, tokens: &[u32], step: u32, exact: bool, bad: &HashSet<RecordId>) -> Option<Plan> {
        let limit = tokens.len().checked_sub(1)?;
        let Found { blocks, mut partials, mut states } = self.store.find(&self.space, tokens);
        let is_good = |record: &&RecordInfo| !bad.contains(&record.id);
        states.retain(|state| is_good(&state));
        let mut rows: Vec<_> = blocks.iter().take_while(is_good).cloned().collect();
        // What goes on from the last block, then what does from the one before it, and so on.
        for n_blocks in (0..=rows.len()).rev() {
            rows.truncate(n_blocks);
            let next = blocks.get(n_blocks);
            if next.is_some_and(|next| is_good(&next) && !self.is_short(next, step, exact)) {
                partials = next.cloned().into_iter().collect();
            } else if next.is_some() {
                partials = self.store.find_partials(&self.space, tokens, &rows);
            }
            let ends = partials.iter().filter(is_good).map(|last| ((last.start + last.n_common).min(limit), last));
            let ends: Vec<_> = ends.collect();
            for (n, state) in self.boundaries(&ends, &states, step, exact) {
                for (_, last) in ends.iter().filter(|(end, _)| *end >= n) {
                    rows.push((*last).clone());
                    let is_exact = is_on_grid(&rows, n, step) && state.is_none_or(|state| state.grid == step);
                    if (is_exact || !exact) && self.has_windows(&rows, n) {
                        return Some(Plan { n_tokens: n, rows, state: state.cloned(), is_exact });
                    }
                    rows.pop();
                }
            }
        }
        None
    }

    /// Where a restore may end within the records that reach to `ends`, the deepest first.
    fn boundaries<'a>(
        &self,
        ends: &[(usize, &RecordInfo)],
        states: &'a [RecordInfo],
        step: u32,
        exact: bool,
    ) -> Vec<(usize, Option<&'a RecordInfo>)> {
        let Some(start) = ends.first().map(|(_, record)| record.start) else { return Vec::new() };
        let deepest = ends.iter().map(|(end, _)| *end).max().unwrap_or(0);
        if self.has_states() {
            let states = states.iter().filter(|state| state.end > start && state.end <= deepest);
            return states.map(|state| (state.end, Some(state))).collect();
        }
        let mut boundaries: Vec<_> = match step as usize {
            step if exact && step > 0 => (start / step + 1..=deepest / step).map(|at| at * step).collect(),
            // Where a record ends it has most of what windows look back at.
            _ => ends.iter().map(|(end, _)| *end).filter(|end| *end > start).collect(),
        };
        boundaries.sort_unstable_by(|a, b| b.cmp(a));
        boundaries.into_iter().map(|n| (n, None)).collect()
    }

    /// Whether another record in the place of `block` may serve where it does not.
    fn is_short(&self, block: &RecordInfo, step: u32, exact: bool) -> bool {
        (block.complete_from > block.start && self.windows().0 > 0) || (exact && block.grid != step)
    }

    /// True if the rows that windowed layers look back at from `n` are all there.
    fn has_windows(&self, rows: &[RecordInfo], n: usize) -> bool {
        let (window, keeps) = self.windows();
        let from = n.saturating_sub(window);
        let complete = |record: &RecordInfo| record.complete_from <= record.start.max(from);
        let mut recent = rows.iter().filter(|record| record.start < n && record.end > from);
        (window == 0 || recent.all(complete)) && (!keeps || rows.first().is_none_or(|first| first.complete_from == 0))
    }
}

/// Whether the first `n` tokens end with a window of `step` and all their rows were computed in such.
fn is_on_grid(rows: &[RecordInfo], n: usize, step: u32) -> bool {
    step > 0 && n.is_multiple_of(step as usize) && rows.iter().all(|record| record.grid == step)
}
