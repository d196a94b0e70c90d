//! Which states of a prompt are kept: near its end many, far from it few. Pure.

/// A state of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Checkpoint {
    /// The boundary at which it was taken.
    pub end: usize,
    /// Thinning must leave it: the caller said so, or it has been of use.
    pub must_stay: bool,
}

/// States at the end of a prompt that always stay.
const LAST: usize = 2;

/// Places of those of `checkpoints`, the deepest first, that go. The last two stay, those that must, and of all whose
/// distances from the end lie between two powers of two the one that is farthest.
pub(super) fn dropped(checkpoints: &[Checkpoint]) -> Vec<usize> {
    let Some(deepest) = checkpoints.first().map(|checkpoint| checkpoint.end) else { return Vec::new() };
    let octave = |at: usize| (deepest - checkpoints[at].end).checked_ilog2();
    let candidates = LAST..checkpoints.len();
    let is_dropped = |&at: &usize| {
        let is_farthest = checkpoints.get(at + 1).is_none_or(|_| octave(at + 1) != octave(at));
        !is_farthest && !checkpoints[at].must_stay
    };
    candidates.filter(is_dropped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grow(step: usize, n_steps: usize) -> Vec<usize> {
        let mut ends: Vec<usize> = Vec::new();
        for n in 1..=n_steps {
            ends.insert(0, n * step);
            let checkpoints: Vec<_> = ends.iter().map(|&end| Checkpoint { end, must_stay: false }).collect();
            for at in dropped(&checkpoints).into_iter().rev() {
                ends.remove(at);
            }
        }
        ends
    }

    #[test]
    fn a_growing_prompt_keeps_few_states_and_no_gap_much_wider_than_its_distance() {
        for n_steps in [1, 2, 3, 10, 100, 1000] {
            let ends = grow(2048, n_steps);
            assert_eq!(ends[0], n_steps * 2048);
            assert!(ends.len() <= 4 + n_steps.ilog2() as usize, "{ends:?}");
            for pair in ends.windows(2) {
                assert!(pair[0] - pair[1] <= 2 * (ends[0] - pair[0]).max(2048), "{ends:?}");
            }
        }
    }

    #[test]
    fn what_must_stay_stays() {
        let checkpoints = [1000, 900, 800, 700, 600, 10].map(|end| Checkpoint { end, must_stay: end == 700 });
        let dropped = dropped(&checkpoints);
        assert_eq!(dropped, Vec::<usize>::from([]), "{dropped:?}");
        let checkpoints = [1000, 990, 720, 700, 600, 10].map(|end| Checkpoint { end, must_stay: end == 700 });
        assert_eq!(super::dropped(&checkpoints), [2]);
    }
}
