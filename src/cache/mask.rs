//! Attention masks: which rows a new token may see.

use crate::array::Array;
use crate::error::Result;

/// What a cache tells the attention about its mask.
#[derive(Clone, Debug)]
pub enum MaskMode {
    /// No mask: the single new token sees every row.
    None,
    /// The plain causal mask, aligned to the bottom right; the attention kernel makes it itself.
    Causal,
    /// A bool array, True where a token may look: `(N, K)`, or `(K,)` for one token in a ring.
    Array(Array),
}

/// `array` as a column `(N, 1)`.
fn column(array: &Array) -> Result<Array> {
    array.reshape(&[-1, 1])
}

/// The causal mask `(n_tokens, offset + n_tokens)`: a token sees itself and what came before it, and with `window` only
/// the newest `window` of these. As mlx-lm's `create_causal_mask` without padding.
///
/// # Errors
/// [`Error::Mlx`](crate::Error::Mlx) if MLX fails.
pub fn causal(n_tokens: usize, offset: usize, window: Option<usize>) -> Result<Array> {
    let queries = column(&Array::arange(offset, offset + n_tokens)?)?;
    let columns = Array::arange(0, offset + n_tokens)?;
    let mask = columns.le(&queries)?;
    match window {
        // A window beyond all tokens hides none; clamped, it stays within 32 bits.
        Some(window) => {
            let window = window.min(offset + n_tokens);
            mask.and(&queries.lt(&columns.plus(&Array::scalar(window as i32))?)?)
        }
        None => Ok(mask),
    }
}

/// [`causal`] for a batch, whose sequences `(B,)` hide columns on the left or right: mlx-lm's `create_causal_mask`.
/// With a padding it is `(B, 1, n_tokens, offset + n_tokens)`.
///
/// # Errors
/// [`Error::Mlx`](crate::Error::Mlx) if MLX fails.
pub fn padded(
    n_tokens: usize,
    offset: usize,
    window: Option<usize>,
    right: Option<&Array>,
    left: Option<&Array>,
) -> Result<Array> {
    let mut mask = causal(n_tokens, offset, window)?;
    let (columns, per_sequence) = (Array::arange(0, offset + n_tokens)?, [-1, 1, 1, 1]);
    if let Some(right) = right {
        let end = Array::scalar((offset + n_tokens) as i32).minus(&right.reshape(&per_sequence)?)?;
        mask = mask.and(&columns.lt(&end)?)?;
    }
    if let Some(left) = left {
        mask = mask.and(&left.reshape(&per_sequence)?.le(&columns)?)?;
    }
    Ok(mask)
}

/// The mask of a cache that keeps every row: mlx-lm's cache-level `create_attention_mask`.
///
/// # Errors
/// [`Error::Mlx`](crate::Error::Mlx) if MLX fails.
pub fn growing(n_tokens: usize, offset: usize, window: Option<usize>, return_array: bool) -> Result<MaskMode> {
    if window.is_some() || (return_array && n_tokens != 1) {
        return causal(n_tokens, offset, window).map(MaskMode::Array);
    }
    Ok(if n_tokens == 1 { MaskMode::None } else { MaskMode::Causal })
}

/// True where `from <= index < to`.
fn between(index: &Array, (from, to): (usize, usize)) -> Result<Array> {
    Array::scalar(from as i32).le(index)?.and(&index.lt(&Array::scalar(to as i32))?)
}

/// A bool array `(len,)` that is True inside the given ranges.
pub(super) fn ranges(len: usize, visible: &[(usize, usize)]) -> Result<Array> {
    let index = Array::arange(0, len)?;
    let mut mask = between(&index, (0, 0))?;
    for &range in visible {
        mask = mask.or(&between(&index, range)?)?;
    }
    Ok(mask)
}

/// The mask of `n_tokens` after position `offset` over rows that hold the positions of two ranges: `keep` rows from the
/// front, and the newest. `window` limits what a token sees by distance; without one, a token sees the kept rows and
/// the `recent` newest, as it would if the tokens came one by one.
pub(super) fn kept_and_recent(
    n_tokens: usize,
    offset: usize,
    rows: [(usize, usize); 2],
    window: Option<usize>,
    recent: usize,
) -> Result<Array> {
    let [kept, newest] = rows.map(|(from, to)| Array::arange(from, to));
    let positions = Array::concatenate(&[&kept?, &newest?], 0)?;
    let queries = column(&Array::arange(offset, offset + n_tokens)?)?;
    let reach = Array::scalar(window.unwrap_or(recent).min(offset + n_tokens) as i32);
    let mut near = queries.lt(&positions.plus(&reach)?)?;
    if window.is_none() {
        near = near.or(&positions.lt(&Array::scalar(rows[0].1 as i32))?)?;
    }
    positions.le(&queries)?.and(&near)
}
