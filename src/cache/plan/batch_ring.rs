//! A ring of columns: the last `max_size` of a batch.

/// Where the ring of a batch stands. All counts are columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchRing {
    /// Columns seen so far.
    pub offset: usize,
    /// Column after the last one written.
    pub index: usize,
    /// Columns of the buffer; None before the first update.
    pub len: Option<usize>,
    /// Columns that the ring holds once full.
    pub max_size: usize,
    /// True if the oldest column is the one at `index`, not the first one.
    pub rotated: bool,
}

/// One column written in place: what happens to the buffer first, and where the column goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchPlace {
    /// Zero columns to append.
    pub added: usize,
    /// Columns to drop off the front.
    pub dropped: usize,
    /// Column to write to.
    pub column: usize,
    /// Columns of the past that are gone, dropped or overwritten.
    pub lost: usize,
    /// The ring afterwards.
    pub after: BatchRing,
}

impl BatchRing {
    /// An empty ring. The caller has checked that there is room for a column.
    pub const fn new(max_size: usize) -> Self {
        Self { offset: 0, index: 0, len: None, max_size, rotated: false }
    }

    /// Checks that the numbers are ones that updates and trims lead to.
    ///
    /// # Errors
    /// The expected relation and the numbers found.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let len = self.len.unwrap_or(0);
        let fault = if self.max_size == 0 {
            "max_size of at least 1"
        } else if !self.is_full() && (self.rotated || self.index != self.offset || len > self.max_size) {
            "_idx = _offset, at most max_size columns and no rotation before the ring is full"
        } else if self.is_full() && self.rotated && (len != self.max_size || self.index > len) {
            "max_size columns and _idx among them in a rotated ring"
        } else if self.is_full() && !self.rotated && (len < self.max_size || self.index != len) {
            "_idx at the end of at least max_size columns once _offset has reached max_size"
        } else {
            return Ok(());
        };
        Err((fault, format!("{self:?}")))
    }

    /// True once columns have been, or are about to be, overwritten: nothing can be trimmed any more.
    pub const fn is_full(&self) -> bool {
        self.offset >= self.max_size
    }

    /// Columns of the buffer that were ever written.
    pub fn written(&self) -> usize {
        self.len.map_or(0, |len| len.min(self.offset))
    }

    /// One column: grow by at most `step`, cut what a long prompt left behind, wrap, write.
    pub fn place(&self, step: usize) -> BatchPlace {
        let mut after = Self { offset: self.offset + 1, ..*self };
        let mut len = self.len.unwrap_or(0);
        let mut added = 0;
        if self.len.is_none() || (self.offset >= len && len < self.max_size) {
            added = step.min(self.max_size - self.offset.min(self.max_size));
            len += added;
            after.index = self.offset;
        }
        let dropped = len.saturating_sub(self.max_size);
        if dropped > 0 {
            len = self.max_size;
            after.index = len;
        }
        if after.index == self.max_size {
            (after.index, after.rotated) = (0, true);
        }
        let column = after.index;
        let lost = dropped + usize::from(after.rotated);
        (after.index, after.len) = (column + 1, Some(len));
        BatchPlace { added, dropped, column, lost, after }
    }

    /// The ring with its oldest column in front.
    #[must_use]
    pub fn unrolled(&self) -> Self {
        if self.rotated { Self { index: self.len.unwrap_or(0), rotated: false, ..*self } } else { *self }
    }

    /// Several columns appended to an unrolled ring: how many old ones go off the front, since no later token will see
    /// them, and the ring afterwards.
    pub fn append(&self, n_columns: usize) -> (usize, Self) {
        let dropped = if self.len.is_none() { 0 } else { (self.index + 1).saturating_sub(self.max_size) };
        let len = self.index - dropped + n_columns;
        (dropped, Self { offset: self.offset + n_columns, index: len, len: Some(len), ..*self })
    }

    /// The ring after `n` columns are taken back; the caller has checked that it is not full.
    #[must_use]
    pub const fn trimmed(&self, n: usize) -> Self {
        Self { offset: self.offset - n, index: self.index - n, ..*self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_full_ring_turns() {
        let mut ring = BatchRing::new(4).append(3).1;
        let mut seen = Vec::new();
        for _ in 0..4 {
            let place = ring.place(256);
            ring = place.after;
            seen.push((place.added, place.column, place.lost, ring.index, ring.rotated));
        }
        assert_eq!(seen, [(1, 3, 0, 4, false), (0, 0, 1, 1, true), (0, 1, 1, 2, true), (0, 2, 1, 3, true)]);
    }

    #[test]
    fn a_long_prompt_is_cut_at_the_next_column() {
        let place = BatchRing::new(4).append(7).1.place(256);
        assert_eq!((place.added, place.dropped, place.column, place.lost), (0, 3, 0, 4));
    }

    proptest! {
        #[test]
        fn a_ring_stays_one_that_can_be_reached(
            max_size in 1..12_usize,
            step in 1..9_usize,
            counts in prop::collection::vec(1..9_usize, 0..30),
        ) {
            let mut ring = BatchRing::new(max_size);
            for n in counts {
                let before = ring;
                ring = if n == 1 { ring.place(step).after } else { ring.unrolled().append(n).1 };
                prop_assert_eq!(ring.check(), Ok(()));
                prop_assert_eq!(ring.offset, before.offset + n);
                // Every token finds the max_size - 1 before it.
                prop_assert!(ring.written() >= ring.offset.min(max_size - 1 + n));
            }
        }
    }
}
