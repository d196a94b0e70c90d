//! Brings a cache file from one format into another: its header and its bytes, without building an array.

use super::atomic::{AtomicFile, effective_safetensors_path};
use super::header::{self, TensorInfo};
use super::reader::{CacheFile, Data};
use super::wire::{self, Decoded, Encoded, Format, Leaf};
use super::writer::Saved;
use crate::array::Dtype;
use crate::cache::schema::{self, Described, Rows};
use crate::error::{Error, Result};
use std::convert::Infallible;
use std::path::Path;

/// The operation that errors name.
const CONVERT: &str = "convert";

/// A tensor of a file without the padding behind its valid rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CutTensor {
    info: TensorInfo,
    shape: Vec<usize>,
}

impl CutTensor {
    fn new(info: TensorInfo, rows: Option<Rows>) -> Self {
        let mut shape = info.shape.clone();
        if let (Some(rows), Some(len)) = (rows, shape.get_mut(2)) {
            *len = rows.valid;
        }
        Self { info, shape }
    }

    /// Where its bytes lie in the data of the file, in order: the first one and their number.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> {
        let info = &self.info;
        let whole = self.shape == info.shape;
        // Axes 0 and 1 stand before the rows.
        let n_runs = if whole { 1 } else { self.shape[..2].iter().product::<usize>() as u64 };
        let step = info.n_bytes() / n_runs.max(1);
        let size = if whole { step } else { step / info.shape[2] as u64 * self.shape[2] as u64 };
        (0..n_runs).map(move |run| (info.start + run * step, size)).filter(|&(_, size)| size > 0)
    }
}

impl Described for CutTensor {
    fn shape(&self) -> Vec<usize> {
        self.shape.clone()
    }

    fn dtype(&self) -> Dtype {
        self.info.dtype
    }
}

/// What a file says, laid out in the format `to`, valid rows only; pure.
///
/// # Errors
/// [`Error::Value`] if `to` cannot say it.
pub fn recast(decoded: Decoded, to: Format) -> Result<Encoded<CutTensor>> {
    let mut cut = |info, rows| Ok::<_, Infallible>(CutTensor::new(info, rows));
    let cut = decoded.layers.into_iter().map(|cache| match schema::map_arrays(cache, &mut cut) {
        Ok(cache) => cache,
    });
    wire::lay_out(to, cut.collect(), &decoded.metadata).map_err(|error| match error {
        Error::Value { expected, got, .. } => Error::Value { op: CONVERT, expected, got },
        other => other,
    })
}

/// Writes the caches and the metadata of the file `from` into the file `to` in another format, or the same. The new file
/// holds the valid rows only and appears whole or not at all; `to` may be `from`.
///
/// # Errors
/// As [`CacheFile::open`] for `from`; [`Error::Value`] if `format` cannot say what the file holds; [`Error::Io`].
pub fn convert(from: &Path, to: &Path, format: Format, durable: bool) -> Result<Saved> {
    let (decoded, data) = CacheFile::open(from)?.into_parts();
    let encoded = recast(decoded, format)?;
    write(to, &encoded, durable, &data)
}

/// Puts a file in place, atomically, with the bytes of another one.
fn write(path: &Path, encoded: &Encoded<CutTensor>, durable: bool, data: &Data) -> Result<Saved> {
    let head = header::build(&encoded.tensors, &encoded.metadata)?;
    let path = effective_safetensors_path(path);
    let mut file = AtomicFile::create(&path)?;
    let mut n_bytes = head.len() as u64;
    file.write_all(&head)?;
    let mut write = |bytes: &[u8]| {
        n_bytes += bytes.len() as u64;
        file.write_all(bytes)
    };
    for (_, leaf) in &encoded.tensors {
        match leaf {
            Leaf::Array(tensor) => {
                tensor.runs().try_for_each(|(start, n_bytes)| data.copy(start, n_bytes, &mut write))?;
            }
            Leaf::Scalar { bytes, .. } => write(bytes)?,
        }
    }
    file.commit(durable)?;
    Ok(Saved { path, n_bytes })
}
