//! Which windows of a prompt go through the model together. Integers only.

use std::ops::Range;

/// The window that begins at `start`, of a prompt of `total` tokens: at most `step` (at least 1) of all but the last
/// token, or that token alone. The windows of mlx-lm's `generate_step`.
pub fn next_window(start: usize, total: usize, step: usize) -> Range<usize> {
    let leading = total.saturating_sub(1);
    if start < leading { start..start.saturating_add(step.max(1)).min(leading) } else { start..total }
}

/// All windows, if each may have `step` tokens.
pub fn windows(total: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    let first = (total > 0).then(|| next_window(0, total, step));
    std::iter::successors(first, move |last| (last.end < total).then(|| next_window(last.end, total, step)))
}

/// The longest step of `first`, twice, four times … up to `longest`, that raises memory by at most `room` bytes, if
/// `first` raises it by `rise`; `first` if none does.
pub(super) fn fitting_step(first: usize, longest: usize, rise: usize, room: usize) -> usize {
    let fits = |step: &usize| *step <= longest && rise.saturating_mul(step / first) <= room;
    std::iter::successors(Some(first), |step| step.checked_mul(2)).skip(1).take_while(fits).last().unwrap_or(first)
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

    #[test]
    fn the_step_is_the_longest_that_fits() {
        assert_eq!(fitting_step(512, 4096, 10, 80), 4096);
        assert_eq!(fitting_step(512, 4096, 10, 79), 2048);
        assert_eq!(fitting_step(512, 4096, 10, 19), 512);
        assert_eq!(fitting_step(512, 4096, 10, 0), 512);
        assert_eq!(fitting_step(512, 4096, 0, 0), 4096);
        assert_eq!(fitting_step(512, 512, 0, 0), 512);
        assert_eq!(fitting_step(512, 4096, usize::MAX, usize::MAX - 1), 512);
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
