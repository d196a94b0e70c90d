//! From device memory to device memory that no array has.

use super::stream::{Side, Stream};
use super::{Memory, Runs, check};
use crate::error::Result;
use cudarc::driver::sys::{self, CUdeviceptr};
use std::sync::Arc;

const SNAPSHOT: &str = "snapshot";
/// Where copies may begin.
const ALIGNMENT: usize = 256;

/// A copy of an array's runs, one behind the other.
pub(crate) struct Copy {
    memory: Memory,
    /// Keeps the memory.
    _block: Arc<Block>,
}

impl Copy {
    /// Copies the runs of each memory, those of arrays that live, and waits.
    pub(crate) fn of(sources: &[(Memory, Runs)]) -> Result<Vec<Self>> {
        let stream = Stream::new(SNAPSHOT)?;
        let sizes = sources.iter().map(|(_, runs)| (runs.n * runs.run).next_multiple_of(ALIGNMENT));
        let block = Arc::new(Block::new(&stream, sizes.sum())?);
        let mut start = block.start;
        let copies = sources.iter().map(|&(from, runs)| {
            assert!(runs.end() <= from.n_bytes, "the runs lie in the array");
            let n_bytes = runs.n * runs.run;
            let memory = Memory { start, n_bytes, is_on_device: true };
            start += n_bytes.next_multiple_of(ALIGNMENT) as CUdeviceptr;
            let to = Runs { from: 0, pitch: runs.run, ..runs };
            // SAFETY: the source lies in a live array by the check above, the target in the block, which was made for the
            // sum of these sizes; the stream is waited for below.
            unsafe { stream.copy(Side::Device(from.start), runs, Side::Device(memory.start), to) }?;
            Ok(Self { memory, _block: block.clone() })
        });
        let copies = copies.collect::<Result<Vec<_>>>();
        // After a failure too: what was begun must not outlive the block.
        stream.wait().and(copies)
    }

    pub(crate) const fn memory(&self) -> &Memory {
        &self.memory
    }
}

/// Device memory of our own, from the pool that MLX takes its from.
struct Block {
    start: CUdeviceptr,
}

impl Block {
    fn new(stream: &Stream, n_bytes: usize) -> Result<Self> {
        let mut start = 0;
        // SAFETY: a live stream, whose context is this thread's; the out-parameter is a local.
        check(SNAPSHOT, unsafe { sys::cuMemAllocAsync(&raw mut start, n_bytes, stream.raw()) })?;
        Ok(Self { start })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let freed = Stream::new(SNAPSHOT).and_then(|stream| {
            // SAFETY: what `new` made; every copy of it was waited for before its owner let go of it.
            check(SNAPSHOT, unsafe { sys::cuMemFreeAsync(self.start, stream.raw()) })
        });
        if let Err(error) = freed {
            tracing::warn!(%error, "device memory could not be given back");
        }
    }
}
