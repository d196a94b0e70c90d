//! The sequences of a batch: how far each is, and where its tokens begin.

/// Per sequence, tokens seen and columns of padding.
///
/// A column is one place in all sequences: one row of every buffer. Both numbers may be negative: an offset while the
/// padding is still to come, a padding once a ring has overwritten it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sequences {
    /// Tokens seen by each sequence: the position of its next one.
    pub offsets: Vec<i32>,
    /// Columns before the first token of each.
    pub left_padding: Vec<i32>,
}

impl Sequences {
    /// Sequences whose first `left_padding` columns will be padding.
    pub fn new(left_padding: Vec<i32>) -> Self {
        let offsets = left_padding.iter().map(|&padding| 0_i32.saturating_sub(padding)).collect();
        Self { offsets, left_padding }
    }

    /// Number of sequences (B).
    pub const fn len(&self) -> usize {
        self.offsets.len()
    }

    /// True if there are none.
    pub const fn is_empty(&self) -> bool {
        self.offsets.is_empty()
    }

    /// After `n_columns` more, or fewer if negative.
    #[must_use]
    pub fn advanced(&self, n_columns: i32) -> Self {
        Self { offsets: each(&self.offsets, |offset| offset.saturating_add(n_columns)), ..self.clone() }
    }

    /// With all tokens `n_columns` further to the right, or to the left if negative.
    #[must_use]
    pub fn shifted(&self, n_columns: i32) -> Self {
        Self { left_padding: each(&self.left_padding, |padding| padding.saturating_add(n_columns)), ..self.clone() }
    }

    /// With `by` columns of each that held no token moved from behind its tokens to their front, or announced there.
    #[must_use]
    pub fn rolled(&self, by: &[i32]) -> Self {
        Self {
            offsets: self.offsets.iter().zip(by).map(|(offset, by)| offset.saturating_sub(*by)).collect(),
            left_padding: self.left_padding.iter().zip(by).map(|(padding, by)| padding.saturating_add(*by)).collect(),
        }
    }

    /// Those at `indices`, in that order.
    #[must_use]
    pub fn chosen(&self, indices: &[usize]) -> Self {
        Self { offsets: choose(&self.offsets, indices), left_padding: choose(&self.left_padding, indices) }
    }

    /// These, then those of `other`.
    #[must_use]
    pub fn joined(&self, other: &Self) -> Self {
        Self {
            offsets: [self.offsets.as_slice(), &other.offsets].concat(),
            left_padding: [self.left_padding.as_slice(), &other.left_padding].concat(),
        }
    }

    /// Columns, of the first `n_columns`, that are padding in every sequence.
    pub fn common_padding(&self, n_columns: usize) -> usize {
        let least = self.left_padding.iter().min().copied().unwrap_or(0);
        usize::try_from(least).unwrap_or(0).min(n_columns)
    }

    /// First of `n_columns` columns that holds a token of sequence `at`.
    pub fn first_column(&self, at: usize, n_columns: usize) -> usize {
        usize::try_from(self.left_padding[at]).unwrap_or(0).min(n_columns)
    }
}

/// The numbers at `indices`.
pub fn choose(numbers: &[i32], indices: &[usize]) -> Vec<i32> {
    indices.iter().map(|&at| numbers[at]).collect()
}

fn each(numbers: &[i32], f: impl Fn(i32) -> i32) -> Vec<i32> {
    numbers.iter().map(|&number| f(number)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn padding_is_what_is_still_to_come() {
        let batch = Sequences::new(vec![1, 3, 0]);
        assert_eq!(batch.offsets, [-1, -3, 0]);
        assert_eq!(batch.advanced(4).offsets, [3, 1, 4]);
        assert_eq!(batch.advanced(4).left_padding, [1, 3, 0]);
        assert_eq!(batch.rolled(&[0, 2, 1]), Sequences { offsets: vec![-1, -5, -1], left_padding: vec![1, 5, 1] });
    }

    proptest! {
        #[test]
        fn tokens_and_padding_make_up_the_columns(
            padding in prop::collection::vec(0..9_i32, 1..5),
            n in 0..50_i32,
            chosen in prop::collection::vec(0..100_usize, 1..6),
        ) {
            let batch = Sequences::new(padding).advanced(n);
            let indices: Vec<_> = chosen.into_iter().map(|at| at % batch.len()).collect();
            let batch = batch.joined(&batch.chosen(&indices));
            let cut = batch.common_padding(n as usize) as i32;
            prop_assert!(cut <= n);
            let batch = batch.shifted(-cut);
            for (offset, padding) in batch.offsets.iter().zip(&batch.left_padding) {
                prop_assert_eq!(offset + padding, n - cut);
            }
        }
    }
}
