//! A record as a file: valid safetensors, sealed.
//!
//! One string of metadata says all but the tensors' places. The last tensor, `seal`, is the BLAKE3 hash of all bytes
//! before the data, and every other tensor has a checksum there: a flipped bit is found wherever it lies. A tensor that
//! was made smaller is one of bytes there, and the metadata says what they stand for.

use super::pack;
use crate::array::Dtype;
use crate::cache::schema::Described;
use crate::error::{Error, Result};
use crate::persist::header::{self, Header, PREFIX_SIZE, TensorInfo};
use crate::store::prompt_store::key::{RecordId, Space};
use crate::store::prompt_store::open_record::RecordTensor;
use crate::store::prompt_store::options::Compression;
use crate::store::prompt_store::record::{Entry, Record, RecordKind, SEAL, checksum};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Key of the metadata.
const KEY: &str = "mlxrs_py_record";
/// Version of what the metadata says: as it was put, or with tensors that were made smaller.
const PLAIN: u64 = 1;
const PACKED: u64 = 2;
/// How such a tensor was.
const CODEC: &str = "zstd";
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

/// A record as its file holds it.
pub struct Frame {
    head: Vec<u8>,
    /// In place of the tensors that were made smaller.
    packed: Vec<Option<Vec<u8>>>,
    seal: [u8; SEAL_SIZE],
}

impl Frame {
    /// Bytes that the file of `record` takes, in whole pages.
    pub fn size(&self, record: &Record) -> u64 {
        whole_pages(self.parts(record).map(|part| part.len() as u64).sum())
    }

    /// All bytes of the file, one after the other.
    pub fn parts<'a>(&'a self, record: &'a Record) -> impl Iterator<Item = &'a [u8]> {
        let stored = self.packed.iter().zip(&record.tensors);
        let stored = stored.map(|(packed, tensor)| packed.as_ref().unwrap_or(&tensor.bytes).as_slice());
        std::iter::once(self.head.as_slice()).chain(stored).chain(std::iter::once(self.seal.as_slice()))
    }
}

/// `n_bytes` as a file takes them.
pub const fn whole_pages(n_bytes: u64) -> u64 {
    n_bytes.next_multiple_of(PAGE)
}

/// What the file of `record` holds. Its tensors are checksummed here, and made smaller where that is asked for and saves
/// something.
///
/// # Errors
/// [`Error::Value`] if the header would be too long.
pub fn frame(record: &Record, compression: Option<Compression>) -> Result<Frame> {
    let Entry { id, parent, space, kind, start, tokens, grid, complete_from, keep, .. } = &record.entry;
    let checksums: BTreeMap<_, _> =
        record.tensors.iter().map(|tensor| (&tensor.name, format!("{:016x}", tensor.checksum()))).collect();
    let pack = |bytes: &[u8], dtype: Dtype| compression.and_then(|Compression::Zstd| pack::pack(bytes, dtype.size()));
    let packed: Vec<_> = record.tensors.iter().map(|tensor| pack(&tensor.bytes, tensor.dtype)).collect();
    let kind = kind_name(*kind);
    let mut text = json!({
        "version": PLAIN, "key": id.to_string(), "parent": parent.to_string(), "space": space.to_string(),
        "kind": kind, "start": start, "tokens": tokens, "grid": grid, "complete_from": complete_from, "keep": keep,
        "layout": record.layout, "checksums": checksums,
    });
    let mut notes = Map::new();
    let mut tensors = Vec::with_capacity(record.tensors.len() + 1);
    for (tensor, packed) in record.tensors.iter().zip(&packed) {
        let shape = if let Some(bytes) = packed {
            let checksum = format!("{:016x}", checksum(bytes));
            let dtype = tensor.dtype.safetensors_name();
            let note = json!({"codec": CODEC, "dtype": dtype, "shape": tensor.shape, "checksum": checksum});
            notes.insert(tensor.name.clone(), note);
            Shape(Dtype::U8, vec![bytes.len()])
        } else {
            Shape(tensor.dtype, tensor.shape.clone())
        };
        tensors.push((tensor.name.clone(), shape));
    }
    if !notes.is_empty() {
        text["version"] = PACKED.into();
        text["packed"] = notes.into();
    }
    tensors.push((SEAL.to_owned(), Shape(Dtype::U8, vec![SEAL_SIZE])));
    let metadata = BTreeMap::from([(KEY.to_owned(), text.to_string())]);
    let head = header::build(&tensors, &metadata)?;
    let seal = *blake3::hash(&head).as_bytes();
    Ok(Frame { head, packed, seal })
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
    /// Where they lie in the data, in their order; empty if the data is as it was put.
    pub places: Vec<Place>,
    /// Where the data begins.
    pub data_start: u64,
    /// Bytes of the file, in whole pages.
    pub size: u64,
}

/// Where a tensor lies in a record's data.
#[derive(Debug)]
pub struct Place {
    /// Its first byte among those that were put, and their number.
    pub start: u64,
    pub n_bytes: u64,
    /// Its first byte in the data.
    pub at: u64,
    /// None if it is as it was put.
    pub packed: Option<Packed>,
}

/// The form in which a tensor was made smaller.
#[derive(Debug)]
pub struct Packed {
    pub n_bytes: u64,
    /// Bytes of an element.
    pub width: usize,
    /// Of the bytes in the file.
    pub checksum: u64,
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
    let Parsed { entry, layout, tensors, places } = parsed;
    Ok(Contents { entry, layout, tensors, places, data_start, size: whole_pages(meta.len()) })
}

struct Parsed {
    entry: Entry,
    layout: String,
    tensors: BTreeMap<String, RecordTensor>,
    places: Vec<Place>,
}

/// The header's meaning; None for one that nothing here writes.
fn parse(header: &Header, seal_start: u64) -> Option<Parsed> {
    let text: Value = serde_json::from_str(header.metadata.get(KEY)?).ok()?;
    let number = |key: &str| text.get(key)?.as_u64();
    let string = |key: &str| text.get(key)?.as_str();
    let notes = match number("version")? {
        PLAIN => None,
        PACKED => Some(text.get("packed")?.as_object()?),
        _ => return None,
    };
    let tokens = text.get("tokens")?.as_array()?.iter().map(|token| u32::try_from(token.as_u64()?).ok());
    let kind = string("kind")?;
    let mut entry = Entry {
        id: RecordId::from_hex(string("key")?)?,
        parent: RecordId::from_hex(string("parent")?)?,
        space: Space(RecordId::from_hex(string("space")?)?.0),
        kind: [RecordKind::Rows, RecordKind::State].into_iter().find(|known| kind_name(*known) == kind)?,
        start: usize::try_from(number("start")?).ok()?,
        tokens: tokens.collect::<Option<_>>()?,
        grid: u32::try_from(number("grid")?).ok()?,
        complete_from: usize::try_from(number("complete_from")?).ok()?,
        keep: text.get("keep")?.as_bool()?,
        n_bytes: 0,
        nonce: 0,
    };
    if !entry.is_named_right() || entry.start.checked_add(entry.tokens.len()).is_none() {
        return None;
    }
    let checksums = text.get("checksums")?.as_object()?;
    let mut stored: Vec<_> = header.tensors.iter().filter(|(name, _)| *name != SEAL).collect();
    stored.sort_by_key(|(_, info)| (info.start, info.n_bytes()));
    let (mut tensors, mut places, mut n_stored) = (BTreeMap::new(), Vec::new(), 0);
    for (name, info) in stored {
        let checksum = number_of(checksums.get(name)?)?;
        let start = entry.n_bytes;
        let (tensor, packed) = if let Some(note) = notes.and_then(|notes| notes.get(name)) {
            let tensor = unpacked(note, info, start, checksum)?;
            let (width, checksum) = (tensor.dtype.size(), number_of(note.get("checksum")?)?);
            (tensor, Some(Packed { n_bytes: info.n_bytes(), width, checksum }))
        } else {
            let (dtype, shape, n_bytes) = (info.dtype, info.shape.clone(), info.n_bytes());
            (RecordTensor { dtype, shape, start, n_bytes, checksum }, None)
        };
        places.push(Place { start, n_bytes: tensor.n_bytes, at: info.start, packed });
        n_stored += info.n_bytes();
        entry.n_bytes = start.checked_add(tensor.n_bytes)?;
        tensors.insert(name.clone(), tensor);
    }
    let seal = header.tensors.get(SEAL)?;
    // None overlaps, so that as many bytes as there are leave no gap.
    let is_full = n_stored == seal_start && seal.start == seal_start && seal.n_bytes() == SEAL_SIZE as u64;
    let is_told = checksums.len() == tensors.len()
        && notes.is_none_or(|notes| notes.keys().all(|name| tensors.contains_key(name)));
    if notes.is_none() {
        places.clear();
    }
    (is_full && is_told).then(|| Some(Parsed { entry, layout: string("layout")?.to_owned(), tensors, places }))?
}

/// The tensor that the bytes of `info` stand for; None if there cannot be so many in them.
fn unpacked(note: &Value, info: &TensorInfo, start: u64, checksum: u64) -> Option<RecordTensor> {
    let dtype = Dtype::from_safetensors_name(note.get("dtype")?.as_str()?)?;
    let shape = note.get("shape")?.as_array()?.iter().map(|dim| usize::try_from(dim.as_u64()?).ok());
    let shape = shape.collect::<Option<Vec<_>>>()?;
    let n_bytes = shape.iter().try_fold(dtype.size() as u64, |n, &dim| n.checked_mul(dim as u64))?;
    // Whoever reads it allocates so much.
    let is_possible = n_bytes <= info.n_bytes().checked_mul(pack::MAX_RATIO)?;
    let is_known = note.get("codec")?.as_str()? == CODEC && info.dtype == Dtype::U8 && info.shape.len() == 1;
    (is_possible && is_known).then_some(RecordTensor { dtype, shape, start, n_bytes, checksum })
}

fn number_of(text: &Value) -> Option<u64> {
    u64::from_str_radix(text.as_str()?, 16).ok()
}
