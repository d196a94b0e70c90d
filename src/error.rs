//! The one error type of the crate. It knows no Python; `python/errors.rs` maps it.

use std::io;
use std::path::{Path, PathBuf};

/// Result with this crate's [`Error`], unless another is named.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, by who is at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value that the operation cannot take; Python sees `ValueError`.
    #[error("{op}: expected {expected}, got {got}")]
    Value {
        /// The operation, as the caller named it.
        op: &'static str,
        /// What it takes.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// A value of the wrong type; Python sees `TypeError`.
    #[error("{op}: expected {expected}, got {got}")]
    Type {
        /// The operation, as the caller named it.
        op: &'static str,
        /// The type it takes.
        expected: String,
        /// The type it was given.
        got: String,
    },
    /// A place that is not there; Python sees `IndexError`.
    #[error("{op}: expected {expected}, got {got}")]
    Index {
        /// The operation, as the caller named it.
        op: &'static str,
        /// The places there are.
        expected: String,
        /// The one that was asked for.
        got: String,
    },
    /// An operation that must not come now; Python sees `RuntimeError`.
    #[error("{op}: expected {expected}, got {got}")]
    Order {
        /// The operation, as the caller named it.
        op: &'static str,
        /// What must come first.
        expected: String,
        /// Where the object stands.
        got: String,
    },
    /// MLX itself failed; Python sees `MlxError`.
    #[error("{op}: {message}")]
    Mlx {
        /// The operation that called MLX.
        op: &'static str,
        /// MLX's own words.
        message: String,
    },
    /// A cache file that lies or is damaged; Python sees `CacheFormatError`.
    #[error("{}: {key}: expected {expected}, got {got}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The tensor or metadata key, or the part of the file.
        key: String,
        /// What the format asks for.
        expected: String,
        /// What the file holds.
        got: String,
    },
    /// The operating system refused; Python sees the `OSError` family with errno and file name.
    #[error("{op} {}: {source}", path.display())]
    Io {
        /// The step that failed.
        op: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl Error {
    /// A value that `op` cannot take.
    pub fn value(op: &'static str, expected: impl Into<String>, got: impl std::fmt::Display) -> Self {
        Self::Value { op, expected: expected.into(), got: got.to_string() }
    }

    /// A value of a type that `op` cannot take.
    pub fn type_(op: &'static str, expected: impl Into<String>, got: impl std::fmt::Display) -> Self {
        Self::Type { op, expected: expected.into(), got: got.to_string() }
    }

    /// A part of the file at `path` that is not as the format asks.
    pub fn format(path: &Path, key: impl Into<String>, expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self::Format { path: path.to_owned(), key: key.into(), expected: expected.into(), got: got.into() }
    }

    /// The same error once more, for one that is told to several.
    #[must_use]
    pub fn again(&self) -> Self {
        match self {
            Self::Value { op, expected, got } => Self::value(op, expected, got),
            Self::Type { op, expected, got } => Self::type_(op, expected, got),
            Self::Index { op, expected, got } => Self::Index { op, expected: expected.clone(), got: got.clone() },
            Self::Order { op, expected, got } => Self::Order { op, expected: expected.clone(), got: got.clone() },
            Self::Mlx { op, message } => Self::Mlx { op, message: message.clone() },
            Self::Format { path, key, expected, got } => Self::format(path, key, expected, got),
            Self::Io { op, path, source } => {
                let source = match source.raw_os_error() {
                    Some(errno) => io::Error::from_raw_os_error(errno),
                    None => io::Error::new(source.kind(), source.to_string()),
                };
                Self::io(op, path, source)
            }
        }
    }

    /// The system's error at `path`.
    pub fn io(op: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { op, path: path.to_owned(), source }
    }
}
