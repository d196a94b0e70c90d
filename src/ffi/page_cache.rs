//! What the system keeps of a file in memory: Linux's calls that rustix lacks.

use std::os::fd::BorrowedFd;

/// Starts bringing `n_bytes` from byte `at` on to the disk and does not wait. A refusal costs time only: whoever needs
/// them there syncs the file.
#[cfg(target_os = "linux")]
pub(crate) fn start_writeback(file: BorrowedFd<'_>, at: u64, n_bytes: usize) {
    use std::os::fd::AsRawFd;
    let write = libc::SYNC_FILE_RANGE_WRITE;
    // SAFETY: an open file and numbers; the call touches no memory of ours.
    let status = unsafe { libc::sync_file_range(file.as_raw_fd(), at as i64, n_bytes as i64, write) };
    if status != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "no early writing to the disk");
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn start_writeback(_file: BorrowedFd<'_>, _at: u64, _n_bytes: usize) {}

/// True if pages of the file are in memory and every one of them is on the disk as well. False where the system does not
/// tell: before Linux 6.5, and elsewhere.
#[cfg(target_os = "linux")]
pub(crate) fn is_cached_and_clean(file: BorrowedFd<'_>) -> bool {
    use std::os::fd::AsRawFd;
    // The same on every architecture that MLX runs on.
    const CACHESTAT: libc::c_long = 451;
    // Offset and length, 0 for all; pages in memory, dirty, being written, evicted, evicted lately.
    let (range, mut found) = ([0_u64; 2], [0_u64; 5]);
    // SAFETY: an open file; the call reads two words from the one array and writes five into the other.
    let status = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), found.as_mut_ptr(), 0) };
    let [cached, dirty, being_written, ..] = found;
    status == 0 && cached > 0 && dirty == 0 && being_written == 0
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn is_cached_and_clean(_file: BorrowedFd<'_>) -> bool {
    false
}
