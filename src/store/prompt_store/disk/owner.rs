//! Who uses a store: every open store holds a lock on a file of its own. A process id would tell nothing: ids are
//! reused, and containers have their own.

use super::folder::Folder;
use crate::error::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const ENDING: &str = ".lock";
/// How often a new lock may be swept by others before it is held.
const TRIES: usize = 64;

/// A random number: each hasher has new keys.
pub fn random() -> u64 {
    RandomState::new().hash_one(std::process::id())
}

/// This store among all that are open on the folder.
#[derive(Debug)]
pub struct Owner {
    pub name: String,
    path: PathBuf,
    _lock: File,
}

impl Owner {
    pub fn claim(folder: &Folder) -> Result<Self> {
        for _ in 0..TRIES {
            let name = format!("{:016x}", random());
            let path = folder.owners().join(format!("{name}{ENDING}"));
            let fail = |source| Error::io("lock", &path, source);
            let lock = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(fail)?;
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                // A sweeper may have come between.
                Ok(()) if is_same(&path, &lock) => return Ok(Self { name, path, _lock: lock }),
                Ok(()) | Err(Errno::WOULDBLOCK) => {}
                Err(error) => return Err(fail(error.into())),
            }
        }
        Err(Error::io("lock", &folder.owners(), io::ErrorKind::WouldBlock.into()))
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // Whatever is left is swept by the next one.
        let _ = fs::remove_file(&self.path);
    }
}

/// An owner that is no more. Its lock is held, so that nobody else sweeps it.
#[derive(Debug)]
pub struct Dead {
    pub name: String,
    path: PathBuf,
    _lock: Option<File>,
}

impl Dead {
    /// Takes the lock's file away, the last step of sweeping.
    pub fn forget(self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The owner `name`, if it is dead.
pub fn dead(folder: &Folder, name: &str) -> Option<Dead> {
    let path = folder.owners().join(format!("{name}{ENDING}"));
    let lock = match OpenOptions::new().write(true).open(&path) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Some(Dead { name: name.to_owned(), path, _lock: None });
        }
        Err(_) => return None,
    };
    let is_mine = flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() && is_same(&path, &lock);
    is_mine.then(|| Dead { name: name.to_owned(), path, _lock: Some(lock) })
}

/// All owners with a lock's file.
pub fn names(folder: &Folder) -> Vec<String> {
    let entries = fs::read_dir(folder.owners()).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(ENDING)?.to_owned())).collect()
}

fn is_same(path: &Path, file: &File) -> bool {
    let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
    fs::symlink_metadata(path).ok().map(id) == file.metadata().ok().map(id)
}
