//! A record as a file: valid safetensors, sealed.
//!
//! One string of metadata says all but the tensors' places. The last tensor, `seal`, is the BLAKE3 hash of all bytes
//! before the data, and every other tensor has a checksum there: a flipped bit is found wherever it lies.

use crate::array::Dtype;
use crate::cache::schema::Described;
use crate::error::{Error, Result};
use crate::persist::header::{self, Header, PREFIX_SIZE};
use crate::store::prompt_store::key::{RecordId, Space};
use crate::store::prompt_store::open_record::RecordTensor;
use crate::store::prompt_store::record::{Entry, Record, RecordKind, SEAL};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Key of the metadata.
const KEY: &str = "mlxrs_py_record";
/// Version of what the metadata says.
const VERSION: u64 = 1;
/// Bytes of the seal.
const SEAL_SIZE: usize = 32;
/// Files take whole pages on the disk.
const PAGE: u64 = 4096;

/// What a header needs to know of a tensor.
struct Shape(Dtype, Vec<usize>);

impl Described for Shape {
    fn shape(&self) -> Vec<usize> {
        self.1.clone()
    }

    fn dtype(&self) -> Dtype {
        self.0
    }
}

/// The bytes before the data and after it.
pub struct Frame {
    pub head: Vec<u8>,
    pub seal: [u8; SEAL_SIZE],
}

impl Frame {
    /// Bytes that the file of `record` takes, in whole pages.
    pub fn size(&self, record: &Record) -> u64 {
        whole_pages(self.head.len() as u64 + record.entry.n_bytes + self.seal.len() as u64)
    }
}

/// `n_bytes` as a file takes them.
pub const fn whole_pages(n_bytes: u64) -> u64 {
    n_bytes.next_multiple_of(PAGE)
}

/// What stands around the tensors of `record`, which are checksummed here.
///
/// # Errors
/// [`Error::Value`] if the header would be too long.
pub fn frame(record: &Record) -> Result<Frame> {
    let Entry { id, parent, space, kind, start, tokens, grid, complete_from, keep, .. } = &record.entry;
    let checksums: BTreeMap<_, _> =
        record.tensors.iter().map(|tensor| (&tensor.name, format!("{:016x}", tensor.checksum()))).collect();
    let kind = kind_name(*kind);
    let text = json!({
        "version": VERSION, "key": id.to_string(), "parent": parent.to_string(), "space": space.to_string(),
        "kind": kind, "start": start, "tokens": tokens, "grid": grid, "complete_from": complete_from, "keep": keep,
        "layout": record.layout, "checksums": checksums,
    });
    let metadata = BTreeMap::from([(KEY.to_owned(), text.to_string())]);
    let mut tensors: Vec<_> =
        record.tensors.iter().map(|tensor| (tensor.name.clone(), Shape(tensor.dtype, tensor.shape.clone()))).collect();
    tensors.push((SEAL.to_owned(), Shape(Dtype::U8, vec![SEAL_SIZE])));
    let head = header::build(&tensors, &metadata)?;
    let seal = *blake3::hash(&head).as_bytes();
    Ok(Frame { head, seal })
}

const fn kind_name(kind: RecordKind) -> &'static str {
    match kind {
        RecordKind::Rows => "rows",
        RecordKind::State => "state",
    }
}

/// What the header of a record's file says, all of it checked.
#[derive(Debug)]
pub struct Contents {
    pub entry: Entry,
    pub layout: String,
    pub tensors: BTreeMap<String, RecordTensor>,
    /// Where the data begins.
    pub data_start: u64,
    /// Bytes of the file, in whole pages.
    pub size: u64,
}

/// Opens a record's file, without following a link or waiting for a pipe.
///
/// # Errors
/// As the system says.
pub fn open(path: &Path) -> io::Result<File> {
    use rustix::fs::OFlags;
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC).bits();
    OpenOptions::new().read(true).custom_flags(flags as i32).open(path)
}

/// Reads and checks the header of `file`: the seal, that the tensors fill the data, that the name follows from the rest.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Format`] for the first fault.
pub fn read(path: &Path, file: &File) -> Result<Contents> {
    let io = |source| Error::io("read", path, source);
    let meta = file.metadata().map_err(io)?;
    let fault = |key: &str, expected: &str, got: String| Error::format(path, key, expected, got);
    if !meta.is_file() || meta.len() < (PREFIX_SIZE + SEAL_SIZE) as u64 {
        return Err(fault("file", "a record", format!("{} bytes", meta.len())));
    }
    let mut prefix = [0; PREFIX_SIZE];
    file.read_exact_at(&mut prefix, 0).map_err(io)?;
    let size = header::json_size(prefix, meta.len()).map_err(|fault| fault.in_file(path))?;
    let mut head = vec![0; PREFIX_SIZE + size];
    file.read_exact_at(&mut head, 0).map_err(io)?;
    let data_start = head.len() as u64;
    let Some(seal_start) = (meta.len() - data_start).checked_sub(SEAL_SIZE as u64) else {
        return Err(fault(SEAL, "32 bytes after the data", format!("{} bytes", meta.len())));
    };
    let mut seal = [0; SEAL_SIZE];
    file.read_exact_at(&mut seal, data_start + seal_start).map_err(io)?;
    if *blake3::hash(&head).as_bytes() != seal {
        return Err(fault(SEAL, "the hash of the header", "another".into()));
    }
    let header = header::parse(&head[PREFIX_SIZE..], meta.len() - data_start).map_err(|fault| fault.in_file(path))?;
    let parsed = parse(&header, seal_start).ok_or_else(|| fault(KEY, "a record's metadata", "other".into()))?;
    let (entry, layout, tensors) = parsed;
    Ok(Contents { entry, layout, tensors, data_start, size: whole_pages(meta.len()) })
}

/// The header's meaning; None for one that nothing here writes.
fn parse(header: &Header, seal_start: u64) -> Option<(Entry, String, BTreeMap<String, RecordTensor>)> {
    let text: Value = serde_json::from_str(header.metadata.get(KEY)?).ok()?;
    let number = |key: &str| text.get(key)?.as_u64();
    let string = |key: &str| text.get(key)?.as_str();
    if number("version")? != VERSION {
        return None;
    }
    let tokens = text.get("tokens")?.as_array()?.iter().map(|token| u32::try_from(token.as_u64()?).ok());
    let kind = string("kind")?;
    let entry = Entry {
        id: RecordId::from_hex(string("key")?)?,
        parent: RecordId::from_hex(string("parent")?)?,
        space: Space(RecordId::from_hex(string("space")?)?.0),
        kind: [RecordKind::Rows, RecordKind::State].into_iter().find(|known| kind_name(*known) == kind)?,
        start: usize::try_from(number("start")?).ok()?,
        tokens: tokens.collect::<Option<_>>()?,
        grid: u32::try_from(number("grid")?).ok()?,
        complete_from: usize::try_from(number("complete_from")?).ok()?,
        keep: text.get("keep")?.as_bool()?,
        n_bytes: seal_start,
        nonce: 0,
    };
    if !entry.is_named_right() || entry.start.checked_add(entry.tokens.len()).is_none() {
        return None;
    }
    let checksums = text.get("checksums")?.as_object()?;
    let mut tensors = BTreeMap::new();
    let mut n_bytes = 0;
    for (name, info) in header.tensors.iter().filter(|(name, _)| *name != SEAL) {
        let checksum = checksums.get(name)?.as_str()?;
        let checksum = u64::from_str_radix(checksum, 16).ok()?;
        n_bytes += info.n_bytes();
        let (dtype, shape, start) = (info.dtype, info.shape.clone(), info.start);
        tensors.insert(name.clone(), RecordTensor { dtype, shape, start, n_bytes: info.n_bytes(), checksum });
    }
    let seal = header.tensors.get(SEAL)?;
    // None overlaps, so that as many bytes as there are leave no gap.
    let is_full = n_bytes == seal_start && seal.start == seal_start && seal.n_bytes() == SEAL_SIZE as u64;
    (is_full && checksums.len() == tensors.len()).then(|| (entry, string("layout")?.to_owned(), tensors).into())?
}
