//! What becomes of a put.

use crate::error::{Error, Result};
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a put has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PutReport {
    /// Records that are now stored and were not before.
    pub n_written: usize,
    /// Bytes of their files, or in memory.
    pub n_bytes: u64,
    /// Records that were there before, or are being written by another process.
    pub n_present: usize,
    /// Records that stay in memory only, for want of room, of the day's budget, or of a disk.
    pub n_in_memory: usize,
    /// Whether what was written survives a crash of the machine.
    pub is_durable: bool,
}

#[derive(Debug, Default)]
struct Shared {
    outcome: Mutex<Option<Result<PutReport>>>,
    done: Condvar,
}

/// The way to the outcome of a put, which it also keeps for later.
#[derive(Clone, Debug, Default)]
pub struct PutHandle(Arc<Shared>);

impl PutHandle {
    pub(super) fn finished(outcome: Result<PutReport>) -> Self {
        let handle = Self::default();
        handle.finish(outcome);
        handle
    }

    /// Tells the outcome; the first one stays.
    pub(super) fn finish(&self, outcome: Result<PutReport>) {
        let mut place = self.0.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        place.get_or_insert(outcome);
        drop(place);
        self.0.done.notify_all();
    }

    /// Whether the outcome is known.
    pub fn is_done(&self) -> bool {
        self.0.outcome.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Waits for the outcome, at most `timeout`; None if it is not known by then.
    ///
    /// # Errors
    /// Why the put failed: [`Error::Io`] if the disk refuses, [`Error::Value`] for records that cannot be, and
    /// [`Error::Order`] for a store that is closed or was opened before a fork. Asked again, the same.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Option<PutReport>> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut outcome = self.0.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &*outcome {
                Some(Ok(report)) => return Ok(Some(*report)),
                Some(Err(error)) => return Err(again(error)),
                None => {}
            }
            let Some(deadline) = deadline else {
                outcome = self.0.done.wait(outcome).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            outcome = self.0.done.wait_timeout(outcome, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The same error once more.
pub(super) fn again(error: &Error) -> Error {
    match error {
        Error::Io { op, path, source } => {
            let source = match source.raw_os_error() {
                Some(code) => io::Error::from_raw_os_error(code),
                None => io::Error::new(source.kind(), source.to_string()),
            };
            Error::io(op, path, source)
        }
        Error::Value { op, expected, got } => Error::value(op, expected.clone(), got),
        Error::Order { op, expected, got } => Error::Order { op, expected: expected.clone(), got: got.clone() },
        Error::Format { path, key, expected, got } => Error::format(path, key, expected, got),
        other => Error::Order { op: "put", expected: "a put that works".into(), got: other.to_string() },
    }
}
