//! Growth of a buffer that is padded to whole steps.

/// How a buffer grows before an update: the rows of the old one that stay, and the zeros that follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growth {
    /// Rows of the old buffer that are kept, from the front.
    pub kept: usize,
    /// Zero rows that follow them; at least as many as the update brings.
    pub added: usize,
}

/// The next multiple of `step` that is not below `n`.
pub const fn round_up(n: usize, step: usize) -> usize {
    n.div_ceil(step) * step
}

/// Rows by which buffers grow at least while a prompt is known to go on: equally long buffers are used again for one
/// another, and fewer copies are made.
const PROMPT_STEP: usize = 2048;

impl Growth {
    /// The same for a buffer that will hold `expected` rows: by longer steps, but not beyond what these need.
    #[must_use]
    pub const fn toward(self, expected: usize, step: usize) -> Self {
        let Self { kept, added } = self;
        let (longer, last) = (round_up(kept + added, PROMPT_STEP), round_up(expected, step));
        let len = if longer < last { longer } else { last };
        if len > kept + added { Self { kept, added: len - kept } } else { self }
    }

    /// The growth that mlx-lm's `KVCache` makes for `n_tokens` more at row `used` of a buffer of `len` rows (None: no
    /// buffer yet), or None if they fit. An unaligned buffer is cut to its used rows first, so its length may end
    /// up off the step.
    pub const fn plan(used: usize, len: Option<usize>, n_tokens: usize, step: usize) -> Option<Self> {
        let added = round_up(n_tokens, step);
        match len {
            Some(len) if used + n_tokens <= len => None,
            Some(len) => Some(Self { kept: if used.is_multiple_of(step) { len } else { used }, added }),
            None => Some(Self { kept: 0, added }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Buffer lengths after each of `updates`, as a cache would have them.
    fn lengths(updates: &[usize]) -> Vec<usize> {
        let (mut used, mut len) = (0, None);
        let mut seen = Vec::new();
        for &n_tokens in updates {
            if let Some(growth) = Growth::plan(used, len, n_tokens, 256) {
                len = Some(growth.kept + growth.added);
            }
            used += n_tokens;
            seen.push(len.expect("an update makes a buffer"));
        }
        seen
    }

    #[test]
    fn lengths_are_those_of_mlx_lm() {
        assert_eq!(lengths(&[1]), [256]);
        assert_eq!(lengths(&[255, 1, 1]), [256, 256, 512]);
        assert_eq!(lengths(&[257]), [512]);
        assert_eq!(lengths(&[513]), [768]);
        assert_eq!(lengths(&[300, 300]), [512, 812]);
        assert_eq!(lengths(&[100, 200, 700]), [256, 356, 1068]);
        assert_eq!(lengths(&[0]), [0]);
    }

    #[test]
    fn an_aligned_offset_after_a_trim_keeps_the_whole_buffer() {
        assert_eq!(Growth::plan(256, Some(512), 300, 256), Some(Growth { kept: 512, added: 512 }));
        assert_eq!(Growth::plan(0, Some(512), 600, 256), Some(Growth { kept: 512, added: 768 }));
    }

    #[test]
    fn toward_the_end_of_a_prompt_buffers_grow_by_longer_steps() {
        let lens = |expected| {
            let mut len = None;
            let grown = (0..3000).step_by(500).filter_map(|used| {
                let growth = Growth::plan(used, len, 500, 256)?.toward(expected, 256);
                len = Some(growth.kept + growth.added);
                len
            });
            grown.collect::<Vec<_>>()
        };
        assert_eq!(lens(3000), [2048, 3072]);
        assert_eq!(lens(100_000), [2048, 4096]);
        // What is not expected is as ever.
        assert_eq!(lens(0), [512, 1012, 1512, 2012, 2512, 3012]);
        assert_eq!(lens(900), [1024, 1512, 2012, 2512, 3012]);
    }

    proptest! {
        #[test]
        fn a_grown_buffer_holds_the_old_rows_and_the_new(used in 0..5000_usize, spare in 0..600_usize, n in 0..3000_usize, step in 1..512_usize) {
            let len = used + spare;
            let (kept, room) = match Growth::plan(used, Some(len), n, step) {
                None => (len, len),
                Some(growth) => (growth.kept, growth.kept + growth.added),
            };
            prop_assert!(kept >= used && kept <= len);
            prop_assert!(room >= used + n);
            // Bounded waste: never more than the old spare rows and one step beyond the need.
            prop_assert!(room < used + n + spare + step);
        }
    }
}
