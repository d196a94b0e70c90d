//! L3: a prompt goes through a model chunk by chunk, each computed while the next is being built.

mod flight;
mod pace;
mod plan;

pub use flight::{Steps, run};
pub use pace::{Pace, Step};
pub use plan::{next_window, windows};

use crate::array::{self, Array, Pending, memory};
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

/// Runs a whole prompt through a Rust model and gives the logits of its last window, lazy.
///
/// `prompt`: token ids, at least one. `step`: a number of tokens, of which 0 counts as 1, or [`Step::Auto`].
///
/// # Errors
/// [`Error::Value`] for an empty prompt, or what the model meets; every cache is then back at the last boundary.
pub fn prefill_full(
    model: &mut dyn Model,
    prompt: &[i32],
    caches: &mut [Cache],
    step: impl Into<Step>,
) -> Result<Array> {
    let op = "prefill";
    if prompt.is_empty() {
        return Err(Error::value(op, "at least one token", "an empty prompt"));
    }
    let tokens = Array::from_i32(prompt)?;
    let mut steps = RustSteps { model, tokens, caches, pace: Pace::new(step.into())?, logits: None };
    if !steps.pace.is_measuring() {
        expect_tokens(steps.caches, prompt.len());
    }
    let result = run(&mut steps, prompt.len());
    expect_tokens(steps.caches, 0);
    result?;
    steps.logits.ok_or_else(|| Error::value(op, "logits", "none"))
}

/// Tells every cache how many tokens a prompt still brings.
fn expect_tokens(caches: &mut [Cache], n_tokens: usize) {
    for cache in caches {
        if let Ok(cache) = cache.as_kv_mut() {
            cache.expect_tokens(n_tokens);
        }
    }
}

/// Evaluates the stored buffers of every cache, and waits: the barrier without its overlap.
///
/// # Errors
/// [`Error::Mlx`] if a computation fails.
pub fn materialize_caches(caches: &[Cache]) -> Result<()> {
    caches.iter().try_for_each(|cache| cache.as_dyn().materialize())
}

/// Starts computing the stored buffers of caches.
///
/// # Errors
/// [`Error::Mlx`] if that fails at once.
pub fn start<'a>(buffers: impl IntoIterator<Item = &'a Array> + Clone) -> Result<Pending> {
    array::async_eval("prefill", buffers.clone())?;
    Pending::of("prefill", buffers)
}

struct RustSteps<'a> {
    model: &'a mut dyn Model,
    tokens: Array,
    caches: &'a mut [Cache],
    pace: Pace,
    logits: Option<Array>,
}

impl Steps for RustSteps<'_> {
    type Error = Error;
    type Checkpoint = Vec<Checkpoint>;
    type Pending = Pending;

    fn step(&self) -> usize {
        self.pace.step()
    }

    fn checkpoint(&mut self, n_tokens: usize) -> Result<Vec<Checkpoint>> {
        Ok(self.caches.iter().map(|cache| cache.as_dyn().checkpoint(n_tokens)).collect())
    }

    fn rollback(&mut self, checkpoint: Vec<Checkpoint>) {
        for (cache, checkpoint) in self.caches.iter_mut().zip(checkpoint) {
            cache.as_dyn_mut().rollback(checkpoint);
        }
    }

    fn forward(&mut self, window: Range<usize>) -> Result<()> {
        let tokens = self.tokens.take_first_axis(window.start, window.end)?.reshape(&[1, -1])?;
        self.logits = Some(self.model.forward(&tokens, self.caches)?);
        Ok(())
    }

    fn barrier(&mut self) -> Result<Pending> {
        self.logits = None;
        let buffers: Vec<_> = self.caches.iter().flat_map(|cache| cache.as_dyn().buffers()).collect();
        let pending = start(buffers.iter().copied())?;
        self.pace.started()?;
        Ok(pending)
    }

    fn wait(&mut self, pending: Pending) -> Result<()> {
        pending.wait("prefill")
    }

    fn computed(&mut self) -> Result<()> {
        self.pace.computed()?;
        memory::bound_memory_cache()
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }

    fn hides_failures(error: &Error) -> bool {
        matches!(error, Error::Mlx { .. })
    }

    fn progress(&mut self, _done: usize, _total: usize) -> Result<()> {
        Ok(())
    }
}
