//! The two ways in which mlx-lm lays caches out in a safetensors file: pure, without files and arrays.
//!
//! Either is a mapping between cache states with user metadata, and named tensors with a flat map of strings. Which
//! one a file uses is seen from its metadata. Reading follows the [`schema`]: every tensor and every string must be
//! asked for by a class, so nothing in a file is ignored and the work is bounded by what the file holds.

mod source;
mod v031;
mod v032;

use super::header::{Header, TensorInfo};
use crate::array::Dtype;
use crate::cache::schema::{self, Described, Fault};
use crate::cache::state::CacheState;
use crate::error::{Error, Result};
pub use source::MAX_TEXT;
use source::Source;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// The operation that errors of [`encode`] name.
const SAVE: &str = "save_prompt_cache";

/// How caches are laid out, named after the mlx-lm that writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// mlx-lm 0.31: valid rows and strings.
    V031,
    /// mlx-lm 0.32: the whole state as tensors.
    #[default]
    V032,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V031 => "0.31",
            Self::V032 => "0.32",
        })
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "0.31" => Ok(Self::V031),
            "0.32" => Ok(Self::V032),
            other => Err(Error::value("format", "'0.32' or '0.31'", format!("'{other}'"))),
        }
    }
}

/// A tensor to write: one of the caller's, or a small one that stands for a number or a text.
#[derive(Clone, Debug, PartialEq)]
pub enum Leaf<T> {
    /// The caller's array.
    Array(T),
    /// Bytes, little-endian.
    Scalar {
        /// Element type.
        dtype: Dtype,
        /// `()` for a number, `(n,)` for a text of n code points, `(0,)` for none.
        shape: Vec<usize>,
        /// The elements.
        bytes: Vec<u8>,
    },
}

impl<T> Leaf<T> {
    /// The caller's array, if it is one.
    pub(super) const fn array(&self) -> Option<&T> {
        match self {
            Self::Array(array) => Some(array),
            Self::Scalar { .. } => None,
        }
    }

    /// What both formats write for "nothing here": no elements.
    fn nothing() -> Self {
        Self::Scalar { dtype: Dtype::F32, shape: vec![0], bytes: Vec::new() }
    }
}

impl<T: Described> Described for Leaf<T> {
    fn shape(&self) -> Vec<usize> {
        match self {
            Self::Array(array) => array.shape(),
            Self::Scalar { shape, .. } => shape.clone(),
        }
    }

    fn dtype(&self) -> Dtype {
        match self {
            Self::Array(array) => array.dtype(),
            Self::Scalar { dtype, .. } => *dtype,
        }
    }
}

/// All that a file holds, in the order in which the data is to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoded<T> {
    /// Tensors by key. Wide types come first, so that each begins at a multiple of its element size.
    pub tensors: Vec<(String, Leaf<T>)>,
    /// The strings of the header.
    pub metadata: BTreeMap<String, String>,
}

/// All that a file says, checked: the arrays may be built without further doubt.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    /// How the file is laid out.
    pub format: Format,
    /// One cache per layer; the arrays are still in the file.
    pub layers: Vec<CacheState<TensorInfo>>,
    /// The user's strings. What mlx-lm nested keeps its dotted keys.
    pub metadata: BTreeMap<String, String>,
}

impl<T> Encoded<T> {
    const fn new() -> Self {
        Self { tensors: Vec::new(), metadata: BTreeMap::new() }
    }
}

/// Lays caches and user metadata out. In format 0.31 counts follow from the rows, so the arrays must be cut to the
/// valid ones.
///
/// # Errors
/// [`Error::Value`] if a state is not one of its class, if the format cannot say it, or for metadata that
/// [`check_metadata`] refuses.
pub fn encode<T: Described>(
    format: Format,
    layers: Vec<CacheState<T>>,
    user: &BTreeMap<String, String>,
) -> Result<Encoded<T>> {
    check_metadata(user)?;
    lay_out(format, layers, user)
}

/// As [`encode`], with metadata that came out of a file: keys that mlx-lm nested are dotted.
///
/// # Errors
/// As [`encode`]; metadata is only refused if the file would then not be told from another.
pub(super) fn lay_out<T: Described>(
    format: Format,
    layers: Vec<CacheState<T>>,
    user: &BTreeMap<String, String>,
) -> Result<Encoded<T>> {
    schema::check_layers(&layers).map_err(|fault| in_memory(&fault))?;
    let mut encoded = match format {
        Format::V031 => v031::encode(layers, user)?,
        Format::V032 => v032::encode(layers, user),
    };
    if let Some((key, _)) = encoded.tensors.iter().find(|(_, leaf)| leaf.dtype() == Dtype::F64) {
        return Err(Error::value(SAVE, format!("{key} of a type that MLX's files hold"), "F64"));
    }
    if detect(&encoded.metadata, encoded.tensors.is_empty()) != Ok(format) {
        let expected = format!("metadata with plain keys, as there are no caches to tell format {format} by");
        return Err(Error::value(SAVE, expected, format!("{:?}", user.keys().collect::<Vec<_>>())));
    }
    encoded.tensors.sort_by_key(|(_, leaf)| std::cmp::Reverse(leaf.dtype().size()));
    Ok(encoded)
}

/// A fault of a state that came from memory.
fn in_memory(fault: &Fault) -> Error {
    Error::value(SAVE, format!("layer {}: {}", fault.key, fault.expected), &fault.got)
}

/// Reads caches and user metadata out of the header of the file at `path`.
///
/// `read` gives the bytes of a tensor; it is only asked for numbers and texts: class names of at most [`MAX_TEXT`] elements, and those of
/// registered classes.
///
/// # Errors
/// [`Error::Format`] for the first thing that is not as the format asks, or the error of `read`.
pub fn decode(path: &Path, header: &Header, read: &mut dyn FnMut(&TensorInfo) -> Result<Vec<u8>>) -> Result<Decoded> {
    let format = detect(&header.metadata, header.tensors.is_empty()).map_err(|fault| fault.in_file(path))?;
    let mut source = Source::new(path, header, read);
    let (metadata, layers) = match format {
        Format::V031 => (source.take_group("1."), v031::decode(&mut source)?),
        Format::V032 => (source.take_group("0."), v032::decode(&mut source)?),
    };
    source.finish()?;
    schema::check_layers(&layers).map_err(|mut fault| {
        if format == Format::V031 {
            fault.key = v031::key_of(&layers, &fault.key);
        }
        fault.in_file(path)
    })?;
    Ok(Decoded { format, layers, metadata })
}

/// Which format a file uses; `no_tensors` tells a file without layers from one that holds something else.
///
/// # Errors
/// A fault if the metadata is that of neither.
pub fn detect(metadata: &BTreeMap<String, String>, no_tensors: bool) -> Result<Format, Fault> {
    match metadata.get("2.0").map(String::as_str) {
        Some("") => Ok(Format::V032),
        Some(_) => Ok(Format::V031),
        // Format 0.31 without layers has nothing but the user's strings, if any.
        None if no_tensors && metadata.keys().all(|key| key.strip_prefix("1.").is_some_and(is_plain)) => {
            Ok(Format::V031)
        }
        None => Err(Fault::new("__metadata__.2.0", "'' or a class name: the mark of a prompt cache", "nothing")),
    }
}

/// Checks that keys of user metadata survive: mlx-lm takes dots for nesting and numbers for places in a list.
///
/// # Errors
/// [`Error::Value`] for a key that is empty, numeric or dotted.
pub fn check_metadata(user: &BTreeMap<String, String>) -> Result<()> {
    match user.keys().find(|key| !is_plain(key)) {
        Some(key) => {
            Err(Error::value(SAVE, "metadata keys that are neither empty nor numeric nor dotted", format!("{key:?}")))
        }
        None => Ok(()),
    }
}

/// True if a metadata key comes back as it was. Python's `int` takes signs, spaces, `_` and digits of any script.
fn is_plain(key: &str) -> bool {
    let numeric = |c: char| c.is_numeric() || c.is_whitespace() || matches!(c, '+' | '-' | '_');
    let number = key.chars().all(numeric) && key.chars().any(char::is_numeric);
    !(key.is_empty() || key.contains('.') || number)
}
