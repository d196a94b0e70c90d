//! Failures of the disk, for tests: a full one at a given write.

use std::io;
use std::sync::atomic::{AtomicI64, Ordering};

static LEFT: AtomicI64 = AtomicI64::new(i64::MAX);

/// After `n` more records every write fails as on a full disk, in the whole process; a negative number ends that.
#[doc(hidden)]
pub fn fail_after(n: i64) {
    LEFT.store(if n < 0 { i64::MAX } else { n }, Ordering::SeqCst);
}

/// A record is about to be written.
pub(super) fn reach() -> io::Result<()> {
    match LEFT.load(Ordering::SeqCst) {
        i64::MAX => Ok(()),
        0 => Err(io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error())),
        left => {
            LEFT.store(left - 1, Ordering::SeqCst);
            Ok(())
        }
    }
}
