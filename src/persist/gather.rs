//! Bytes of many arrays in host memory of their own, copied by several threads at once.

use super::threads::{self, share};
use crate::array::{self, Array, Bytes, Downloader};
use crate::error::Result;
use std::collections::VecDeque;
use std::num::NonZero;

/// Bytes that leave the device at a time.
const SLOT: usize = 8 << 20;

/// The row-major bytes of arrays, which stay as they are until they are gathered.
pub struct Gathering {
    op: &'static str,
    sources: Vec<Bytes>,
    threads: NonZero<usize>,
}

impl Gathering {
    /// The arrays are evaluated; slices of a buffer are read where they lie.
    ///
    /// `threads`: how many copy at once; None: the environment variable `MLXRS_PY_THREADS`, else the cores, at most 8.
    ///
    /// # Errors
    /// [`Error::Mlx`](crate::Error::Mlx) if a computation or CUDA fails.
    pub fn new(op: &'static str, arrays: &[Array], threads: Option<NonZero<usize>>) -> Result<Self> {
        array::eval(op, arrays)?;
        let threads = threads::number(op, threads)?;
        let sources = arrays.iter().map(|array| array.bytes(op, None)).collect::<Result<_>>()?;
        Ok(Self { op, sources, threads })
    }

    /// The bytes of each array. Calls no MLX.
    ///
    /// # Errors
    /// [`Error::Mlx`](crate::Error::Mlx) if CUDA fails.
    pub fn gather(self) -> Result<Vec<Vec<u8>>> {
        let Self { op, sources, threads } = self;
        let mut gathered: Vec<_> = sources.iter().map(|bytes| vec![0; bytes.n_runs * bytes.run]).collect();
        let jobs = sources.iter().zip(gathered.iter_mut().map(Vec::as_mut_slice));
        let (on_host, on_device): (Vec<_>, Vec<_>) = jobs.partition(|(bytes, _)| bytes.on_host().is_some());
        let copy = |(): &mut (), (bytes, to): (&Bytes, &mut [u8])| {
            copy(bytes, to);
            Ok(())
        };
        share(on_host, threads, || Ok(()), copy, Ok)?;
        share(on_device, threads, Worker::new, Worker::download, Worker::finish)?;
        sources.iter().try_for_each(|bytes| bytes.check_in_place(op))?;
        Ok(gathered)
    }
}

fn copy(bytes: &Bytes, to: &mut [u8]) {
    let Some(from) = bytes.on_host().filter(|_| bytes.run > 0) else { return };
    for (at, run) in to.chunks_exact_mut(bytes.run).enumerate() {
        run.copy_from_slice(&from[at * bytes.pitch..][..bytes.run]);
    }
}

/// One thread's slots, and where what is on its way in them goes, oldest first.
struct Worker<'a> {
    downloader: Downloader<'a>,
    pending: VecDeque<&'a mut [u8]>,
}

impl<'a> Worker<'a> {
    fn new() -> Result<Self> {
        Ok(Self { downloader: Downloader::new(SLOT)?, pending: VecDeque::new() })
    }

    fn download(&mut self, (bytes, mut to): (&'a Bytes, &'a mut [u8])) -> Result<()> {
        // Whole runs, or parts of one that is longer than a slot.
        let (run, per_slot) = (bytes.run.min(SLOT), (SLOT / bytes.run.max(1)).max(1));
        let mut done = 0;
        while !to.is_empty() {
            let within = done % bytes.run;
            let (n_runs, run) =
                if bytes.run > SLOT { (1, run.min(bytes.run - within)) } else { (per_slot.min(to.len() / run), run) };
            if self.downloader.is_full() {
                self.take()?;
            }
            let from = done / bytes.run * bytes.pitch + within;
            self.downloader.download(bytes, [n_runs, run], [from, bytes.pitch], [0, run])?;
            self.downloader.send()?;
            let (part, rest) = to.split_at_mut(n_runs * run);
            self.pending.push_back(part);
            (to, done) = (rest, done + n_runs * run);
        }
        Ok(())
    }

    fn take(&mut self) -> Result<()> {
        let bytes = self.downloader.take()?;
        if let Some(to) = self.pending.pop_front() {
            to.copy_from_slice(&bytes[..to.len()]);
        }
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        while !self.downloader.is_empty() {
            self.take()?;
        }
        Ok(())
    }
}
