//! Removes what savers left that died in the middle: temporaries that nobody holds a lock on.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, flock, openat, unlinkat};
use rustix::io::Errno;

use super::place::Place;
use super::probe::{Phase, reach};
use super::temp_name;

/// Removes the dead temporaries, of any target, beside `place`.
///
/// A process id tells nothing (ids are reused, and containers have their own): a temporary is dead when its lock
/// can be had. Nothing here may fail a save; what cannot be listed, opened or removed stays.
pub(super) fn remove_dead(place: &Place) {
    if let Err(error) = reach(Phase::Sweep).and_then(|()| sweep(place)) {
        tracing::debug!(%error, "dead temporary files were not looked for");
    }
}

fn sweep(place: &Place) -> io::Result<()> {
    // Listed to the end first: removing entries while reading a folder may hide others.
    let mut names = Vec::new();
    for entry in Dir::read_from(&place.folder)? {
        let entry = entry?;
        let may_be_file = matches!(entry.file_type(), FileType::RegularFile | FileType::Unknown);
        if may_be_file && temp_name::matches(entry.file_name().to_bytes()) {
            names.push(entry.file_name().to_owned());
        }
    }
    for name in names {
        let name = OsStr::from_bytes(name.to_bytes());
        match remove_if_dead(place, name) {
            Ok(true) => tracing::debug!(?name, "removed a dead temporary file"),
            Ok(false) => {}
            Err(error) => tracing::debug!(?name, %error, "left a temporary file"),
        }
    }
    Ok(())
}

fn remove_if_dead(place: &Place, name: &OsStr) -> io::Result<bool> {
    // NFS locks only what is open for writing; a dead temporary may already have the mode of a read-only file.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let open = |access| openat(&place.folder, name, flags | access, Mode::empty());
    let file = match open(OFlags::RDWR) {
        Err(Errno::ACCESS) => open(OFlags::RDONLY),
        opened => opened,
    }?;
    reach(Phase::Sweep)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Ok(false),
        locked => locked?,
    }
    // Its writer may have renamed it, or another sweeper removed it, before the lock was had.
    if !place.holds_file(name, &file)? {
        return Ok(false);
    }
    unlinkat(&place.folder, name, AtFlags::empty())?;
    Ok(true)
}
