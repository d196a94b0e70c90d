//! Work that is shared out among threads.

use crate::error::{Error, Result};
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Threads that read or write when nothing else is said; more gain nothing where it was measured.
const MAX_THREADS: usize = 8;
/// The variable that says how many threads read or write.
const THREADS: &str = "MLXRS_PY_THREADS";

/// As many threads as were asked for, or the variable says, or the machine has.
pub(super) fn number(op: &'static str, asked: Option<NonZero<usize>>) -> Result<NonZero<usize>> {
    if let Some(threads) = asked {
        return Ok(threads);
    }
    if let Ok(text) = std::env::var(THREADS) {
        let expected = format!("{THREADS} of at least 1");
        return text.parse().map_err(|_| Error::value(op, expected, text));
    }
    let cores = std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN);
    Ok(NonZero::new(MAX_THREADS).map_or(cores, |most| cores.min(most)))
}

/// Runs `work` over `jobs` on `threads` threads, each with a state of its own from `start`, and closes it by `end`. After
/// a failure no further job begins; the first one is given.
pub(super) fn share<J: Send, S>(
    jobs: Vec<J>,
    threads: NonZero<usize>,
    start: impl Fn() -> Result<S> + Sync,
    work: impl Fn(&mut S, J) -> Result<()> + Sync,
    end: impl Fn(S) -> Result<()> + Sync,
) -> Result<()> {
    let threads = threads.get().min(jobs.len());
    let (jobs, stop) = (Mutex::new(jobs.into_iter()), AtomicBool::new(false));
    let next = || {
        let mut jobs = jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if stop.load(Ordering::Relaxed) { None } else { jobs.next() }
    };
    let run = || {
        let mut state = start()?;
        let mut done = Ok(());
        while let Some(job) = next() {
            done = work(&mut state, job);
            if done.is_err() {
                break;
            }
        }
        // What was begun is waited for, also after a failure.
        done.and(end(state)).inspect_err(|_| stop.store(true, Ordering::Relaxed))
    };
    if threads <= 1 {
        return if threads == 0 { Ok(()) } else { run() };
    }
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        let done =
            workers.into_iter().map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        done.fold(Ok(()), Result::and)
    })
}
