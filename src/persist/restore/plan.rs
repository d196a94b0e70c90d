//! Where the bytes of a tensor go: integers only.

use crate::cache::plan::round_up;
use crate::persist::layout::Layout;
use std::ops::Range;

/// Bytes of file that one piece of work covers at most, unless a single row is larger.
pub const SPAN: usize = 8 << 20;

/// Some whole heads, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where it begins in the file.
    pub at: u64,
    /// Its heads, or 1 for a part.
    pub n_heads: usize,
    /// Bytes from one head to the next in the file.
    pub in_file: usize,
    /// Bytes of each head that are read.
    pub valid: usize,
    /// Its bytes in memory, heads one after the other; what is not read is zero.
    pub memory: Range<usize>,
}

impl Layout {
    /// The work, in the order of memory, without gaps.
    pub fn spans(&self) -> Vec<Span> {
        let &Self { start, n_heads, in_file, valid, in_memory } = self;
        let largest = in_file.max(in_memory);
        if n_heads == 0 || in_memory == 0 {
            return Vec::new();
        }
        if largest <= SPAN {
            let group = SPAN / largest;
            let firsts = (0..n_heads).step_by(group);
            return firsts
                .map(|first| {
                    let last = n_heads.min(first + group);
                    let at = start + (first * in_file) as u64;
                    Span { at, n_heads: last - first, in_file, valid, memory: first * in_memory..last * in_memory }
                })
                .collect();
        }
        let parts = round_up(in_memory, SPAN) / SPAN;
        let parts = (0..n_heads).flat_map(|head| (0..parts).map(move |part| (head, part * SPAN)));
        parts
            .map(|(head, from)| {
                let to = in_memory.min(from + SPAN);
                let at = start + (head * in_file + from) as u64;
                let valid = valid.clamp(from, to) - from;
                Span { at, n_heads: 1, in_file, valid, memory: head * in_memory + from..head * in_memory + to }
            })
            .collect()
    }
}

impl Span {
    /// Bytes of one head in memory.
    pub fn in_memory(&self) -> usize {
        self.memory.len() / self.n_heads
    }

    /// Bytes of file from the first byte that is read to the last.
    pub fn file_bytes(&self) -> usize {
        if self.valid == 0 { 0 } else { (self.n_heads - 1) * self.in_file + self.valid }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn spans_cover_memory_once_and_read_each_valid_byte(
            n_heads in 0_usize..40,
            sizes in prop_oneof![(0_usize..300, 0_usize..300, 0_usize..300), (0..SPAN * 3, 0..SPAN * 3, 0..SPAN * 3)],
        ) {
            let (a, b, c) = sizes;
            let (in_file, in_memory) = (a.max(1), b);
            let valid = c.min(in_file).min(in_memory);
            let layout = Layout { start: 1000, n_heads, in_file, valid, in_memory };
            let mut end = 0;
            let mut n_valid = 0;
            for span in layout.spans() {
                prop_assert_eq!(span.memory.start, end);
                end = span.memory.end;
                n_valid += span.n_heads * span.valid;
                prop_assert!(span.memory.len() <= SPAN && span.file_bytes() <= SPAN);
                let head = span.memory.start / in_memory;
                let within = span.memory.start % in_memory;
                prop_assert_eq!(span.at, (1000 + head * in_file + within) as u64);
                prop_assert!(span.valid <= span.in_memory());
            }
            prop_assert_eq!((end, n_valid), (n_heads * in_memory, n_heads * valid));
        }
    }
}
