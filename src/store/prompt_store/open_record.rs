//! A record that can be read.

use super::disk::FileSource;
use super::record::Record;
use crate::array::Dtype;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// A tensor of an open record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordTensor {
    /// Element type.
    pub dtype: Dtype,
    /// Length of every axis.
    pub shape: Vec<usize>,
    /// Where its bytes begin among the record's, as [`OpenRecord::read_into`] counts them.
    pub start: u64,
    /// Number of bytes.
    pub n_bytes: u64,
    /// [`checksum`](super::checksum) of the bytes, which whoever reads them must compare.
    pub checksum: u64,
}

/// A record whose header has been checked. Nothing evicts it while it is open.
#[derive(Debug)]
pub struct OpenRecord {
    /// What was put with it.
    pub layout: String,
    /// The tensors by name.
    pub tensors: BTreeMap<String, RecordTensor>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Ram(Arc<Record>),
    File(FileSource),
}

impl OpenRecord {
    pub(super) fn in_memory(record: Arc<Record>) -> Self {
        let tensors = record.tensors.iter().map(|tensor| {
            let (dtype, shape, start) = (tensor.dtype, tensor.shape.clone(), tensor.start);
            let n_bytes = tensor.bytes.len() as u64;
            (tensor.name.clone(), RecordTensor { dtype, shape, start, n_bytes, checksum: tensor.checksum() })
        });
        Self { layout: record.layout.clone(), tensors: tensors.collect(), source: Source::Ram(record) }
    }

    pub(super) fn in_file(layout: String, tensors: BTreeMap<String, RecordTensor>, source: FileSource) -> Self {
        Self { layout, tensors, source: Source::File(source) }
    }

    /// Fills `buffer` with the bytes from `at` on. Several threads may read at once.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses, [`Error::Format`] if the record ends before or is damaged; the buffer may then
    /// be filled in part.
    pub fn read_into(&self, buffer: &mut [u8], at: u64) -> Result<()> {
        match &self.source {
            Source::Ram(record) => copy(record, buffer, at),
            Source::File(file) => file.read_into(buffer, at),
        }
    }

    /// All bytes of `tensor`.
    ///
    /// # Errors
    /// As [`read_into`](Self::read_into).
    pub fn read(&self, tensor: &RecordTensor) -> Result<Vec<u8>> {
        let mut bytes = vec![0; tensor.n_bytes as usize];
        self.read_into(&mut bytes, tensor.start)?;
        Ok(bytes)
    }

    /// The bytes of `range` where they lie in memory, if they do and belong to one tensor.
    pub fn bytes(&self, range: Range<u64>) -> Option<&[u8]> {
        let Source::Ram(record) = &self.source else { return None };
        record.tensors.iter().find_map(|tensor| {
            let start = usize::try_from(range.start.checked_sub(tensor.start)?).ok()?;
            let end = usize::try_from(range.end.checked_sub(tensor.start)?).ok()?;
            tensor.bytes.get(start..end)
        })
    }
}

/// Fills `buffer` with the bytes of `record` from `at` on.
fn copy(record: &Record, mut buffer: &mut [u8], mut at: u64) -> Result<()> {
    for tensor in &record.tensors {
        let Some(skipped) = at.checked_sub(tensor.start) else { continue };
        let Some(bytes) = tensor.bytes.get(skipped as usize..).filter(|bytes| !bytes.is_empty()) else { continue };
        let n_bytes = bytes.len().min(buffer.len());
        let (filled, rest) = buffer.split_at_mut(n_bytes);
        filled.copy_from_slice(&bytes[..n_bytes]);
        buffer = rest;
        at += n_bytes as u64;
        if buffer.is_empty() {
            return Ok(());
        }
    }
    if buffer.is_empty() { Ok(()) } else { Err(too_short(buffer.len(), at)) }
}

fn too_short(n_bytes: usize, at: u64) -> Error {
    Error::format(Path::new("record in memory"), "data", format!("{n_bytes} bytes at {at}"), "the end of the record")
}
