//! The folder of a store: what lies where, who may open it, and what it must not lie on.

use crate::error::{Error, Result};
use rustix::fs::{Mode, mkdir};
use rustix::io::Errno;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The operation that errors name.
const OPEN: &str = "open a prompt store";
const FORMAT: &str = "mlxrs_py prompt store";
/// Version of folders, records and index together.
const VERSION: u64 = 1;
/// What a store's folder holds. The first one tells it from other folders.
const NAMES: [&str; 13] = [
    "format",
    "index.lock",
    "index.sqlite",
    "index.sqlite-wal",
    "index.sqlite-shm",
    "index.new",
    "index.new-journal",
    "records",
    "tmp",
    "owners",
    "quarantine",
    "limit",
    // Of the Python package: hashes of weights.
    "fingerprints.json",
];

/// Device and number of a file.
pub type Inode = (u64, u64);

/// A store's folder, checked.
#[derive(Clone, Debug)]
pub struct Folder {
    root: PathBuf,
}

impl Folder {
    /// Makes the folder if needed (unless `read_only`), and checks owner, rights, file system and format.
    ///
    /// # Errors
    /// [`Error::Value`] for a folder that must not be used, [`Error::Io`] if the system refuses.
    pub fn open(path: &Path, read_only: bool, allow_network_fs: bool) -> Result<Self> {
        let fail = |source| Error::io(OPEN, path, source);
        let root = std::path::absolute(path).map_err(fail)?;
        if root.exists() && !root.is_dir() {
            return Err(Error::io(OPEN, path, Errno::NOTDIR.into()));
        }
        if !read_only {
            DirBuilder::new().recursive(true).mode(0o700).create(&root).map_err(fail)?;
        }
        // Links above the folder are followed once, here.
        let root = fs::canonicalize(&root).map_err(fail)?;
        let folder = Self { root };
        check_rights(&folder.root)?;
        if !allow_network_fs && is_remote(&folder.root).map_err(fail)? {
            let expected = "a folder on a local file system (or allow_network_fs)";
            return Err(folder.refuse(expected, "a network file system"));
        }
        folder.check_format(read_only)?;
        for name in ["records", "tmp", "owners", "quarantine"] {
            let path = folder.root.join(name);
            if !read_only {
                match mkdir(&path, Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(Error::io(OPEN, &path, error.into())),
                }
            }
            if !read_only || path.exists() {
                check_rights(&path)?;
            }
        }
        Ok(folder)
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn index(&self) -> PathBuf {
        self.root.join("index.sqlite")
    }

    /// Which file the index is now.
    pub fn index_inode(&self) -> Option<Inode> {
        fs::symlink_metadata(self.index()).ok().map(|meta| (meta.dev(), meta.ino()))
    }

    /// Where a new index is built.
    pub fn new_index(&self) -> PathBuf {
        self.root.join("index.new")
    }

    pub fn index_lock(&self) -> PathBuf {
        self.root.join("index.lock")
    }

    pub fn records(&self) -> PathBuf {
        self.root.join("records")
    }

    pub fn temporaries(&self) -> PathBuf {
        self.root.join("tmp")
    }

    pub fn owners(&self) -> PathBuf {
        self.root.join("owners")
    }

    pub fn quarantine(&self) -> PathBuf {
        self.root.join("quarantine")
    }

    /// The limit that was given last, if it can be read.
    pub fn limit(&self) -> Option<u64> {
        fs::read_to_string(self.root.join("limit")).ok()?.trim().parse().ok()
    }

    /// Keeps a limit: in a file, since the index may be lost. It is written as `temporary` and appears whole.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn keep_limit(&self, n_bytes: u64, temporary: &str) -> Result<()> {
        let (new, path) = (self.temporaries().join(temporary), self.root.join("limit"));
        let write = || {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            writeln!(file, "{n_bytes}")?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(|source| {
            let _ = fs::remove_file(&new);
            Error::io("write", &path, source)
        })
    }

    /// Bytes of the index and its log.
    pub fn index_size(&self) -> u64 {
        let size = |name: &str| fs::metadata(self.root.join(name)).map_or(0, |meta| meta.len());
        NAMES[2..7].iter().map(|name| super::file::whole_pages(size(name))).sum()
    }

    /// Bytes of the index's log.
    pub fn log_size(&self) -> u64 {
        fs::metadata(self.root.join("index.sqlite-wal")).map_or(0, |meta| meta.len())
    }

    fn check_format(&self, read_only: bool) -> Result<()> {
        let path = self.root.join(NAMES[0]);
        let fail = |source| Error::io(OPEN, &path, source);
        match File::open(&path) {
            Ok(file) => {
                let mut text = String::new();
                file.take(256).read_to_string(&mut text).map_err(fail)?;
                let version = text.trim_end().strip_prefix(FORMAT).and_then(|rest| rest.trim().parse::<u64>().ok());
                match version {
                    Some(VERSION) => return Ok(()),
                    Some(newer) => return Err(self.refuse(format!("format {VERSION}"), format!("format {newer}"))),
                    // A machine that crashed may have left it empty.
                    None if !text.trim().is_empty() => {
                        return Err(self.refuse(format!("'{FORMAT} {VERSION}' in its file format"), "other text"));
                    }
                    None => {}
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(fail(error)),
        }
        for entry in fs::read_dir(&self.root).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            if !NAMES.iter().any(|known| *known == name) {
                return Err(
                    self.refuse("an empty folder or a prompt store", format!("a folder with {}", name.display()))
                );
            }
        }
        if !read_only {
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path).map_err(fail)?;
            writeln!(file, "{FORMAT} {VERSION}").and_then(|()| file.sync_all()).map_err(fail)?;
        }
        Ok(())
    }

    fn refuse(&self, expected: impl Into<String>, got: impl std::fmt::Display) -> Error {
        refuse(&self.root, expected, got)
    }
}

/// The store must be the user's own, and nobody else may write to it.
fn check_rights(path: &Path) -> Result<()> {
    let meta = fs::symlink_metadata(path).map_err(|source| Error::io(OPEN, path, source))?;
    let user = rustix::process::geteuid().as_raw();
    if !meta.is_dir() {
        return Err(Error::io(OPEN, path, Errno::NOTDIR.into()));
    }
    if meta.uid() != user {
        return Err(refuse(path, format!("a folder of user {user}"), format!("one of user {}", meta.uid())));
    }
    if meta.mode() & 0o022 != 0 {
        let got = format!("one with mode {:o}", meta.mode() & 0o7777);
        return Err(refuse(path, "a folder that only its owner may write to", got));
    }
    Ok(())
}

fn refuse(path: &Path, expected: impl Into<String>, got: impl std::fmt::Display) -> Error {
    Error::value(OPEN, expected, format!("{got} ({})", path.display()))
}

/// Bytes of the files right in `folder`.
pub fn files_size(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|meta| super::file::whole_pages(meta.len())).sum()
}

/// Whether `path` lies on another machine's disk, or may: locks and shared memory are not to be trusted there.
#[cfg(target_os = "linux")]
fn is_remote(path: &Path) -> io::Result<bool> {
    /// NFS, SMB, SMB 2, CIFS, FUSE (most are remote), 9P, AFS, kAFS, Ceph, Coda, NCP, Lustre, GPFS, `BeeGFS`, OCFS2, GFS2.
    const REMOTE: [u32; 16] = [
        0x6969,
        0x517b,
        0xfe53_4d42,
        0xff53_4d42,
        0x6573_5546,
        0x0102_1997,
        0x5346_414f,
        0x6b41_4653,
        0x00c3_6400,
        0x7375_7245,
        0x564c,
        0x0bd0_0bd0,
        0x4750_4653,
        0x1983_0326,
        0x7461_636f,
        0x0116_1970,
    ];
    Ok(REMOTE.contains(&(rustix::fs::statfs(path)?.f_type as u32)))
}

/// Whether `path` lies on another machine's disk.
#[cfg(target_vendor = "apple")]
fn is_remote(path: &Path) -> io::Result<bool> {
    const MNT_LOCAL: u32 = 0x1000;
    Ok(rustix::fs::statfs(path)?.f_flags & MNT_LOCAL == 0)
}

/// Elsewhere nothing tells.
#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
fn is_remote(_path: &Path) -> io::Result<bool> {
    Ok(false)
}
