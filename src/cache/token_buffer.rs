//! `TokenBuffer`: the tokens of one sequence, for what looks back at them.

use super::STEP;
use super::plan::round_up;
use crate::array::{Array, Dtype};
use crate::error::{Error, Result};

/// Tokens `(n,)` int32 in a buffer that grows to whole steps.
#[derive(Clone, Debug)]
pub struct TokenBuffer {
    buffer: Array,
    len: usize,
    /// Tokens by which the buffer grows; at least 1.
    pub step: usize,
}

impl TokenBuffer {
    /// A buffer of exactly these tokens, an integer array `(n,)`.
    ///
    /// # Errors
    /// [`Error::Value`] for an array of another form.
    pub fn new(tokens: &Array) -> Result<Self> {
        check_tokens("TokenBuffer", tokens)?;
        Ok(Self { buffer: tokens.astype(Dtype::I32)?, len: tokens.dim(0), step: STEP })
    }

    /// Appends tokens `(n,)` and gives all of them. Lazy.
    ///
    /// # Errors
    /// [`Error::Value`] for an array of another form; the buffer is then as before.
    pub fn update(&mut self, tokens: &Array) -> Result<Array> {
        check_tokens("TokenBuffer.update_and_fetch", tokens)?;
        let end = self.len + tokens.dim(0);
        let size = round_up(end, self.step);
        let mut buffer = self.buffer.clone();
        if size > buffer.dim(0) {
            let zeros = Array::zeros(&[(size - buffer.dim(0)) as i32], Dtype::I32)?;
            buffer = Array::concatenate(&[&buffer, &zeros], 0)?;
        }
        buffer = buffer.with_slice(tokens, &[(self.len, end)])?;
        let seen = buffer.take_first_axis(0, end)?;
        (self.buffer, self.len) = (buffer, end);
        Ok(seen)
    }

    /// The tokens `(n,)`.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    pub fn tokens(&self) -> Result<Array> {
        self.buffer.take_first_axis(0, self.len)
    }

    /// The buffer, padding included.
    pub const fn buffer(&self) -> &Array {
        &self.buffer
    }

    /// Number of tokens.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// True if there are none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Checks that `tokens` are integers `(n,)`; no tokens may be of any type.
fn check_tokens(op: &'static str, tokens: &Array) -> Result<()> {
    if tokens.shape().len() == 1 && (tokens.dim(0) == 0 || tokens.dtype().is_integer()) {
        return Ok(());
    }
    Err(Error::value(op, "an integer array (n,)", format!("{tokens:?}")))
}
