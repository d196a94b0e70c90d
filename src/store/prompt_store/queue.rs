//! Records on their way to the disk: one thread writes them, in order.

use super::key::Key;
use crate::error::{Error, Result};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a put has written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PutReport {
    /// Records that were not there before.
    pub n_written: usize,
    /// Their bytes.
    pub n_bytes: u64,
}

#[derive(Debug, Default)]
struct Outcome {
    report: PutReport,
    failure: Option<Failure>,
    is_done: bool,
}

/// An error that every waiter gets.
#[derive(Clone, Debug)]
struct Failure {
    path: std::path::PathBuf,
    errno: Option<i32>,
    kind: io::ErrorKind,
    text: String,
}

/// A put on its way. Dropping it does not stop it.
#[derive(Clone, Debug, Default)]
pub struct PutHandle(Arc<(Mutex<Outcome>, Condvar)>);

impl PutHandle {
    /// Waits until everything is durable; None if that takes longer than `timeout`.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk is full or fails, or a cap or budget is reached. What was written before stays.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Option<PutReport>> {
        let until = timeout.map(|timeout| Instant::now() + timeout);
        let mut outcome = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        while !outcome.is_done {
            let left = until.map_or(Duration::from_secs(3600), |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Ok(None);
            }
            outcome = self.0.1.wait_timeout(outcome, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        match &outcome.failure {
            None => Ok(Some(outcome.report)),
            Some(failure) => {
                let source = match failure.errno {
                    Some(errno) => io::Error::from_raw_os_error(errno),
                    None => io::Error::new(failure.kind, failure.text.clone()),
                };
                Err(Error::io("store a prompt in", &failure.path, source))
            }
        }
    }

    /// True once nothing is left to wait for.
    pub fn is_done(&self) -> bool {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).is_done
    }

    pub(super) fn finish(&self, report: PutReport, failure: Option<&Error>) {
        let mut outcome = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        outcome.report = report;
        outcome.failure = failure.map(|error| match error {
            Error::Io { path, source, .. } => Failure {
                path: path.clone(),
                errno: source.raw_os_error(),
                kind: source.kind(),
                text: source.to_string(),
            },
            other => Failure {
                path: "the prompt store".into(),
                errno: None,
                kind: io::ErrorKind::Other,
                text: other.to_string(),
            },
        });
        outcome.is_done = true;
        self.0.1.notify_all();
    }
}

/// Records of one put.
#[derive(Debug)]
pub(super) struct Job {
    pub keys: Vec<Key>,
    pub n_bytes: u64,
    pub handle: PutHandle,
    /// The states on this path are to be thinned out.
    pub thin: Option<(super::Space, Vec<u32>)>,
}

#[derive(Debug, Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    /// Of all jobs that are not done.
    n_bytes: u64,
    is_closed: bool,
}

/// The jobs, between those who put and the one who writes.
#[derive(Debug, Default)]
pub(super) struct Queue(Mutex<Waiting>, Condvar);

impl Queue {
    /// Takes a job in, after waiting until what is queued leaves room for it below `limit`; false if it is closed.
    pub fn push(&self, job: Job, limit: u64) -> bool {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while !waiting.is_closed && waiting.n_bytes > 0 && waiting.n_bytes + job.n_bytes > limit {
            waiting = self.1.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        if waiting.is_closed {
            return false;
        }
        waiting.n_bytes += job.n_bytes;
        waiting.jobs.push_back(job);
        self.1.notify_all();
        true
    }

    /// The next job; None once it is closed and empty.
    pub fn next(&self) -> Option<Job> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(job) = waiting.jobs.pop_front() {
                return Some(job);
            }
            if waiting.is_closed {
                return None;
            }
            waiting = self.1.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A job of so many bytes is done.
    pub fn done(&self, n_bytes: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).n_bytes -= n_bytes;
        self.1.notify_all();
    }

    /// No more jobs are taken.
    pub fn close(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_closed = true;
        self.1.notify_all();
    }

    /// Bytes that wait.
    pub fn n_bytes(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).n_bytes
    }
}
