//! A ring of rows: the last `max_size` tokens, of which the first `keep` stay forever.

/// Where a ring stands. All counts are rows, that is tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Tokens seen so far.
    pub offset: usize,
    /// Row after the last one written.
    pub index: usize,
    /// Rows in the buffer; None before the first update.
    pub len: Option<usize>,
    /// Rows that the ring holds once full.
    pub max_size: usize,
    /// First rows that are never overwritten; below `max_size`.
    pub keep: usize,
}

/// Rows `from .. to` of the old buffer.
pub type Segment = (usize, usize);

/// One token written in place: what happens to the buffer first, and where the row goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Rows of the old buffer that form the new one, in order; None leaves the buffer as it is.
    pub cut: Option<[Segment; 2]>,
    /// Zero rows to append.
    pub added: usize,
    /// Row that the token is written to.
    pub row: usize,
    /// The ring afterwards.
    pub after: Ring,
}

/// Several tokens appended in temporal order: the rows that stay, and the ring afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Append {
    /// Rows of the old buffer that stay before the new ones, in order.
    pub kept: Vec<Segment>,
    /// The ring afterwards.
    pub after: Ring,
}

impl Ring {
    /// An empty ring. The caller has checked `keep < max_size`.
    pub const fn new(max_size: usize, keep: usize) -> Self {
        Self { offset: 0, index: 0, len: None, max_size, keep }
    }

    /// Checks that the numbers are ones that updates and trims lead to; else what was expected and what is there.
    ///
    /// # Errors
    /// The expected relation and the numbers found.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let len = self.len.unwrap_or(0);
        let fault = if self.keep >= self.max_size {
            "0 <= keep < max_size"
        } else if self.is_wrapped() && len < self.max_size {
            "a full ring of max_size rows once offset has reached max_size"
        } else if self.is_wrapped() && !(self.keep..=len).contains(&self.index) {
            "keep <= _idx <= rows"
        } else if self.is_wrapped() && len > self.max_size && self.index != len {
            "_idx at the end of a buffer longer than max_size"
        } else if !self.is_wrapped() && (self.index != self.offset || self.offset > len) {
            "_idx = offset <= rows before the ring is full"
        } else {
            return Ok(());
        };
        Err((fault, format!("{self:?}")))
    }

    /// True once tokens have been, or are about to be, overwritten: nothing can be trimmed any more.
    pub const fn is_wrapped(&self) -> bool {
        self.offset >= self.max_size
    }

    /// Rows of the buffer that were ever written.
    pub fn written(&self) -> usize {
        self.len.map_or(0, |len| len.min(self.offset))
    }

    /// One token: grow by at most `step` rows, cut a buffer that a long prompt left behind, wrap, write.
    pub fn place(&self, step: usize) -> Place {
        let mut after = *self;
        let mut added = 0;
        let mut cut = None;
        let len = self.len.unwrap_or(0);
        let mut new_len = len;
        if self.len.is_none() || (self.offset >= len && len < self.max_size) {
            added = step.min(self.max_size - self.offset.min(self.max_size));
            new_len = len + added;
            after.index = self.offset;
        }
        if new_len > self.max_size {
            cut = Some([(0, self.keep), (new_len - self.max_size + self.keep, new_len)]);
            new_len = self.max_size;
            after.index = self.max_size;
        }
        if after.index == self.max_size {
            after.index = self.keep;
        }
        let row = after.index;
        after.len = Some(new_len);
        after.index += 1;
        after.offset += 1;
        Place { cut, added, row, after }
    }

    /// `n_tokens` other than one: the old rows in temporal order, less those that no later token will see.
    pub fn append(&self, n_tokens: usize) -> Append {
        let mut kept = self.temporal_order();
        let rows: usize = kept.iter().map(|(from, to)| to - from).sum();
        if n_tokens > 0 {
            drop_rows(&mut kept, self.keep, (rows + 1).saturating_sub(self.max_size));
        }
        let rows: usize = kept.iter().map(|(from, to)| to - from).sum();
        let len = rows + n_tokens;
        Append { kept, after: Self { offset: self.offset + n_tokens, index: len, len: Some(len), ..*self } }
    }

    /// Written rows, oldest first; neighbours are joined.
    pub fn temporal_order(&self) -> Vec<Segment> {
        let len = self.len.unwrap_or(0);
        let order: Vec<Segment> = if self.index == len {
            vec![(0, len)]
        } else if self.index < self.offset {
            vec![(0, self.keep), (self.index, len), (self.keep, self.index)]
        } else {
            vec![(0, self.index)]
        };
        join(order)
    }

    /// The ring after `n` tokens are taken back; the caller has checked that it is not wrapped.
    #[must_use]
    pub const fn trimmed(&self, n: usize) -> Self {
        Self { offset: self.offset - n, index: self.index - n, ..*self }
    }

    /// Position of the token in every row, after one more token was placed: for tests and masks.
    pub fn positions_of_append(&self, n_tokens: usize) -> [Segment; 2] {
        let dropped = (self.offset + 1).saturating_sub(self.max_size);
        if dropped == 0 {
            [(0, 0), (0, self.offset + n_tokens)]
        } else {
            [(0, self.keep), (self.keep + dropped, self.offset + n_tokens)]
        }
    }
}

/// Removes empty segments and joins neighbours that touch.
fn join(order: Vec<Segment>) -> Vec<Segment> {
    let mut joined: Vec<Segment> = Vec::with_capacity(order.len());
    for (from, to) in order.into_iter().filter(|(from, to)| from < to) {
        match joined.last_mut() {
            Some(last) if last.1 == from => last.1 = to,
            _ => joined.push((from, to)),
        }
    }
    joined
}

/// Drops `n` rows that come after the first `keep` of the sequence.
fn drop_rows(order: &mut Vec<Segment>, keep: usize, n: usize) {
    let mut result = Vec::with_capacity(order.len() + 1);
    let mut seen = 0;
    for &(from, to) in order.iter() {
        let len = to - from;
        // The part before the hole, and the part behind it.
        let head = keep.saturating_sub(seen).min(len);
        let tail = (keep + n).saturating_sub(seen).min(len);
        result.push((from, from + head));
        result.push((from + tail.max(head), to));
        seen += len;
    }
    *order = join(result);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A ring with the positions that its rows would hold; −1 is a row of zeros.
    #[derive(Debug)]
    struct Model {
        ring: Ring,
        rows: Vec<i64>,
    }

    impl Model {
        fn new(max_size: usize, keep: usize) -> Self {
            Self { ring: Ring::new(max_size, keep), rows: Vec::new() }
        }

        /// Feeds tokens and gives the positions that the update returns.
        fn feed(&mut self, n: usize) -> Vec<i64> {
            let first = self.ring.offset as i64;
            if n == 1 {
                let place = self.ring.place(256);
                self.rows.extend(std::iter::repeat_n(-1, place.added));
                if let Some(cut) = place.cut {
                    self.rows = cut.iter().flat_map(|&(from, to)| self.rows[from..to].to_vec()).collect();
                }
                self.rows[place.row] = first;
                self.ring = place.after;
            } else {
                let append = self.ring.append(n);
                let mut rows: Vec<_> =
                    append.kept.iter().flat_map(|&(from, to)| self.rows[from..to].to_vec()).collect();
                rows.extend(first..first + n as i64);
                self.rows = rows;
                self.ring = append.after;
            }
            assert_eq!(self.ring.len, Some(self.rows.len()));
            self.rows[..self.ring.offset.min(self.rows.len())].to_vec()
        }
    }

    fn fed(max_size: usize, keep: usize, updates: &[usize]) -> Model {
        let mut model = Model::new(max_size, keep);
        for &n in updates {
            model.feed(n);
        }
        model
    }

    #[test]
    fn rows_lie_as_in_mlx_lm() {
        let rows = |model: &Model| (model.ring.offset, model.ring.index, model.rows.clone());
        assert_eq!(rows(&fed(8, 0, &[1; 9])), (9, 1, vec![8, 1, 2, 3, 4, 5, 6, 7]));
        assert_eq!(rows(&fed(8, 2, &[1; 9])), (9, 3, vec![0, 1, 8, 3, 4, 5, 6, 7]));
        assert_eq!(rows(&fed(8, 2, &[1; 14])), (14, 8, vec![0, 1, 8, 9, 10, 11, 12, 13]));
        assert_eq!(rows(&fed(8, 0, &[12])), (12, 12, (0..12).collect()));
        assert_eq!(rows(&fed(8, 0, &[12, 1])), (13, 1, vec![12, 5, 6, 7, 8, 9, 10, 11]));
        assert_eq!(rows(&fed(8, 2, &[12, 1])), (13, 3, vec![0, 1, 12, 7, 8, 9, 10, 11]));
        assert_eq!(rows(&fed(8, 0, &[5, 4, 6])), (15, 13, (2..15).collect()));
        assert_eq!(rows(&fed(8, 0, &[5, 4, 6, 1, 1, 3])), (20, 10, (10..20).collect()));
        assert_eq!(rows(&fed(8, 2, &[5, 4, 6])), (15, 13, [0, 1].into_iter().chain(4..15).collect()));
        assert_eq!(fed(600, 0, &[1; 257]).ring.len, Some(512));
        assert_eq!(fed(600, 0, &[1; 513]).ring.len, Some(600));
        assert_eq!(fed(600, 0, &[1; 601]).ring.index, 1);
    }

    proptest! {
        #[test]
        fn a_step_sees_the_kept_rows_and_the_newest(
            max_size in 1..40_usize,
            keep in 0..39_usize,
            updates in prop::collection::vec(prop_oneof![Just(1), 1..60_usize], 1..30),
        ) {
            prop_assume!(keep < max_size);
            let mut model = Model::new(max_size, keep);
            for n in updates {
                let mut seen = model.feed(n);
                let offset = model.ring.offset as i64;
                // The newest token is always there, no position twice, none of the zeros.
                seen.sort_unstable();
                prop_assert_eq!(*seen.last().expect("rows"), offset - 1);
                prop_assert!(seen.windows(2).all(|pair| pair[0] < pair[1]));
                prop_assert!(seen[0] >= 0);
                // A single step sees exactly the kept rows and the newest ones.
                if n == 1 {
                    let recent = (max_size - keep).min(model.ring.offset.saturating_sub(keep)) as i64;
                    let kept = (keep.min(model.ring.offset)) as i64;
                    let expected: Vec<i64> = (0..kept).chain(offset - recent..offset).collect();
                    prop_assert_eq!(seen, expected);
                } else {
                    let [kept, rest] = Ring { offset: model.ring.offset - n, ..model.ring }.positions_of_append(n);
                    let expected: Vec<i64> = (kept.0..kept.1).chain(rest.0..rest.1).map(|p| p as i64).collect();
                    // The first prompt is stored whole, however long.
                    prop_assert_eq!(&model.rows, &expected);
                }
            }
        }

        #[test]
        fn a_trimmed_ring_goes_on_as_if_the_tokens_had_never_come(
            (max_size, first, cut) in (2..60_usize)
                .prop_flat_map(|max_size| (Just(max_size), 1..max_size))
                .prop_flat_map(|(max_size, first)| (Just(max_size), Just(first), 0..=first)),
            then in prop::collection::vec(1..20_usize, 1..8),
        ) {
            let mut trimmed = fed(max_size, 0, &[first]);
            trimmed.ring = trimmed.ring.trimmed(cut);
            let mut fresh = fed(max_size, 0, &[first - cut]);
            for n in then {
                let (mut a, mut b) = (trimmed.feed(n), fresh.feed(n));
                a.sort_unstable();
                b.sort_unstable();
                prop_assert_eq!(a, b);
            }
        }
    }
}
