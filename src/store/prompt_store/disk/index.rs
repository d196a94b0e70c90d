//! The index: an `SQLite` database that can be lost at any time, since the records say all that matters in it.
//!
//! A new one takes the old one's name while others may have that one open. So every transaction first looks whether the
//! name still is the file it has open, and those that write hold a shared lock on `index.lock`, which whoever puts a new
//! index in place holds alone.

pub use super::folder::Inode;

use super::folder::Folder;
use super::{SHORT, SLOW};
use crate::error::{Error, Result};
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Told in the database's own header.
const APPLICATION: i32 = 0x6d6c_7870;
const VERSION: i32 = 2;
/// Prepared statements that are kept.
const STATEMENTS: usize = 64;

/// `slot` is the beginning of a record's name; `body` and `tokens` are a packed row, under a checksum. The other
/// columns only lead there.
const SCHEMA: &str = "
CREATE TABLE records(slot INTEGER PRIMARY KEY, parent INTEGER NOT NULL, class INTEGER NOT NULL, space INTEGER NOT NULL,
  tokens BLOB NOT NULL, body BLOB NOT NULL);
CREATE INDEX near ON records(parent, class, tokens);
CREATE INDEX states ON records(space) WHERE class = 1;
CREATE TABLE uses(slot INTEGER PRIMARY KEY, nonce INTEGER NOT NULL, size INTEGER NOT NULL, start INTEGER NOT NULL,
  last_used INTEGER NOT NULL, hits INTEGER NOT NULL, pinned INTEGER NOT NULL);
CREATE INDEX oldest ON uses(last_used, start DESC);
CREATE TABLE dying(file TEXT PRIMARY KEY, size INTEGER NOT NULL, owner TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE leases(owner TEXT, lease INTEGER, slot INTEGER, PRIMARY KEY(owner, lease, slot)) WITHOUT ROWID;
CREATE INDEX leased ON leases(slot);
CREATE TABLE reservations(owner TEXT, put INTEGER, size INTEGER NOT NULL, PRIMARY KEY(owner, put)) WITHOUT ROWID;
CREATE TABLE pending(slot INTEGER PRIMARY KEY, owner TEXT NOT NULL);
CREATE TABLE writes(day INTEGER PRIMARY KEY, n_bytes INTEGER NOT NULL);
CREATE TABLE rates(name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
";

/// Tables and indices of the schema.
pub const N_OBJECTS: u64 = 12;

/// Why an index must be built anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// There is none.
    Lost,
    /// This one is not as it was written.
    Of(Inode),
}

impl Damage {
    /// The file that is to be replaced, if there is one.
    pub const fn inode(self) -> Option<Inode> {
        match self {
            Self::Lost => None,
            Self::Of(inode) => Some(inode),
        }
    }
}

/// Bytes of the index's log.
#[derive(Clone, Copy, Debug)]
pub struct LogLimits {
    /// Above, who writes empties it first, if nobody reads.
    pub empty_from: u64,
    /// Above, nothing is written until it is emptied.
    pub most: u64,
}

/// A connection to the index that stands at its name.
#[derive(Debug)]
pub struct Index {
    folder: Folder,
    /// None if it is only read.
    log: Option<LogLimits>,
    lock: Option<File>,
    open: Option<(Connection, Inode)>,
    /// What turned out wrong with it.
    pub damage: Option<Damage>,
}

impl Index {
    /// Opens nothing yet; for reading only if there is no `log`.
    ///
    /// # Errors
    /// [`Error::Io`] if the lock's file cannot be made.
    pub fn new(folder: &Folder, log: Option<LogLimits>) -> Result<Self> {
        let lock = log.map(|_| open_lock(folder)).transpose()?;
        Ok(Self { folder: folder.clone(), log, lock, open: None, damage: None })
    }

    /// Calls `read` with a state of the index that does not change meanwhile.
    ///
    /// # Errors
    /// [`Error::Io`]; `damage` tells whether the index is at fault.
    pub fn read<T>(&mut self, read: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        self.connect()?;
        let Some((connection, inode)) = &mut self.open else { return Err(self.lost()) };
        let inode = *inode;
        let outcome = connection.transaction().and_then(|transaction| read(&transaction));
        outcome.map_err(|error| self.error("read", inode, &error))
    }

    /// Calls `write` alone among all that write; what it did holds if it gives `Ok`. Waits for others at most `timeout`.
    ///
    /// # Errors
    /// [`Error::Io`]; `damage` tells whether the index is at fault.
    pub fn write<T>(
        &mut self,
        timeout: Duration,
        write: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T> {
        let lock = self.lock.take();
        // What can also be done later does not wait while an index is built anew.
        let how = if timeout < SLOW { FlockOperation::NonBlockingLockShared } else { FlockOperation::LockShared };
        let held = lock.as_ref().map(|lock| hold(lock, how, &self.folder)).transpose();
        let outcome = held.and_then(|_| self.write_held(timeout, write));
        if let Some(lock) = &lock {
            let _ = flock(lock, FlockOperation::Unlock);
        }
        self.lock = lock;
        outcome
    }

    fn write_held<T>(
        &mut self,
        timeout: Duration,
        write: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T> {
        self.connect()?;
        let Some((connection, inode)) = &mut self.open else { return Err(self.lost()) };
        let inode = *inode;
        let folder = &self.folder;
        let run = || {
            let transaction = begin(connection, folder, timeout, self.log)?;
            let value = write(&transaction)?;
            transaction.commit()?;
            Ok(value)
        };
        let outcome = run();
        outcome.map_err(|error| self.error("write", inode, &error))
    }

    /// Moves the log into the index and empties it, as far as nobody reads.
    pub fn checkpoint(&mut self) {
        if let Some((connection, inode)) = &self.open
            && let Err(error) = empty_log(connection)
        {
            let inode = *inode;
            let error = self.error("checkpoint", inode, &error);
            tracing::debug!(%error, "the index's log stays for now");
        }
    }

    /// Takes a failure into account that a reader went on after.
    pub fn note(&mut self, error: &rusqlite::Error) {
        if let Some((_, inode)) = &self.open {
            let error = self.error("read", *inode, error);
            tracing::debug!(%error, "a question to the index failed");
        }
    }

    /// Leaves the connection to itself: in a forked child, even closing it would touch the parent's locks.
    pub fn leak(&mut self) {
        std::mem::forget(self.open.take());
        std::mem::forget(self.lock.take());
    }

    /// Makes sure that the open file is the one at the index's name.
    fn connect(&mut self) -> Result<()> {
        let mut now = self.folder.index_inode();
        if now.is_none()
            && let Some(lock) = &self.lock
        {
            // For a moment there is none when a new one is put in place.
            hold(lock, FlockOperation::LockShared, &self.folder)?;
            now = self.folder.index_inode();
            let _ = flock(lock, FlockOperation::Unlock);
        }
        if self.open.as_ref().is_some_and(|(_, inode)| Some(*inode) == now) {
            return Ok(());
        }
        self.open = None;
        let Some(inode) = now else { return Err(self.lost()) };
        match connect(&self.folder.index(), self.log.is_none()) {
            Ok(connection) => {
                self.open = Some((connection, inode));
                Ok(())
            }
            Err(error) => Err(self.error("open", inode, &error)),
        }
    }

    fn lost(&mut self) -> Error {
        self.damage = Some(Damage::Lost);
        Error::io("open", &self.folder.index(), io::ErrorKind::NotFound.into())
    }

    fn error(&mut self, op: &'static str, inode: Inode, error: &rusqlite::Error) -> Error {
        if is_damage(error) {
            self.damage = Some(Damage::Of(inode));
        }
        Error::io(op, &self.folder.index(), system_error(error))
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        // The last to close an index removes its log by name, which must not be the log of a newer index.
        let held = self.lock.as_ref().map(|lock| hold(lock, FlockOperation::LockShared, &self.folder));
        self.open = None;
        drop(held);
    }
}

/// Opens the lock's file.
pub fn open_lock(folder: &Folder) -> Result<File> {
    let path = folder.index_lock();
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    open.map_err(|source| Error::io("lock", &path, source))
}

/// Waits for the lock.
pub fn hold(lock: &File, how: FlockOperation, folder: &Folder) -> Result<()> {
    let held = rustix::io::retry_on_intr(|| flock(lock, how));
    held.map_err(|error| Error::io("lock", &folder.index_lock(), error.into()))
}

/// Begins to write: alone, so that the log's length holds, and not while it is too long. What may wait empties it.
fn begin<'a>(
    connection: &'a mut Connection,
    folder: &Folder,
    timeout: Duration,
    log: Option<LogLimits>,
) -> rusqlite::Result<Transaction<'a>> {
    let is_patient = timeout >= SLOW;
    let end = Instant::now() + timeout;
    let mut is_tried = false;
    loop {
        connection.busy_timeout(timeout)?;
        // Unchecked, since the borrow checker does not see that the loop gives it back.
        let transaction = Transaction::new_unchecked(connection, TransactionBehavior::Immediate)?;
        let size = folder.log_size();
        let fits = |log: LogLimits| size <= log.empty_from || size <= log.most && (is_tried || !is_patient);
        if log.is_none_or(fits) {
            return Ok(transaction);
        }
        drop(transaction);
        if !is_patient || Instant::now() > end {
            let busy = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_BUSY);
            return Err(rusqlite::Error::SqliteFailure(busy, Some("its log is full, and others read it".into())));
        }
        empty_log(connection)?;
        is_tried = true;
    }
}

/// Moves the log into the index and empties it, if those that use either are done soon.
fn empty_log(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(SHORT)?;
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
}

fn connect(path: &Path, read_only: bool) -> rusqlite::Result<Connection> {
    let access = if read_only { OpenFlags::SQLITE_OPEN_READ_ONLY } else { OpenFlags::SQLITE_OPEN_READ_WRITE };
    let flags = access | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let connection = Connection::open_with_flags(path, flags)?;
    settle(&connection)?;
    let number = |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
    if (number("application_id")?, number("user_version")?) != (APPLICATION, VERSION) {
        return Err(rusqlite::Error::InvalidQuery);
    }
    Ok(connection)
}

fn settle(connection: &Connection) -> rusqlite::Result<()> {
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    connection.busy_timeout(Duration::from_secs(5))?;
    // Damage must not make SQLite call functions; the log is moved by the store's own thread; pages are checked.
    connection.execute_batch(
        "PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON; PRAGMA synchronous = NORMAL;
         PRAGMA temp_store = MEMORY; PRAGMA cache_size = -16384; PRAGMA wal_autocheckpoint = 0; PRAGMA mmap_size = 0;",
    )
}

/// Makes a new, empty index at `path` and lets `fill` fill it; it is on the disk when this returns.
///
/// # Errors
/// [`Error::Io`].
pub fn create(path: &Path, fill: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()>) -> Result<()> {
    let run = || {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(path, flags)?;
        // Large enough that the tokens of a block lie within a page.
        connection.execute_batch("PRAGMA page_size = 8192")?;
        connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get::<_, String>(0))?;
        settle(&connection)?;
        connection.execute_batch("PRAGMA synchronous = FULL")?;
        let transaction = connection.transaction()?;
        transaction.execute_batch(SCHEMA)?;
        transaction.pragma_update(None, "application_id", APPLICATION)?;
        transaction.pragma_update(None, "user_version", VERSION)?;
        fill(&transaction)?;
        transaction.commit()?;
        connection.close().map_err(|(_, error)| error)
    };
    let fail = |source| Error::io("create", path, source);
    // Made here, so that nobody else may read it from the first moment on.
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(fail)?;
    run().map_err(|error| fail(system_error(&error)))
}

/// Whether `error` means that the index is not as it was written. What the disk or others cause is none.
pub fn is_damage(error: &rusqlite::Error) -> bool {
    /// A file that is shorter than it says.
    const SHORT_READ: i32 = 0x0a | 2 << 8;
    match error {
        rusqlite::Error::SqliteFailure(failure, _) => {
            failure.extended_code == SHORT_READ
                || !matches!(
                    failure.code,
                    ErrorCode::DatabaseBusy
                        | ErrorCode::DatabaseLocked
                        | ErrorCode::DiskFull
                        | ErrorCode::ReadOnly
                        | ErrorCode::CannotOpen
                        | ErrorCode::OutOfMemory
                        | ErrorCode::SystemIoFailure
                        | ErrorCode::PermissionDenied
                        | ErrorCode::OperationInterrupted
                        | ErrorCode::FileLockingProtocolFailed
                )
        }
        _ => true,
    }
}

/// The system's error that says what `SQLite`'s does.
pub fn system_error(error: &rusqlite::Error) -> io::Error {
    let code = error.sqlite_error_code();
    let errno = match code {
        Some(ErrorCode::DiskFull) => Errno::NOSPC,
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Errno::WOULDBLOCK,
        Some(ErrorCode::ReadOnly) => Errno::ROFS,
        Some(ErrorCode::OutOfMemory) => Errno::NOMEM,
        Some(ErrorCode::SystemIoFailure) => Errno::IO,
        _ => return io::Error::other(format!("the index: {error}")),
    };
    errno.into()
}
