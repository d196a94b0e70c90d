//! From memory that the host reads, straight from where it lies.

use super::Job;
use super::plan::{Part, Window};
use crate::error::Result;
use crate::persist::atomic::aligned_zeros;
use crate::persist::threads::share;
use std::num::NonZero;

/// Runs of fewer bytes on average are gathered first: each call of the system costs as much as some kilobytes.
const SMALL: usize = 64 << 10;

pub(super) fn write(job: &Job<'_>, windows: Vec<Window>, threads: NonZero<usize>) -> Result<()> {
    share(windows, threads, || Ok(Vec::new()), |scratch, window| one(job, &window, scratch), |_| Ok(()))
}

fn one(job: &Job<'_>, window: &Window, scratch: &mut Vec<u8>) -> Result<()> {
    let n_runs: usize = window.parts.iter().map(|part| part.n_heads).sum();
    if job.direct || n_runs * SMALL > window.n_bytes {
        let scratch = aligned_zeros(scratch, window.n_bytes);
        for part in &window.parts {
            gather(job, part, scratch);
        }
        job.write(scratch, window.at)?;
    } else {
        for part in &window.parts {
            let bytes = job.sources[part.tensor].on_host().unwrap_or_default();
            for (from, to) in part.runs() {
                job.write(&bytes[from..from + part.run], window.at + to as u64)?;
            }
        }
    }
    job.end(window);
    Ok(())
}

/// Copies the runs of a part to their places in the window. Those of a device are left out.
pub(super) fn gather(job: &Job<'_>, part: &Part, window: &mut [u8]) {
    let Some(bytes) = job.sources[part.tensor].on_host() else { return };
    for (from, to) in part.runs() {
        window[to..to + part.run].copy_from_slice(&bytes[from..from + part.run]);
    }
}
