//! What waits to be written, and the one thread that writes it.

use super::disk::Disk;
use super::handle::{PutHandle, PutReport};
use super::key::Space;
use super::ram::Ram;
use super::record::{Record, RecordKind};
use super::walk::{self, Chain};
use super::{disk, lock};
use crate::error::{Error, Result};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the thread looks after the folder when nothing is put.
const PAUSE: Duration = Duration::from_millis(500);
/// How often it looks for the dead.
const SWEEP: Duration = Duration::from_secs(30);

/// Records of one put.
#[derive(Debug)]
pub(super) struct Job {
    pub space: Space,
    pub tokens: Vec<u32>,
    pub records: Vec<Arc<Record>>,
    /// Bytes that it takes of the room for what waits.
    pub n_bytes: u64,
    pub handle: PutHandle,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Jobs and bytes that wait or are being written.
    n_jobs: usize,
    n_bytes: u64,
    is_closing: bool,
}

/// What the thread and those who put share.
#[derive(Debug)]
pub(super) struct Shared {
    pub block: usize,
    pub ram: Mutex<Ram>,
    disk: Mutex<Option<Arc<Disk>>>,
    pub rates: Mutex<BTreeMap<String, f64>>,
    /// Names of the averages that changed since they were kept.
    pub new_rates: Mutex<HashSet<String>>,
    state: Mutex<State>,
    /// Something waits, or the store closes.
    work: Condvar,
    /// Something was written.
    room: Condvar,
}

impl Shared {
    pub fn new(block: usize, ram: Ram, disk: Option<Arc<Disk>>) -> Self {
        let rates = Mutex::new(disk.as_ref().map(|disk| disk.rates()).unwrap_or_default());
        Self {
            block,
            ram: Mutex::new(ram),
            disk: Mutex::new(disk),
            rates,
            new_rates: Mutex::default(),
            state: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
        }
    }

    /// The folder, if there is one and the store is open.
    pub fn disk(&self) -> Option<Arc<Disk>> {
        lock(&self.disk).clone()
    }

    /// Lets go of the folder.
    pub fn drop_disk(&self) {
        let disk = lock(&self.disk).take();
        drop(disk);
    }

    /// Jobs and bytes that wait or are being written.
    pub fn queued(&self) -> (usize, u64) {
        let state = lock(&self.state);
        (state.n_jobs, state.n_bytes)
    }

    /// Waits until at most `limit` bytes wait, with `n_bytes` more, or nothing else waits; then keeps room for them.
    pub fn enter(&self, n_bytes: u64, limit: u64) -> Result<()> {
        let mut state = lock(&self.state);
        while state.n_jobs > 0 && state.n_bytes.saturating_add(n_bytes) > limit && !state.is_closing {
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.is_closing {
            return Err(super::closed("put"));
        }
        state.n_jobs += 1;
        state.n_bytes += n_bytes;
        Ok(())
    }

    /// Waits until nothing waits.
    pub fn settle(&self) {
        let mut state = lock(&self.state);
        while state.n_jobs > 0 {
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Hands a job over, for which room is kept.
    pub fn hand_over(&self, job: Job) {
        lock(&self.state).jobs.push_back(job);
        self.work.notify_all();
    }

    /// Lets the thread look after the folder now.
    pub fn wake(&self) {
        self.work.notify_all();
    }

    /// No more is taken.
    pub fn start_closing(&self) {
        lock(&self.state).is_closing = true;
        self.work.notify_all();
        self.room.notify_all();
    }

    /// What the thread does until the store closes and nothing waits.
    pub fn work(&self, disk: &Arc<Disk>) {
        let mut swept = Instant::now();
        loop {
            let mut state = lock(&self.state);
            if state.jobs.is_empty() && !state.is_closing {
                state = self.work.wait_timeout(state, PAUSE).unwrap_or_else(PoisonError::into_inner).0;
            }
            let job = state.jobs.pop_front();
            // A put that keeps room but has not handed its job over yet is waited for.
            let is_last = state.is_closing && job.is_none() && state.n_jobs == 0;
            drop(state);
            if let Some(job) = job {
                self.write(disk, &job);
            }
            let is_due = swept.elapsed() > SWEEP;
            if is_due {
                swept = Instant::now();
            }
            let keep_house = || {
                disk.keep_house(is_due);
                self.keep_rates(disk);
            };
            // The thread must live as long as somebody may wait for it.
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(keep_house)).is_err() {
                tracing::error!("a panic while looking after the folder");
            }
            if is_last {
                return;
            }
        }
    }

    /// Writes a job and tells what became of it, whatever happens.
    fn write(&self, disk: &Arc<Disk>, job: &Job) {
        let written = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.try_write(disk, job)));
        let outcome = written.unwrap_or_else(|_| {
            Err(Error::Order { op: "put", expected: "a put that works".into(), got: "a panic of the writer".into() })
        });
        if let Err(error) = &outcome {
            tracing::warn!(%error, "a put failed");
            // They stay in memory as long as there is room.
            let mut ram = lock(&self.ram);
            job.records.iter().for_each(|record| ram.release(record, false));
        }
        let mut state = lock(&self.state);
        state.n_jobs -= 1;
        state.n_bytes -= job.n_bytes;
        drop(state);
        self.room.notify_all();
        job.handle.finish(outcome);
    }

    fn try_write(&self, disk: &Arc<Disk>, job: &Job) -> Result<PutReport> {
        let protected = Chain::new(&job.space, &job.tokens, self.block).all().iter().map(disk::slot).collect();
        let mut done = |record: &Arc<Record>, is_written: bool| lock(&self.ram).release(record, is_written);
        let report = disk.write_records(&job.records, &protected, &mut done);
        if report.is_ok() && job.records.iter().any(|record| record.entry.kind == RecordKind::State) {
            let states = disk.ask(|tree| walk::find(&[tree], &job.space, &job.tokens, self.block).states);
            if let Err(error) = disk.thin(&states.unwrap_or_default()) {
                tracing::debug!(%error, "states are thinned later");
            }
        }
        report
    }

    fn keep_rates(&self, disk: &Disk) {
        let changed = std::mem::take(&mut *lock(&self.new_rates));
        if changed.is_empty() || !disk.is_writable() {
            return;
        }
        let rates = lock(&self.rates);
        let rates = changed.iter().filter_map(|name| Some((name.clone(), *rates.get(name)?))).collect();
        if let Err(error) = disk.keep_rates(&rates) {
            tracing::debug!(%error, "averages are kept later");
            lock(&self.new_rates).extend(changed);
        }
    }
}
