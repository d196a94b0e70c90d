//! Bytes from memory into a file, by several threads at once. Nothing here is computed, and no MLX is called.

mod device;
mod host;
mod plan;

use super::atomic::AtomicFile;
use super::layout::Layout;
use super::writer::Saved;
use crate::array::Bytes;
use crate::error::Result;
use plan::Window;
use std::num::NonZero;
use std::path::PathBuf;

/// The operation that errors name.
const SAVE: &str = "save_prompt_cache";

/// Where bytes of the file come from.
pub(super) enum Source {
    /// The header, a number, a text.
    Small(Vec<u8>),
    Array(Bytes),
}

/// A file that wants nothing but writing.
pub(super) struct Ready {
    /// The target.
    pub path: PathBuf,
    /// In the order of the file, without gaps.
    pub sources: Vec<Source>,
    /// One for each source.
    pub layouts: Vec<Layout>,
    pub durable: bool,
    /// Past the page cache, where the file system can.
    pub direct: bool,
    pub threads: NonZero<usize>,
}

impl Ready {
    /// Bytes of the file.
    pub fn n_bytes(&self) -> u64 {
        self.layouts.last().map_or(0, Layout::end)
    }

    /// Makes the bytes safe from whatever becomes of the caches. On the host they are already: an array keeps its value,
    /// and an update of a buffer that is held copies it first.
    pub fn snapshot(&mut self) -> Result<()> {
        let arrays = self.sources.iter_mut().filter_map(|source| match source {
            Source::Array(bytes) => Some(bytes),
            Source::Small(_) => None,
        });
        Bytes::snapshot(arrays)?;
        for (source, layout) in self.sources.iter().zip(&mut self.layouts) {
            if let Source::Array(Bytes { n_runs: 1, .. }) = source {
                layout.in_memory = layout.valid;
            }
        }
        Ok(())
    }

    /// Fills `file`, a new content of the target, and puts it in place.
    pub fn write(self, mut file: AtomicFile) -> Result<Saved> {
        let n_bytes = self.n_bytes();
        file.reserve(n_bytes)?;
        let windows = plan::windows(&self.layouts, n_bytes);
        let direct = self.direct && file.write_past_page_cache();
        let job = Job { file: &file, sources: &self.sources, direct, early: self.durable && !direct };
        if self.sources.iter().any(|source| source.on_host().is_none()) {
            device::write(&job, windows, self.threads)?;
        } else {
            host::write(&job, windows, self.threads)?;
        }
        for source in &self.sources {
            if let Source::Array(bytes) = source {
                bytes.check_in_place(SAVE)?;
            }
        }
        file.commit(self.durable)?;
        Ok(Saved { path: self.path, n_bytes })
    }
}

/// What the threads share.
struct Job<'a> {
    file: &'a AtomicFile,
    sources: &'a [Source],
    /// True if whole windows go past the page cache.
    direct: bool,
    /// True if the disk shall begin at once, since it will be waited for.
    early: bool,
}

impl Job<'_> {
    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.file.write_all_at(bytes, at)
    }

    /// Everything of a window was written.
    fn end(&self, window: &Window) {
        if self.early {
            self.file.start_writeback(window.at, window.n_bytes);
        }
    }
}

impl Source {
    /// Its bytes; None if they are on a device.
    fn on_host(&self) -> Option<&[u8]> {
        match self {
            Self::Small(bytes) => Some(bytes),
            Self::Array(bytes) => bytes.on_host(),
        }
    }
}
