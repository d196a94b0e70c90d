//! Which bytes of memory make up which piece of the file: integers only.

use crate::persist::layout::Layout;

/// Bytes of file that are written at once, and so what a pinned slot holds.
pub const WINDOW: usize = 8 << 20;

/// A piece of the file, which begins at a multiple of [`WINDOW`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Where it begins in the file.
    pub at: u64,
    /// Its bytes; those of no part are zero.
    pub n_bytes: usize,
    /// What it consists of, in the order of the file.
    pub parts: Vec<Part>,
}

/// Whole heads of a tensor, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The number of the tensor.
    pub tensor: usize,
    /// How many heads.
    pub n_heads: usize,
    /// Bytes of each.
    pub run: usize,
    /// The first one's place in memory, and the bytes from one to the next.
    pub memory: [usize; 2],
    /// The same in the window.
    pub window: [usize; 2],
}

/// The whole file of `n_bytes`; the tensors are in its order and do not overlap.
pub fn windows(tensors: &[Layout], n_bytes: u64) -> Vec<Window> {
    let mut first = 0;
    let starts = (0..n_bytes).step_by(WINDOW);
    let window = |at| {
        let end = n_bytes.min(at + WINDOW as u64);
        let mut parts = Vec::new();
        while tensors.get(first).is_some_and(|tensor| tensor.end() <= at) {
            first += 1;
        }
        for (tensor, layout) in tensors.iter().enumerate().skip(first).take_while(|(_, layout)| layout.start < end) {
            cut(tensor, layout, at, end, &mut parts);
        }
        Window { at, n_bytes: (end - at) as usize, parts }
    };
    starts.map(window).collect()
}

/// Adds what of one tensor lies between `at` and `end` of the file.
fn cut(tensor: usize, layout: &Layout, at: u64, end: u64, parts: &mut Vec<Part>) {
    let &Layout { start, in_file, valid, in_memory, .. } = layout;
    let mut from = (at.max(start) - start) as usize;
    let to = (end.min(layout.end()).saturating_sub(start)) as usize;
    while from < to {
        let (head, skipped) = (from / in_file, from % in_file);
        let whole = if skipped == 0 { (to - from) / in_file } else { 0 };
        let (n_heads, taken) =
            if whole > 0 { (whole, whole * in_file) } else { (1, (in_file - skipped).min(to - from)) };
        let run = if whole > 0 { valid } else { valid.saturating_sub(skipped).min(taken) };
        if run > 0 {
            let memory = [head * in_memory + skipped, in_memory];
            let window = [(start + from as u64 - at) as usize, in_file];
            parts.push(Part { tensor, n_heads, run, memory, window });
        }
        from += taken;
    }
}

impl Part {
    /// The runs: bytes in memory, and in the window.
    pub fn runs(self) -> impl Iterator<Item = (usize, usize)> {
        let Self { n_heads, memory, window, .. } = self;
        (0..n_heads).map(move |head| (memory[0] + head * memory[1], window[0] + head * window[1]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    prop_compose! {
        fn tensors()(sizes in prop::collection::vec((0_usize..6, 0..WINDOW, 0..WINDOW, 0_usize..3, 0_u64..9), 0..5)) -> Vec<Layout> {
            let mut start = 0;
            let layout = |(n_heads, in_file, gap, scale, skip): (usize, usize, usize, usize, u64)| {
                let in_file = in_file / [1, 100, 100_000][scale];
                let valid = in_file - in_file.min(gap % 3 * 10);
                start += skip;
                let layout = Layout { start, n_heads, in_file, valid, in_memory: valid + gap % 1000 };
                start = layout.end();
                layout
            };
            sizes.into_iter().map(layout).collect()
        }
    }

    proptest! {
        #[test]
        fn every_valid_byte_is_in_one_window_at_its_place(tensors in tensors(), tail in 0_u64..9) {
            let n_bytes = tensors.last().map_or(0, Layout::end) + tail;
            // For each run of the file its tensor and its first byte in memory.
            let mut found = Vec::new();
            let mut end = 0;
            for window in windows(&tensors, n_bytes) {
                prop_assert_eq!(window.at, end);
                end += window.n_bytes as u64;
                for part in window.parts {
                    for (memory, at) in part.runs() {
                        prop_assert!(at + part.run <= window.n_bytes);
                        found.push((window.at + at as u64, part.run, part.tensor, memory));
                    }
                }
            }
            prop_assert_eq!(end, n_bytes);
            let mut expected = Vec::new();
            for (tensor, layout) in tensors.iter().enumerate() {
                for head in 0..layout.n_heads {
                    expected.push((layout.start + (head * layout.in_file) as u64, layout.valid, tensor, head * layout.in_memory));
                }
            }
            let mut found = found.into_iter();
            for (mut at, mut valid, tensor, mut memory) in expected {
                while valid > 0 {
                    let (found_at, run, found_tensor, found_memory) = found.next().expect("as many runs");
                    prop_assert_eq!((found_at, found_tensor, found_memory), (at, tensor, memory));
                    prop_assert!(run <= valid);
                    (at, memory, valid) = (at + run as u64, memory + run, valid - run);
                }
            }
            prop_assert_eq!(found.next(), None);
        }
    }
}
