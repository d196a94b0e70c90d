//! Fault points: every step of a write passes here first, so that tests can watch it, fail it or die in it.

use std::io;
use std::path::Path;
use std::sync::OnceLock;

/// The steps of a write, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// Reserve room in the index.
    Reserve,
    /// Remove an evicted file.
    Unlink,
    /// Create a temporary file.
    Create,
    /// Write a record's bytes.
    Write,
    /// Bring a record's bytes to the disk.
    Sync,
    /// Give a record its name.
    Rename,
    /// Bring the names to the disk.
    FolderSync,
    /// Enter the records into the index.
    Index,
}

type Probe = fn(Step, &Path) -> io::Result<()>;

static PROBE: OnceLock<Probe> = OnceLock::new();

/// Calls `probe`, with the store's folder, before each step of every write of a prompt store in this process; an error of
/// its fails that step.
///
/// For tests. The first probe stays: a later call changes nothing and returns `false`.
#[must_use]
pub fn set_probe(probe: Probe) -> bool {
    PROBE.set(probe).is_ok()
}

/// Passes the fault point of `step` in the store at `root`.
pub(super) fn reach(step: Step, root: &Path) -> io::Result<()> {
    PROBE.get().map_or(Ok(()), |probe| probe(step, root))
}
