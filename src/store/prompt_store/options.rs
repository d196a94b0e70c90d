//! How a store is opened.

use super::BLOCK_TOKENS;
use crate::error::{Error, Result};
use std::path::PathBuf;
use std::str::FromStr;

/// What a folder may take that nobody gave a limit.
pub const DISK_BYTES: u64 = 32 << 30;

/// A way to make records smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compression {
    /// Bytes of equal place in their elements side by side, through zstd.
    Zstd,
}

impl FromStr for Compression {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "zstd" => Ok(Self::Zstd),
            _ => Err(Error::value("open a prompt store", "compression 'zstd', or none", format!("'{name}'"))),
        }
    }
}

/// Where a store lies and how much it may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The folder, made if it is not there; None: the store lives in memory and ends with the process.
    pub path: Option<PathBuf>,
    /// Bytes that records in memory may take. Those that wait to be written count, and may be more.
    pub ram_bytes: u64,
    /// Bytes that the folder may take, all processes together; the folder keeps it for whoever gives none. 0: memory only.
    /// None: what the folder keeps, or else [`DISK_BYTES`]; opening then evicts nothing.
    pub disk_bytes: Option<u64>,
    /// Tokens of a full block.
    pub block_tokens: usize,
    /// Bytes that all processes together may write in a day.
    pub write_bytes_per_day: Option<u64>,
    /// How records are made smaller on the disk. Whatever it is here, all are read.
    pub compression: Option<Compression>,
    /// Nothing is written and nothing is leased; what is put stays in memory.
    pub read_only: bool,
    /// A folder on a network file system is taken too. Its locks must hold across machines.
    pub allow_network_fs: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            path: None,
            ram_bytes: 1 << 30,
            disk_bytes: None,
            block_tokens: BLOCK_TOKENS,
            write_bytes_per_day: None,
            compression: None,
            read_only: false,
            allow_network_fs: false,
        }
    }
}
