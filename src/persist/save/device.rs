//! From device memory, through pinned slots: one is written while the next one is on its way.

use super::plan::{WINDOW, Window};
use super::{Job, Source, host};
use crate::array::Downloader;
use crate::error::Result;
use crate::persist::threads::share;
use std::collections::VecDeque;
use std::num::NonZero;

/// What one thread has: the slots, and the windows that are on their way in them, oldest first.
struct Worker<'a> {
    downloader: Downloader<'a>,
    pending: VecDeque<Window>,
}

pub(super) fn write(job: &Job<'_>, windows: Vec<Window>, threads: NonZero<usize>) -> Result<()> {
    let start = || Ok(Worker { downloader: Downloader::new(WINDOW)?, pending: VecDeque::new() });
    let end = |mut worker: Worker<'_>| {
        while !worker.downloader.is_empty() {
            write_oldest(job, &mut worker)?;
        }
        Ok(())
    };
    share(windows, threads, start, |worker, window| one(job, window, worker), end)
}

fn one<'a>(job: &Job<'a>, window: Window, worker: &mut Worker<'a>) -> Result<()> {
    if worker.downloader.is_full() {
        write_oldest(job, worker)?;
    }
    let slot = &mut worker.downloader.slot()?[..window.n_bytes];
    let n_covered: usize = window.parts.iter().map(|part| part.n_heads * part.run).sum();
    if n_covered < window.n_bytes {
        slot.fill(0);
    }
    for part in &window.parts {
        host::gather(job, part, slot);
    }
    for part in &window.parts {
        if let Source::Array(bytes) = &job.sources[part.tensor]
            && bytes.on_host().is_none()
        {
            worker.downloader.download(bytes, [part.n_heads, part.run], part.memory, part.window)?;
        }
    }
    worker.downloader.send()?;
    worker.pending.push_back(window);
    Ok(())
}

fn write_oldest(job: &Job<'_>, worker: &mut Worker<'_>) -> Result<()> {
    let bytes = worker.downloader.take()?;
    if let Some(window) = worker.pending.pop_front() {
        job.write(&bytes[..window.n_bytes], window.at)?;
        job.end(&window);
    }
    Ok(())
}
