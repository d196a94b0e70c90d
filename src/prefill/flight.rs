//! The loop over a prompt's windows: at most two are under way, and whatever stops it, all caches stand at one boundary.

use super::plan::next_window;
use std::ops::Range;

/// What one prefill does at each point; [`run`] knows the order. The model behind it may be Rust or Python.
pub trait Steps {
    /// The error of the model's world.
    type Error;
    /// Where every cache stood.
    type Checkpoint;
    /// A computation under way.
    type Pending;

    /// Tokens that the next window may have; at least 1.
    fn step(&self) -> usize;

    /// Tells where every cache stands, before a window of `n_tokens`.
    ///
    /// # Errors
    /// If a cache cannot tell its state.
    fn checkpoint(&mut self, n_tokens: usize) -> Result<Self::Checkpoint, Self::Error>;

    /// Puts every cache back. The newer of two windows is undone first.
    fn rollback(&mut self, checkpoint: Self::Checkpoint);

    /// Runs one window of tokens through the model, lazily, and keeps the logits.
    ///
    /// # Errors
    /// Whatever the model meets.
    fn forward(&mut self, window: Range<usize>) -> Result<(), Self::Error>;

    /// The memory barrier after a leading window: starts computing every cache's buffers, so that the lazy graph never
    /// spans the prompt.
    ///
    /// # Errors
    /// If a computation fails at once.
    fn barrier(&mut self) -> Result<Self::Pending, Self::Error>;

    /// Waits for the end of a barrier.
    ///
    /// # Errors
    /// If a computation failed.
    fn wait(&mut self, pending: Self::Pending) -> Result<(), Self::Error>;

    /// After a leading window was computed.
    ///
    /// # Errors
    /// If the memory cannot be managed.
    fn computed(&mut self) -> Result<(), Self::Error>;

    /// Computes what the last window gives.
    ///
    /// # Errors
    /// If a computation fails.
    fn finish(&mut self) -> Result<(), Self::Error>;

    /// True if `error`, met while a window was being built, may be the failure of the one before: MLX tells each once,
    /// to whoever comes next.
    fn hides_failures(error: &Self::Error) -> bool;

    /// Tells that `done` of `total` tokens are computed. The caches may be a window further.
    ///
    /// # Errors
    /// If the listener wants to stop.
    fn progress(&mut self, done: usize, total: usize) -> Result<(), Self::Error>;
}

/// A window that was handed to the device.
struct Flight<S: Steps> {
    end: usize,
    before: S::Checkpoint,
    /// None once computed.
    pending: Option<S::Pending>,
}

impl<S: Steps> Flight<S> {
    /// Builds a window and hands it over. A window that fails is undone.
    fn launch(steps: &mut S, window: Range<usize>, total: usize) -> Result<Self, S::Error> {
        let end = window.end;
        let before = steps.checkpoint(window.len())?;
        let launched = steps
            .forward(window)
            .and_then(|()| if end < total { steps.barrier().map(Some) } else { steps.finish().map(|()| None) });
        match launched {
            Ok(pending) => Ok(Self { end, before, pending }),
            Err(error) => {
                steps.rollback(before);
                Err(error)
            }
        }
    }

    /// Takes the window back.
    fn undo(self, steps: &mut S) {
        // Its own failure no longer matters, but must not be told to the next who computes.
        let _: Option<Result<(), S::Error>> = self.pending.map(|pending| steps.wait(pending));
        steps.rollback(self.before);
    }
}

/// Runs a prompt of `total` tokens: while one window is computed, the next is built.
///
/// # Errors
/// The first error of `steps`; every cache is then back at the end of the last window that was computed as a whole, or,
/// if the error may have hidden its failure, of the one before.
pub fn run<S: Steps>(steps: &mut S, total: usize) -> Result<(), S::Error> {
    steps.progress(0, total)?;
    let mut under_way: Option<Flight<S>> = None;
    let mut start = 0;
    while start < total {
        let window = next_window(start, total, steps.step());
        start = window.end;
        let launched = Flight::launch(steps, window, total);
        let Some(older) = under_way.take() else {
            under_way = Some(launched?);
            continue;
        };
        let waited = older.pending.map_or(Ok(()), |pending| steps.wait(pending));
        let newer = match (launched, waited) {
            (Ok(newer), Ok(())) => newer,
            (Ok(newer), Err(error)) => {
                newer.undo(steps);
                steps.rollback(older.before);
                return Err(error);
            }
            (Err(error), waited) => {
                if waited.is_err() || S::hides_failures(&error) {
                    steps.rollback(older.before);
                } else {
                    // Whoever goes on must know from where. A listener that wants to stop has its way anyhow.
                    let _: Result<(), S::Error> = steps.progress(older.end, total);
                }
                return Err(error);
            }
        };
        if let Err(error) = steps.computed().and_then(|()| steps.progress(older.end, total)) {
            newer.undo(steps);
            return Err(error);
        }
        under_way = Some(newer);
    }
    // The last window was finished, not started.
    under_way.map_or(Ok(()), |last| steps.progress(last.end, total))
}
