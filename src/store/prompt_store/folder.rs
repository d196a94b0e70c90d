//! The store's folder: who may use it, and what lies where.

use super::record::FORMAT;
use crate::error::{Error, Result};
use rustix::fs::{FlockOperation, flock, fstat, stat};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

const RECORDS: &str = "records";
const TEMPORARY: &str = "tmp";
const QUARANTINE: &str = "quarantine";
const OWNERS: &str = "owners";
const INDEX: &str = "index.sqlite3";
const ABOUT: &str = "format";

/// Damaged records that are kept for whoever wants to know.
const MAX_QUARANTINED: usize = 8;
/// Ending of a record's file.
const ENDING: &str = ".safetensors";

/// The folder of a store.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    pub path: PathBuf,
}

impl Folder {
    /// Makes the folder, or checks the one that is there.
    pub fn open(path: &Path, read_only: bool, allow_network_fs: bool) -> Result<Self> {
        let fail = |op| move |source| Error::io(op, path, source);
        if !read_only && !path.is_dir() {
            DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(fail("create"))?;
        }
        let meta = fs::metadata(path).map_err(fail("open"))?;
        if meta.uid() != rustix::process::geteuid().as_raw() {
            let denied = io::Error::new(io::ErrorKind::PermissionDenied, "the folder is someone else's");
            return Err(fail("open the prompt store")(denied));
        }
        if meta.mode() & 0o022 != 0 {
            let denied = io::Error::new(io::ErrorKind::PermissionDenied, "others may write to the folder");
            return Err(fail("open the prompt store")(denied));
        }
        if !allow_network_fs && is_remote(path).map_err(fail("open"))? {
            let text = "the folder is on a network file system, whose locks may not hold (allow_network=True takes it)";
            return Err(fail("open the prompt store")(io::Error::new(io::ErrorKind::Unsupported, text)));
        }
        let folder = Self { path: path.to_owned() };
        folder.check_format(read_only)?;
        if !read_only {
            for name in [RECORDS, TEMPORARY, QUARANTINE, OWNERS] {
                let inner = path.join(name);
                if let Err(error) = DirBuilder::new().mode(0o700).create(&inner)
                    && error.kind() != io::ErrorKind::AlreadyExists
                {
                    return Err(Error::io("create", &inner, error));
                }
            }
        }
        Ok(folder)
    }

    /// A store of a later version is left alone.
    fn check_format(&self, read_only: bool) -> Result<()> {
        let file = self.path.join(ABOUT);
        let text = format!("mlxrs_py prompt store {FORMAT}\n");
        match fs::read_to_string(&file) {
            Ok(found) if found == text => Ok(()),
            Ok(found) if !found.is_empty() => Err(Error::value(
                "PromptStore",
                text.trim_end().to_owned(),
                format!("{:?} in {}", found.trim_end(), file.display()),
            )),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("read", &file, error)),
            _ if read_only => Ok(()),
            // None yet, or one that a crash left empty.
            _ => {
                let temporary = self.path.join(format!("{ABOUT}.{}", random_name()?));
                new_file(&temporary)
                    .and_then(|mut file| file.write_all(text.as_bytes()))
                    .map_err(|error| Error::io("write", &temporary, error))?;
                fs::rename(&temporary, &file).map_err(|error| Error::io("write", &file, error))
            }
        }
    }

    pub fn index(&self) -> PathBuf {
        self.path.join(INDEX)
    }

    pub fn owners(&self) -> PathBuf {
        self.path.join(OWNERS)
    }

    /// The place of a record's file.
    pub fn record(&self, file: &str) -> PathBuf {
        self.path.join(RECORDS).join(&file[..file.len().min(2)]).join(file)
    }

    /// A name for a new file of the record of this key; never one that was there before.
    pub fn new_name(key: &[u8; 32]) -> Result<String> {
        Ok(format!("{}-{}{ENDING}", super::key::hex(key), random_name()?))
    }

    /// True for a name that [`new_name`](Self::new_name) could have made: nothing else is ever removed.
    pub fn is_record_name(name: &str) -> bool {
        let stem = name.strip_suffix(ENDING).and_then(|stem| stem.split_once('-'));
        let is_hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        stem.is_some_and(|(key, random)| key.len() == 64 && random.len() == 16 && is_hex(key) && is_hex(random))
    }

    /// A new temporary file of an owner.
    pub fn temporary(&self, owner: &str) -> Result<(PathBuf, File)> {
        let path = self.path.join(TEMPORARY).join(format!("{owner}-{}", random_name()?));
        let file = new_file(&path).map_err(|error| Error::io("create", &path, error))?;
        Ok((path, file))
    }

    /// Gives a written file its name, and makes both folders' entries durable.
    pub fn place(&self, temporary: &Path, file: &str) -> Result<()> {
        let target = self.record(file);
        let fail = |error| Error::io("write", &target, error);
        let Some(parent) = target.parent() else { return Ok(()) };
        if let Err(error) = DirBuilder::new().mode(0o700).create(parent) {
            if error.kind() != io::ErrorKind::AlreadyExists {
                return Err(fail(error));
            }
        } else {
            sync_folder(&self.path.join(RECORDS)).map_err(fail)?;
        }
        fs::rename(temporary, &target).map_err(fail)?;
        sync_folder(parent).map_err(fail)
    }

    /// Removes a record's file; one that is gone is fine.
    pub fn remove(&self, file: &str) {
        if Self::is_record_name(file)
            && let Err(error) = fs::remove_file(self.record(file))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, file, "a record could not be removed");
        }
    }

    /// Sets a damaged record's file aside; the oldest of too many go.
    pub fn set_aside(&self, file: &str) {
        if !Self::is_record_name(file) {
            return;
        }
        let aside = self.path.join(QUARANTINE);
        if fs::rename(self.record(file), aside.join(file)).is_err() {
            self.remove(file);
        }
        let mut kept: Vec<_> =
            list(&aside).into_iter().filter_map(|(path, meta)| Some((meta.modified().ok()?, path))).collect();
        kept.sort();
        for (_, path) in kept.iter().rev().skip(MAX_QUARANTINED) {
            let _ = fs::remove_file(path);
        }
    }

    /// Names of all records' files, and their bytes.
    pub fn records(&self) -> Vec<(String, u64)> {
        let mut found = Vec::new();
        for (shelf, meta) in list(&self.path.join(RECORDS)) {
            if meta.is_dir() {
                let named = list(&shelf)
                    .into_iter()
                    .filter_map(|(path, meta)| Some((path.file_name()?.to_str()?.to_owned(), meta.len())));
                found.extend(named.filter(|(name, _)| Self::is_record_name(name)));
            }
        }
        found
    }

    /// Temporary files, each with the owner that its name says.
    pub fn temporaries(&self) -> Vec<(PathBuf, String)> {
        let owner = |path: &Path| Some(path.file_name()?.to_str()?.split('-').next()?.to_owned());
        list(&self.path.join(TEMPORARY))
            .into_iter()
            .filter_map(|(path, _)| owner(&path).map(|owner| (path, owner)))
            .collect()
    }

    /// Bytes beside records and temporary files: the index with its log, and what was set aside.
    pub fn overhead(&self) -> u64 {
        let top = list(&self.path).into_iter().filter(|(_, meta)| meta.is_file());
        let aside = list(&self.path.join(QUARANTINE));
        top.chain(aside).map(|(_, meta)| on_disk(meta.len())).sum()
    }

    /// All that the store's files take.
    pub fn n_bytes(&self) -> u64 {
        let records: u64 = self.records().iter().map(|(_, n_bytes)| on_disk(*n_bytes)).sum();
        let temporary: u64 = list(&self.path.join(TEMPORARY)).iter().map(|(_, meta)| on_disk(meta.len())).sum();
        records + temporary + self.overhead()
    }

    /// Bytes and number of what was set aside.
    pub fn quarantined(&self) -> (usize, u64) {
        let aside = list(&self.path.join(QUARANTINE));
        (aside.len(), aside.iter().map(|(_, meta)| meta.len()).sum())
    }
}

/// Bytes that a file of this length takes: whole pages.
pub(super) const fn on_disk(n_bytes: u64) -> u64 {
    n_bytes.next_multiple_of(4096)
}

/// What lies in a folder; nothing if it cannot be read.
fn list(folder: &Path) -> Vec<(PathBuf, fs::Metadata)> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok().and_then(|entry| Some((entry.path(), entry.metadata().ok()?)))).collect()
}

fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Makes a folder's entries durable; a file system that cannot is as durable as it gets.
fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder)?.sync_all() {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        synced => synced,
    }
}

/// 16 hexadecimal digits that nobody else has.
pub(super) fn random_name() -> Result<String> {
    let mut bytes = [0; 8];
    let random = Path::new("/dev/urandom");
    let read = File::open(random).and_then(|mut file| io::Read::read_exact(&mut file, &mut bytes));
    read.map_err(|error| Error::io("read", random, error))?;
    Ok(super::key::hex(&bytes))
}

/// The lock by which an owner is known to live: the file system forgets it with the process.
#[derive(Debug)]
pub(super) struct Owner {
    pub name: String,
    path: PathBuf,
    _lock: File,
}

impl Owner {
    pub fn new(folder: &Folder) -> Result<Self> {
        loop {
            let name = random_name()?;
            let path = folder.owners().join(&name);
            let fail = |error| Error::io("lock", &path, error);
            let lock = new_file(&path).map_err(fail)?;
            flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| fail(error.into()))?;
            // A sweeper may have come between the file and its lock.
            let is_ours = matches!((fstat(&lock), stat(&path)), (Ok(ours), Ok(there)) if ours.st_ino == there.st_ino);
            if is_ours {
                return Ok(Self { name, path, _lock: lock });
            }
        }
    }

    /// Of these owners those that are dead; what marks them is removed.
    pub fn dead(folder: &Folder, mut names: Vec<String>) -> Vec<String> {
        names.extend(
            list(&folder.owners()).into_iter().filter_map(|(path, _)| Some(path.file_name()?.to_str()?.to_owned())),
        );
        names.sort();
        names.dedup();
        names.retain(|name| {
            let path = folder.owners().join(name);
            match File::open(&path) {
                Ok(file) => {
                    let is_dead = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
                    if is_dead {
                        let _ = fs::remove_file(&path);
                    }
                    is_dead
                }
                Err(error) => error.kind() == io::ErrorKind::NotFound,
            }
        });
        names
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// True for file systems whose locks may hold on one machine only.
#[cfg(target_os = "linux")]
fn is_remote(path: &Path) -> io::Result<bool> {
    // NFS, SMB, CIFS, SMB2, 9P, FUSE, Ceph, AFS, Coda, Lustre, GPFS, NCP.
    const REMOTE: [u32; 12] = [
        0x6969,
        0x517B,
        0xFF53_4D42,
        0xFE53_4D42,
        0x0102_1997,
        0x6573_5546,
        0x00C3_6400,
        0x5346_414F,
        0x7375_7245,
        0x0BD0_0BD0,
        0x4750_4653,
        0x564C,
    ];
    let found = rustix::fs::statfs(path)?;
    Ok(REMOTE.contains(&(found.f_type as u32)))
}

#[cfg(not(target_os = "linux"))]
fn is_remote(path: &Path) -> io::Result<bool> {
    let _ = path;
    Ok(false)
}
