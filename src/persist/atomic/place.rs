//! Where a file really lies: the open folder and the name in it, links followed.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, fstat, fsync, openat, readlinkat, stat, statat};
use rustix::io::{Errno, retry_on_intr};

/// As many links as Linux follows in one path.
const MAX_LINKS: usize = 40;

/// A name in an open folder. The folder stays the same one, whatever becomes of its path.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) folder: OwnedFd,
    pub(super) name: OsString,
    /// False where files may be made but not listed: then the folder cannot be swept, nor synced by itself.
    can_list: bool,
}

impl Place {
    /// Follows `path` to the file, which need not exist, that a plain write would change.
    pub(super) fn find(path: &Path) -> io::Result<Self> {
        // The system walks first: it knows loops, and links in shared folders that must not be followed.
        match stat(path) {
            Ok(_) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let (parent, name) = split(path.as_os_str())?;
        let mut place = Self::open(CWD, parent, name)?;
        for _ in 0..MAX_LINKS {
            let link = match readlinkat(&place.folder, &place.name, Vec::new()) {
                Ok(link) => OsString::from_vec(link.into_bytes()),
                // Not a link, or nothing there yet.
                Err(Errno::INVAL | Errno::NOENT) => return Ok(place),
                Err(error) => return Err(error.into()),
            };
            let (parent, name) = split(&link)?;
            place = Self::open(place.folder.as_fd(), parent, name)?;
        }
        Err(Errno::LOOP.into())
    }

    fn open(base: BorrowedFd<'_>, parent: &OsStr, name: &OsStr) -> rustix::io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |access| retry_on_intr(|| openat(base, parent, flags | access, Mode::empty()));
        let (folder, can_list) = match open(OFlags::RDONLY) {
            #[cfg(target_os = "linux")]
            Err(Errno::ACCESS) => (open(OFlags::PATH)?, false),
            folder => (folder?, true),
        };
        Ok(Self { folder, name: name.to_owned(), can_list })
    }

    /// The regular file that lies here now, if anything does; another kind of file is never replaced.
    pub(super) fn occupant(&self) -> rustix::io::Result<Option<Stat>> {
        match statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(None),
            found => {
                let found = found?;
                match FileType::from_raw_mode(found.st_mode) {
                    FileType::RegularFile => Ok(Some(found)),
                    FileType::Directory => Err(Errno::ISDIR),
                    _ => Err(Errno::OPNOTSUPP),
                }
            }
        }
    }

    /// Keeps what lies here alive without a name; None if nothing does, or if it cannot be had.
    pub(super) fn hold_occupant(&self) -> Option<OwnedFd> {
        // Needs no right to read, and waits for nobody.
        #[cfg(target_os = "linux")]
        let access = OFlags::PATH;
        #[cfg(not(target_os = "linux"))]
        let access = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let flags = access | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&self.folder, &self.name, flags, Mode::empty()).ok()
    }

    /// Whether `name` in this folder is the open, regular `file`.
    pub(super) fn holds_file(&self, name: &OsStr, file: impl AsFd) -> rustix::io::Result<bool> {
        let file = fstat(file)?;
        match statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(false),
            found => Ok(same_file(&found?, &file) && FileType::from_raw_mode(file.st_mode) == FileType::RegularFile),
        }
    }

    /// Whether `other` is the same name in the same folder.
    pub(super) fn is_same(&self, other: &Self) -> rustix::io::Result<bool> {
        Ok(self.name == other.name && same_file(&fstat(&self.folder)?, &fstat(&other.folder)?))
    }

    /// Brings the folder's entries to the disk; `file` is one of its files.
    pub(super) fn sync(&self, file: impl AsFd) -> rustix::io::Result<()> {
        if !self.can_list {
            return sync_file_system(file);
        }
        match sync(&self.folder) {
            // Some network file systems have no such call; their servers order names by themselves.
            Err(error) if [Errno::INVAL, Errno::NOTSUP].contains(&error) => {
                tracing::debug!(%error, "this file system cannot sync a folder");
                Ok(())
            }
            synced => synced,
        }
    }
}

/// Brings what `fd` is open on to the disk itself, past the disk's cache too.
pub(super) fn sync(fd: impl AsFd) -> rustix::io::Result<()> {
    #[cfg(target_vendor = "apple")]
    match retry_on_intr(|| rustix::fs::fcntl_fullfsync(&fd)) {
        // Not every file system there has it.
        Err(error) if [Errno::INVAL, Errno::NOTSUP, Errno::NOTTY].contains(&error) => {}
        synced => return synced,
    }
    retry_on_intr(|| fsync(&fd))
}

#[cfg(target_os = "linux")]
fn sync_file_system(file: impl AsFd) -> rustix::io::Result<()> {
    rustix::fs::syncfs(file)
}

#[cfg(not(target_os = "linux"))]
fn sync_file_system(file: impl AsFd) -> rustix::io::Result<()> {
    sync(file)
}

fn same_file(a: &Stat, b: &Stat) -> bool {
    (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
}

/// Folder and file name of `path`, byte by byte: `Path` would take `x/` for a file named `x`.
fn split(path: &OsStr) -> rustix::io::Result<(&OsStr, &OsStr)> {
    let bytes = path.as_bytes();
    let (folder, name) = match bytes.iter().rposition(|&byte| byte == b'/') {
        Some(0) => (&b"/"[..], &bytes[1..]),
        Some(slash) => (&bytes[..slash], &bytes[slash + 1..]),
        None => (&b"."[..], bytes),
    };
    if matches!(name, b"" | b"." | b"..") {
        return Err(Errno::ISDIR);
    }
    Ok((OsStr::from_bytes(folder), OsStr::from_bytes(name)))
}
