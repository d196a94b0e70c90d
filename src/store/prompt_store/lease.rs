//! A reader's word that it reads: what is leased is not evicted.

use super::disk::Disk;
use std::sync::Arc;

/// Records that are being read, until this goes; or until the process does.
#[derive(Debug)]
pub(super) struct Lease {
    disk: Arc<Disk>,
    number: i64,
}

impl Lease {
    pub const fn new(disk: Arc<Disk>, number: i64) -> Self {
        Self { disk, number }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.disk.unlease(self.number);
    }
}
