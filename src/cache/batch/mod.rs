//! Caches of several sequences of different lengths, one under the other. Padding stands to the left of a sequence.

mod buffers;
mod kv;
mod merge;
mod rotating;

pub use kv::BatchKvCache;
pub use merge::merge;
pub use rotating::BatchRotatingKvCache;

use super::plan::Sequences;
use super::{Cache, KvCache, State};
use crate::array::Array;
use crate::error::{Error, Result};

/// What a cache of several sequences can do beside [`KvCache`]. B is the number of sequences; numbers per sequence stand
/// in their order.
pub trait BatchCache: KvCache {
    /// Per sequence, tokens and padding.
    fn sequences(&self) -> &Sequences;

    /// Assigns the numbers of all sequences.
    ///
    /// # Errors
    /// [`Error::Value`] unless there are B of each.
    fn set_sequences(&mut self, sequences: Sequences) -> Result<()>;

    /// Keeps the sequences at `indices`, in that order; one may be there twice.
    ///
    /// # Errors
    /// [`Error::Value`] if there are none, [`Error::Index`] for one out of range.
    fn filter(&mut self, indices: &[usize]) -> Result<()>;

    /// Appends the sequences of another batch, which does not change.
    ///
    /// # Errors
    /// [`Error::Type`] for another class, [`Error::Value`] if sizes differ or padding is still to be finalized.
    fn extend(&mut self, other: &Cache) -> Result<()>;

    /// One sequence alone, without padding.
    ///
    /// # Errors
    /// [`Error::Index`] if there is no such sequence, [`Error::Value`] if the batch is empty or padding is still to be
    /// finalized.
    fn extract(&self, index: usize) -> Result<Cache>;

    /// Says that the first columns to come will be padding.
    ///
    /// # Errors
    /// [`Error::Value`] if the batch is not empty, or unless there are B numbers of at least 0.
    fn pad_left(&mut self, left_padding: &[i32]) -> Result<()>;

    /// Says how the columns up to [`finalize`](Self::finalize) are made up: per sequence, tokens, then padding.
    ///
    /// # Errors
    /// [`Error::Value`] unless there are B numbers of at least 0 of each.
    fn pad_right(&mut self, lengths: Option<&[i32]>, right_padding: &[i32]) -> Result<()>;

    /// Moves the padding that was announced to the left of the tokens.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    fn finalize(&mut self) -> Result<()>;

    /// What [`pad_right`](Self::pad_right) has announced, to be given to [`set_pending`](Self::set_pending) of a copy.
    fn pending(&self) -> Option<Vec<i32>>;

    /// Takes over what another cache was told.
    ///
    /// # Errors
    /// [`Error::Value`] if it does not fit the class.
    fn set_pending(&mut self, pending: Option<Vec<i32>>) -> Result<()>;
}

/// Checks numbers of which there must be one per sequence, none negative.
fn check_padding(op: &'static str, name: &str, numbers: &[i32], n_sequences: usize) -> Result<()> {
    if numbers.len() == n_sequences && numbers.iter().all(|&number| number >= 0) {
        return Ok(());
    }
    Err(Error::value(op, format!("{name} of at least 0 for each of {n_sequences} sequences"), format!("{numbers:?}")))
}

/// Checks the numbers that are to replace `old`.
fn check_assigned(op: &'static str, old: &Sequences, new: &Sequences) -> Result<()> {
    if [new.offsets.len(), new.left_padding.len()] == [old.len(); 2] {
        return Ok(());
    }
    let got = format!("{} offsets and {} paddings", new.offsets.len(), new.left_padding.len());
    Err(Error::value(op, format!("numbers of {} sequences", old.len()), got))
}

/// Checks the indices of sequences.
fn check_indices(op: &'static str, indices: &[usize], n_sequences: usize) -> Result<()> {
    if indices.is_empty() {
        return Err(Error::value(op, "at least one sequence", "none"));
    }
    match indices.iter().find(|&&at| at >= n_sequences) {
        None => Ok(()),
        Some(at) => Err(Error::Index { op, expected: format!("an index below {n_sequences}"), got: at.to_string() }),
    }
}

/// The error of an operation that mistakes padding for tokens.
fn not_finalized(op: &'static str) -> Error {
    Error::value(op, "a batch whose right padding is finalized", "one that waits for finalize()")
}

/// Numbers of sequences as a state has them; none, which no batch accepts, if there is no memory for B numbers.
fn numbers_state(numbers: &[i32]) -> State<Array> {
    Array::from_i32(numbers).map_or(State::None, State::Array)
}

/// Numbers of sequences of a checked state, which are evaluated.
fn numbers_field(field: State<Array>) -> Result<Vec<i32>> {
    if let State::Array(array) = field { array.to_i32() } else { Ok(Vec::new()) }
}
