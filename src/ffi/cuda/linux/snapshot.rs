//! From device memory to device memory.

use super::stream::{Side, Stream};
use super::{Memory, Runs};
use crate::error::Result;

/// Copies runs of one memory to as many and as long runs of another, all at once, and waits. The memories are those of
/// arrays that live.
pub(crate) fn copy_on_device(copies: impl IntoIterator<Item = (Memory, Runs, Memory, Runs)>) -> Result<()> {
    let stream = Stream::new("snapshot")?;
    for (from, from_runs, to, to_runs) in copies {
        assert!(from_runs.n == to_runs.n && from_runs.run == to_runs.run, "as much is read as written");
        assert!(from_runs.end() <= from.n_bytes && to_runs.end() <= to.n_bytes, "the runs lie in the arrays");
        // SAFETY: by the checks above both sides lie in the memory of live arrays; the stream is waited for here, by its
        // drop after a failure.
        unsafe { stream.copy(Side::Device(from.start), from_runs, Side::Device(to.start), to_runs) }?;
    }
    stream.wait()
}
