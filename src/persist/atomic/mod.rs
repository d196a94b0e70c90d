//! Files that appear whole or not at all.
//!
//! The bytes go to a temporary file in the target's own folder, which is then renamed over the target: at every
//! moment, also when the process or the machine dies, the target is the old file or the new one.

mod direct;
mod pages;
mod place;
mod probe;
mod sweep;
mod temp_name;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FlockOperation, Gid, Mode, OFlags, Stat, Uid, fchmod, fchown, flock, fstat, openat, renameat, unlinkat,
};
use rustix::io::{Errno, retry_on_intr};

use self::direct::Direct;
pub(super) use self::direct::aligned_zeros;
use self::pages::OldPages;
use self::place::Place;
use self::probe::reach;
#[doc(hidden)]
pub use self::probe::{Phase, set_probe};
use crate::error::{Error, Result};

/// How often a temporary name may turn out to be taken before the folder is given up.
const NAMES_TRIED: usize = 64;
/// From this size on, what becomes of a file's memory matters.
const LARGE: u64 = 8 << 20;

/// `path` as files of caches are named: `.safetensors` is added to a name that does not end with it.
#[must_use]
pub fn effective_safetensors_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    if !name.as_encoded_bytes().ends_with(b".safetensors") {
        name.push(".safetensors");
    }
    name.into()
}

/// A file being written, which [`commit`](Self::commit) puts in the place of its target; dropped before that, it
/// leaves the target as it was.
///
/// - A link as target is followed: the file it points to is replaced (or made), in its own folder.
/// - A new file gets the mode that the umask leaves of 0666. A replaced one hands on its permission bits and, as far
///   as the system allows, its owner and group; where the group cannot be kept, the new group gets no right that
///   everyone does not have. Access lists, extended attributes and further hard links are not carried over.
/// - Only regular files are replaced.
/// - Of several savers of one target the last to commit wins; every one writes a whole file.
/// - Each saver holds a lock on its temporary file, and first removes those beside it that nobody holds a lock on.
///   A file system without locks is not swept. One whose locks hold on one machine only (some network mounts) must
///   not be saved to from two: a live temporary may be swept there, which fails that save and leaves the old file.
///
/// # Errors
/// All methods fail with [`Error::Io`], which holds the system's error and the target's path as it was given.
#[derive(Debug)]
pub struct AtomicFile {
    /// The target as the caller named it, for errors.
    target: PathBuf,
    /// The same, made independent of the working directory.
    path: PathBuf,
    place: Place,
    temp: OsString,
    file: File,
    old_pages: Option<OldPages>,
    direct: Option<Direct>,
    is_committed: bool,
}

impl AtomicFile {
    /// Starts a new content for `target`, whose folder must exist.
    ///
    /// # Errors
    /// The folder is missing or takes no new file, the links loop, or the target is a folder or a special file.
    pub fn create(target: &Path) -> Result<Self> {
        let fail = |op| move |source| Error::io(op, target, source);
        let path = std::path::absolute(target).map_err(fail("find the folder of"))?;
        let place = Place::find(&path).map_err(fail("find the folder of"))?;
        let old = place.occupant().map_err(|error| fail("replace")(error.into()))?;
        sweep::remove_dead(&place);
        let (temp, file) = make_temporary(&place, old).map_err(fail("create a temporary file for"))?;
        Ok(Self {
            target: target.to_owned(),
            path,
            place,
            temp,
            file,
            old_pages: None,
            direct: None,
            is_committed: false,
        })
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    /// The disk is full, a limit is reached, or the device failed. The file must then be dropped.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        let written = reach(Phase::Write).and_then(|()| self.file.write_all(bytes));
        written.map_err(|source| self.error("write", source))
    }

    /// Makes room on the disk for `n_bytes` in all, zeros until they are [written](Self::write_all_at).
    ///
    /// # Errors
    /// As [`write_all`](Self::write_all), before any byte is written.
    pub fn reserve(&mut self, n_bytes: u64) -> Result<()> {
        let reserved = reach(Phase::Write).and_then(|()| reserve(&self.file, n_bytes));
        reserved.map_err(|source| self.error("write", source))?;
        self.old_pages = if n_bytes < LARGE { None } else { OldPages::find(&self.place) };
        Ok(())
    }

    /// From now on what lies at multiples of 4 KiB, in the file and in memory, is written past the page cache; false if
    /// the file system cannot, and nothing changes.
    pub fn write_past_page_cache(&mut self) -> bool {
        // The name may be another file's by now, if somebody meddles with the folder.
        let is_same = |direct: &Direct| self.place.holds_file(&self.temp, direct.file()).unwrap_or(false);
        let is_ours = self.place.holds_file(&self.temp, &self.file).unwrap_or(false);
        self.direct = Direct::open(&self.place, &self.temp).filter(|direct| is_ours && is_same(direct));
        if self.direct.is_some() {
            // Nothing here wants the memory that they would give up.
            self.old_pages = None;
        }
        self.direct.is_some()
    }

    /// Writes `bytes` at byte `at` of the file. Several threads may, at places of their own.
    ///
    /// # Errors
    /// As [`write_all`](Self::write_all).
    pub fn write_all_at(&self, bytes: &[u8], at: u64) -> Result<()> {
        if let Some(pages) = &self.old_pages {
            pages.give_up(at, bytes.len());
        }
        let written = reach(Phase::Write).and_then(|()| {
            let n_direct = self.direct.as_ref().map_or(Ok(0), |direct| direct.write(bytes, at))?;
            self.file.write_all_at(&bytes[n_direct..], at + n_direct as u64)
        });
        written.map_err(|source| self.error("write", source))
    }

    /// Lets the disk begin with bytes that were written, so that the commit need not wait long for it.
    pub fn start_writeback(&self, at: u64, n_bytes: usize) {
        crate::ffi::start_writeback(self.file.as_fd(), at, n_bytes);
    }

    /// Puts the file in its target's place.
    ///
    /// # Durability
    /// If `durable`, the file survives a crash of the machine from the moment this returns: its bytes are on the
    /// disk before it takes the name, and the name is afterwards. If not, it is whole as long as the machine runs.
    ///
    /// # Errors
    /// The target is then as before and the temporary file is gone. Only if the folder cannot be synced, the last
    /// step, the new file is already in place, whole, but a crash may still bring the old one back.
    pub fn commit(mut self, durable: bool) -> Result<()> {
        // Before the sync, which so covers it too.
        self.take_over_owner_and_mode().map_err(|source| self.error("set the mode of", source))?;
        if durable {
            let synced = reach(Phase::Sync).and_then(|()| Ok(place::sync(&self.file)?));
            synced.map_err(|source| self.error("sync", source))?;
        }
        // Closed here, while the old file has its name and closing it is nothing.
        self.old_pages = None;
        let old = self.rename().map_err(|source| self.error("replace", source))?;
        self.is_committed = true;
        let sync = || reach(Phase::FolderSync).and_then(|()| Ok(self.place.sync(&self.file)?));
        let synced = if durable { sync() } else { Ok(()) };
        // Not before: the sync would wait until the journal has the freed blocks too.
        if let Some(old) = old {
            release(old);
        }
        synced.map_err(|source| self.error("sync the folder of", source))
    }

    fn take_over_owner_and_mode(&self) -> io::Result<()> {
        reach(Phase::Mode)?;
        let Some(old) = self.place.occupant()? else { return Ok(()) };
        let new = fstat(&self.file)?;
        let mut mode = permissions(&old);
        if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid) {
            let (owner, group) = (Some(Uid::from_raw(old.st_uid)), Some(Gid::from_raw(old.st_gid)));
            let is_group_kept = fchown(&self.file, owner, group).or_else(|_| fchown(&self.file, None, group)).is_ok();
            if !is_group_kept {
                mode &= !Mode::RWXG | Mode::from_raw_mode((mode & Mode::RWXO).as_raw_mode() << 3);
            }
        }
        // Not asked for needlessly: file systems without modes refuse it.
        if mode != permissions(&new) {
            fchmod(&self.file, mode)?;
        }
        Ok(())
    }

    /// Gives the replaced file, open: closing it may free all of it.
    fn rename(&self) -> io::Result<Option<OwnedFd>> {
        reach(Phase::Rename)?;
        // The open folder may have been moved away meanwhile: what it then holds is no longer the target.
        if !Place::find(&self.path)?.is_same(&self.place)? {
            return Err(Errno::STALE.into());
        }
        let old = self.place.hold_occupant();
        renameat(&self.place.folder, &self.temp, &self.place.folder, &self.place.name)?;
        Ok(old)
    }

    fn error(&self, op: &'static str, source: io::Error) -> Error {
        Error::io(op, &self.target, source)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.is_committed {
            discard(&self.place, &self.temp);
        }
    }
}

/// Closes the last of a replaced file. Freeing the pages of a large one takes as long as writing it: nobody waits for it.
fn release(old: OwnedFd) {
    let is_large = fstat(&old).is_ok_and(|old| old.st_size as u64 >= LARGE);
    if is_large && let Err(error) = std::thread::Builder::new().spawn(move || drop(old)) {
        tracing::debug!(%error, "a replaced file was closed by its saver");
    }
}

#[cfg(target_os = "linux")]
fn reserve(file: &File, n_bytes: u64) -> io::Result<()> {
    let is_full = [Errno::NOSPC, Errno::DQUOT, Errno::FBIG, Errno::IO];
    let flags = rustix::fs::FallocateFlags::empty();
    match if n_bytes > 0 { retry_on_intr(|| rustix::fs::fallocate(file, flags, 0, n_bytes)) } else { Ok(()) } {
        Err(error) if is_full.contains(&error) => Err(error.into()),
        Err(error) => {
            tracing::debug!(%error, "this file system reserves no room");
            file.set_len(n_bytes)
        }
        Ok(()) => Ok(()),
    }
}

#[cfg(not(target_os = "linux"))]
fn reserve(file: &File, n_bytes: u64) -> io::Result<()> {
    file.set_len(n_bytes)
}

/// A new, locked, empty temporary file for `place`, where `old` lies now.
fn make_temporary(place: &Place, old: Option<Stat>) -> io::Result<(OsString, File)> {
    // Never more open than the file it replaces; the owner must be able to sweep it.
    let mode = old.map_or(Mode::from_raw_mode(0o666), |old| {
        permissions(&old) & Mode::from_raw_mode(0o666) | Mode::RUSR | Mode::WUSR
    });
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for _ in 0..NAMES_TRIED {
        let temp = temp_name::fresh(&place.name);
        reach(Phase::Create)?;
        let file = match retry_on_intr(|| openat(&place.folder, &temp, flags, mode)) {
            Err(Errno::EXIST) => continue,
            file => File::from(file?),
        };
        match claim(place, &temp, &file) {
            Ok(true) => return Ok((temp, file)),
            Ok(false) => {}
            Err(error) => {
                discard(place, &temp);
                return Err(error);
            }
        }
    }
    Err(Errno::EXIST.into())
}

/// Locks the new `file`; false if a sweeper came between and took `temp` for dead.
fn claim(place: &Place, temp: &OsStr, file: &File) -> io::Result<bool> {
    let no_locks = [Errno::NOLCK, Errno::OPNOTSUPP, Errno::NOTSUP, Errno::NOSYS, Errno::INVAL];
    let locked = reach(Phase::Lock).and_then(|()| Ok(flock(file, FlockOperation::NonBlockingLockExclusive)?));
    match locked {
        Ok(()) => Ok(place.holds_file(temp, file)?),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::WOULDBLOCK) => {
                discard(place, temp);
                Ok(false)
            }
            // Sweepers get no lock there either, so the file is safe without.
            Some(errno) if no_locks.contains(&errno) => Ok(true),
            _ => Err(error),
        },
    }
}

fn discard(place: &Place, temp: &OsStr) {
    match unlinkat(&place.folder, temp, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => tracing::warn!(?temp, %error, "could not remove a temporary file"),
    }
}

fn permissions(file: &Stat) -> Mode {
    Mode::from_raw_mode(file.st_mode) & (Mode::RWXU | Mode::RWXG | Mode::RWXO)
}
