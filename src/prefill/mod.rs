//! L3: a prompt goes through a model chunk by chunk, with a memory barrier after each.

mod plan;

pub use plan::windows;

use crate::array::{self, Array};
use crate::cache::{Cache, Checkpoint};
use crate::error::{Error, Result};
use std::ops::Range;

/// A language model, as prefill needs it.
pub trait Model {
    /// Runs `tokens` `(1, S)` int32 through the layers, each of which updates its cache, and gives the logits.
    ///
    /// # Errors
    /// Whatever the model meets.
    fn forward(&mut self, tokens: &Array, caches: &mut [Cache]) -> Result<Array>;
}

/// What one prefill does at each point; [`run`] knows the order. The model behind it may be Rust or Python.
pub trait Steps {
    /// The error of the model's world.
    type Error;

    /// Remembers where every cache stands, before a window of `n_tokens`.
    ///
    /// # Errors
    /// If a cache cannot tell its state.
    fn checkpoint(&mut self, n_tokens: usize) -> Result<(), Self::Error>;

    /// Puts every cache back to the last checkpoint.
    fn rollback(&mut self);

    /// Runs one window of tokens through the model and keeps the logits.
    ///
    /// # Errors
    /// Whatever the model meets.
    fn forward(&mut self, window: Range<usize>) -> Result<(), Self::Error>;

    /// The memory barrier after a leading window: evaluates every cache's buffers, so that the lazy graph never spans
    /// the prompt.
    ///
    /// # Errors
    /// If a computation fails.
    fn barrier(&mut self) -> Result<(), Self::Error>;

    /// After the last window.
    ///
    /// # Errors
    /// If a computation fails.
    fn finish(&mut self) -> Result<(), Self::Error>;

    /// Tells that `done` of `total` tokens are in the caches.
    ///
    /// # Errors
    /// If the listener wants to stop.
    fn progress(&mut self, done: usize, total: usize) -> Result<(), Self::Error>;
}

/// Runs a prompt of `total` tokens in windows of `step`. Whatever stops it, all caches stand at one window's end.
///
/// # Errors
/// The first error of `steps`; every cache is then back at the last boundary.
pub fn run<S: Steps>(steps: &mut S, total: usize, step: usize) -> Result<(), S::Error> {
    steps.progress(0, total)?;
    for window in windows(total, step) {
        let end = window.end;
        steps.checkpoint(window.len())?;
        let done = steps.forward(window).and_then(|()| if end < total { steps.barrier() } else { steps.finish() });
        if let Err(error) = done {
            steps.rollback();
            return Err(error);
        }
        steps.progress(end, total)?;
    }
    Ok(())
}

/// Runs a whole prompt through a Rust model and gives the logits of its last window, lazy.
///
/// `prompt`: token ids, at least one. `step` 0 counts as 1.
///
/// # Errors
/// [`Error::Value`] for an empty prompt, or what the model meets; every cache is then back at the last boundary.
pub fn prefill_full(model: &mut dyn Model, prompt: &[i32], caches: &mut [Cache], step: usize) -> Result<Array> {
    let op = "prefill";
    if prompt.is_empty() {
        return Err(Error::value(op, "at least one token", "an empty prompt"));
    }
    let tokens = Array::from_i32(prompt)?;
    let mut steps = RustSteps { model, tokens, caches, checkpoints: Vec::new(), logits: None };
    run(&mut steps, prompt.len(), step)?;
    steps.logits.ok_or_else(|| Error::value(op, "logits", "none"))
}

/// Evaluates the stored buffers of every cache: the barrier.
///
/// # Errors
/// [`Error::Mlx`] if a computation fails.
pub fn materialize_caches(caches: &[Cache]) -> Result<()> {
    caches.iter().try_for_each(|cache| cache.as_dyn().materialize())
}

struct RustSteps<'a> {
    model: &'a mut dyn Model,
    tokens: Array,
    caches: &'a mut [Cache],
    checkpoints: Vec<Checkpoint>,
    logits: Option<Array>,
}

impl Steps for RustSteps<'_> {
    type Error = Error;

    fn checkpoint(&mut self, n_tokens: usize) -> Result<()> {
        self.checkpoints = self.caches.iter().map(|cache| cache.as_dyn().checkpoint(n_tokens)).collect();
        Ok(())
    }

    fn rollback(&mut self) {
        for (cache, checkpoint) in self.caches.iter_mut().zip(self.checkpoints.drain(..)) {
            cache.as_dyn_mut().rollback(checkpoint);
        }
    }

    fn forward(&mut self, window: Range<usize>) -> Result<()> {
        let tokens = self.tokens.take_first_axis(window.start, window.end)?.reshape(&[1, -1])?;
        self.logits = Some(self.model.forward(&tokens, self.caches)?);
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        self.logits = None;
        materialize_caches(self.caches)?;
        array::clear_memory_cache()
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }

    fn progress(&mut self, _done: usize, _total: usize) -> Result<()> {
        Ok(())
    }
}
