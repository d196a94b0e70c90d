//! Fault points: every step of a save passes here first, so that tests can watch it, fail it or die in it.

use std::io;
use std::sync::OnceLock;

/// The steps of a save, in their order. The temporary file exists from `Lock` to `Rename`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Remove what dead savers left in the folder; reached again for every file found, which is then open.
    Sweep,
    /// Create the temporary file.
    Create,
    /// Lock the temporary file.
    Lock,
    /// Write some bytes; reached again for every piece.
    Write,
    /// Take over owner and mode of the file to be replaced.
    Mode,
    /// Bring the bytes to the disk.
    Sync,
    /// Rename the temporary file over the target.
    Rename,
    /// Bring the new name to the disk.
    FolderSync,
}

type Probe = fn(Phase) -> io::Result<()>;

static PROBE: OnceLock<Probe> = OnceLock::new();

/// Calls `probe` before each step of every save in this process; an error of its fails that step.
///
/// For tests. The first probe stays: a later call changes nothing and returns `false`.
#[must_use]
pub fn set_probe(probe: Probe) -> bool {
    PROBE.set(probe).is_ok()
}

/// Passes the fault point of `phase`.
pub(super) fn reach(phase: Phase) -> io::Result<()> {
    PROBE.get().map_or(Ok(()), |probe| probe(phase))
}
