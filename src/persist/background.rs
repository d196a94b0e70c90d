//! Saves that go on after their call: one thread writes them, one after the other.
//!
//! The thread touches plain bytes only and calls no MLX. Saves that wait are bounded by the bytes that they hold, and the
//! end of the process [waits](wait_for_all) for all of them.

use super::Metadata;
use super::atomic::AtomicFile;
use super::save::Ready;
use super::writer::{SaveOptions, Saved, prepare};
use crate::array::Array;
use crate::cache::CacheState;
use crate::error::{Error, Result};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The operation that errors name.
const SAVE: &str = "save_prompt_cache";
/// Bytes that saves in the background hold at most, unless one alone holds more.
pub const MAX_PENDING: u64 = 4 << 30;

/// A save of which all is known but when it may begin.
pub struct WaitingSave {
    ready: Ready,
    room: Option<Room>,
}

/// A save that goes on by itself. Dropping this does not stop it.
#[derive(Debug)]
pub struct PendingSave(Arc<Outcome>);

#[derive(Debug)]
struct Outcome {
    /// The process that has the thread.
    process: u32,
    result: OnceLock<Result<Saved>>,
    /// True once somebody was told.
    is_told: AtomicBool,
}

struct Job {
    ready: Ready,
    file: AtomicFile,
    outcome: Arc<Outcome>,
    room: Option<Room>,
}

struct Queue {
    jobs: VecDeque<Job>,
    /// True while a thread is there, which takes every job that comes.
    is_served: bool,
    held_bytes: u64,
    /// Failures; kept until they are told or the process ends.
    failed: Vec<Arc<Outcome>>,
}

static QUEUE: Mutex<Queue> =
    Mutex::new(Queue { jobs: VecDeque::new(), is_served: false, held_bytes: 0, failed: Vec::new() });
/// Something of the queue or an outcome changed.
static CHANGED: Condvar = Condvar::new();
/// The process whose thread serves the queue: a fork copies neither the thread nor an unlocked lock.
static HOME: OnceLock<u32> = OnceLock::new();

fn queue() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of the bound, given back on drop.
struct Room(u64);

impl Room {
    fn take(n_bytes: u64, until: Instant) -> Option<Self> {
        let mut queue = queue();
        loop {
            if queue.held_bytes == 0 || queue.held_bytes.saturating_add(n_bytes) <= MAX_PENDING {
                queue.held_bytes += n_bytes;
                return Some(Self(n_bytes));
            }
            queue = wait(queue, until)?;
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        queue().held_bytes -= self.0;
        CHANGED.notify_all();
    }
}

/// Waits for a change; None if the time is over.
fn wait(queue: MutexGuard<'static, Queue>, until: Instant) -> Option<MutexGuard<'static, Queue>> {
    let left = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
    Some(CHANGED.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0)
}

impl WaitingSave {
    /// As [`write_states`](super::write_states), up to where the arrays are computed.
    ///
    /// # Errors
    /// As there.
    pub fn new(
        path: &Path,
        caches: Vec<CacheState<Array>>,
        metadata: &Metadata,
        options: &SaveOptions,
    ) -> Result<Self> {
        let ready = prepare(path, caches, metadata, options)?;
        Ok(Self { ready, room: None })
    }

    /// The file, with its ending.
    pub fn path(&self) -> &Path {
        &self.ready.path
    }

    /// Waits until saves that are pending hold few enough bytes; false if they do not within `timeout`.
    pub fn wait_for_room(&mut self, timeout: Duration) -> bool {
        if self.room.is_none() {
            self.room = Room::take(self.ready.n_bytes(), Instant::now() + timeout);
        }
        self.room.is_some()
    }

    /// Begins, and gives the file's temporary one its place at once. On CUDA the bytes are copied on the device first; if
    /// its memory is short the save is done when this returns.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder takes no file; later errors are the [`PendingSave`]'s.
    pub fn start(mut self) -> Result<PendingSave> {
        let process = *HOME.get_or_init(std::process::id);
        let outcome = Arc::new(Outcome { process, result: OnceLock::new(), is_told: AtomicBool::new(false) });
        let file = AtomicFile::create(&self.ready.path)?;
        let snapshot = self.ready.snapshot();
        let job = Job { ready: self.ready, file, outcome: outcome.clone(), room: self.room };
        if let Err(error) = snapshot {
            tracing::warn!(%error, "a save goes on in its call");
            job.run();
            return Ok(PendingSave(outcome));
        }
        let mut queue = queue();
        queue.jobs.push_back(job);
        if !queue.is_served {
            // Said before the thread is there, so that no second one is begun.
            queue.is_served = true;
            drop(queue);
            if let Err(error) = std::thread::Builder::new().name("mlxrs-save".to_owned()).spawn(serve) {
                tracing::warn!(%error, "a save goes on in its call");
                serve();
            }
        }
        Ok(PendingSave(outcome))
    }
}

/// Writes what is in the queue, until nothing is.
fn serve() {
    loop {
        let job = {
            let mut queue = queue();
            let job = queue.jobs.pop_front();
            queue.is_served = job.is_some();
            job
        };
        match job {
            Some(job) => job.run(),
            None => return CHANGED.notify_all(),
        }
    }
}

impl Job {
    fn run(self) {
        let Self { ready, file, outcome, room } = self;
        // A panic is this save's, not that of the ones behind it.
        let write = std::panic::AssertUnwindSafe(|| ready.write(file));
        let result = std::panic::catch_unwind(write).unwrap_or_else(|_| {
            Err(Error::Order { op: SAVE, expected: "a save that ends".to_owned(), got: "a panic".to_owned() })
        });
        let is_failed = result.is_err();
        let _first = outcome.result.set(result);
        {
            // Also, so that nobody who looked before the result was there misses what is said below.
            let mut queue = queue();
            queue.failed.retain(|outcome| !outcome.is_told.load(Ordering::Relaxed));
            if is_failed {
                queue.failed.push(outcome);
            }
        }
        drop(room);
        CHANGED.notify_all();
    }
}

impl PendingSave {
    /// True once it is over, well or not.
    pub fn is_done(&self) -> bool {
        self.0.result.get().is_some()
    }

    /// Waits until it is over; false if it is not within `timeout`.
    ///
    /// # Errors
    /// [`Error::Order`] in a forked child, where nobody goes on with it.
    pub fn wait(&self, timeout: Duration) -> Result<bool> {
        if self.is_done() {
            return Ok(true);
        }
        if self.0.process != std::process::id() {
            let expected = "the process that began the save".to_owned();
            return Err(Error::Order { op: SAVE, expected, got: "a forked child".to_owned() });
        }
        let until = Instant::now() + timeout;
        let mut queue = queue();
        while !self.is_done() {
            let Some(next) = wait(queue, until) else { return Ok(false) };
            queue = next;
        }
        Ok(true)
    }

    /// How it ended; None if it has not.
    pub fn result(&self) -> Option<Result<Saved>> {
        let result = self.0.result.get()?;
        self.0.is_told.store(true, Ordering::Relaxed);
        Some(match result {
            Ok(saved) => Ok(saved.clone()),
            Err(error) => Err(error.again()),
        })
    }
}

/// Waits until all saves in the background are over; false if they are not within `timeout`. A forked child has none.
pub fn wait_for_all(timeout: Duration) -> bool {
    if HOME.get() != Some(&std::process::id()) {
        return true;
    }
    let until = Instant::now() + timeout;
    let mut queue = queue();
    while queue.is_served {
        let Some(next) = wait(queue, until) else { return false };
        queue = next;
    }
    true
}

/// Errors of saves that nobody was told of; told by this.
pub fn untold_errors() -> Vec<Error> {
    if HOME.get() != Some(&std::process::id()) {
        return Vec::new();
    }
    let failed = std::mem::take(&mut queue().failed);
    let untold = failed.iter().filter(|outcome| !outcome.is_told.swap(true, Ordering::Relaxed));
    untold.filter_map(|outcome| outcome.result.get()?.as_ref().err().map(Error::again)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saves_get_room_up_to_the_bound_and_one_alone_always() {
        let now = || Instant::now() + Duration::from_millis(20);
        let first = Room::take(MAX_PENDING / 4 * 3, now()).expect("all is free");
        assert!(Room::take(MAX_PENDING / 2, now()).is_none());
        let second = Room::take(MAX_PENDING / 4, now()).expect("a quarter is free");
        drop(first);
        assert!(Room::take(u64::MAX, now()).is_none());
        drop(second);
        let alone = Room::take(u64::MAX, now()).expect("all is free");
        let waiting = std::thread::spawn(|| Room::take(1, Instant::now() + Duration::from_secs(60)).is_some());
        drop(alone);
        assert!(waiting.join().expect("no panic"));
        assert_eq!(queue().held_bytes, 0);
    }
}
