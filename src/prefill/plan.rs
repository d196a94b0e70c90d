//! Which windows of a prompt go through the model together. Integers only.

use std::ops::Range;

/// The windows of a prompt of `total` tokens: chunks of at most `step` (at least 1) for all but the last token, then
/// that token alone. The windows of mlx-lm's `generate_step`.
pub fn windows(total: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    let step = step.max(1);
    let leading = total.saturating_sub(1);
    let chunks = (0..leading).step_by(step).map(move |start| start..(start + step).min(leading));
    chunks.chain((total > 0).then_some(leading..total))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lengths(total: usize, step: usize) -> Vec<usize> {
        windows(total, step).map(|window| window.len()).collect()
    }

    #[test]
    fn the_last_token_goes_alone() {
        assert_eq!(lengths(7, 3), [3, 3, 1]);
        assert_eq!(lengths(10, 4), [4, 4, 1, 1]);
        assert_eq!(lengths(9, 4), [4, 4, 1]);
        assert_eq!(lengths(1, 4), [1]);
        assert_eq!(lengths(0, 4), [] as [usize; 0]);
        assert_eq!(lengths(3, 0), [1, 1, 1]);
    }

    proptest! {
        #[test]
        fn windows_follow_one_another_and_cover_the_prompt(total in 1..5000_usize, step in 0..700_usize) {
            let mut next = 0;
            for window in windows(total, step) {
                prop_assert_eq!(window.start, next);
                prop_assert!(!window.is_empty() && window.len() <= step.max(1));
                next = window.end;
            }
            prop_assert_eq!(next, total);
        }
    }
}
