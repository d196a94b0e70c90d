//! One record: what is put in, how its file looks, and what comes out.
//!
//! The file is a safetensors file. Its one string says what the record is; its last tensor, the seal, is the BLAKE3 of
//! all bytes before the data; the string holds a checksum of each other tensor. So every byte is covered.

pub use super::key::RecordKind;
use super::key::{self, Key, Space};
use super::lease::Lease;
use crate::array::Dtype;
use crate::cache::schema::Fault;
use crate::error::{Error, Result};
use crate::persist::{Source, TensorInfo, header};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The version of the form of records.
pub const FORMAT: u64 = 1;

const ABOUT: &str = "mlxrs_record";
const SEAL: &str = "~seal";
const SEAL_BYTES: usize = 32;

/// The checksum of a tensor's bytes: XXH3 of 64 bits.
pub fn checksum(bytes: &[u8]) -> u64 {
    twox_hash::XxHash3_64::oneshot(bytes)
}

/// A record that somebody would like to store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// What it holds.
    pub kind: RecordKind,
    /// Its first token; of a block's beginning.
    pub start: usize,
    /// The token behind its last; at most a block later.
    pub end: usize,
    /// 0, or the step in whose full windows all rows were computed.
    pub grid: u32,
    /// First token from which on the rows of windowed layers are there.
    pub complete_from: usize,
}

/// A tensor of a new record.
#[derive(Clone, Debug)]
pub struct NewTensor {
    /// Its name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Length of every axis.
    pub shape: Vec<usize>,
    /// Its bytes, row-major.
    pub bytes: Vec<u8>,
}

/// A record to be stored.
#[derive(Clone, Debug)]
pub struct NewRecord {
    /// See [`Wanted::kind`].
    pub kind: RecordKind,
    /// See [`Wanted::start`].
    pub start: usize,
    /// See [`Wanted::end`].
    pub end: usize,
    /// See [`Wanted::grid`].
    pub grid: u32,
    /// See [`Wanted::complete_from`].
    pub complete_from: usize,
    /// A state that is not to be thinned.
    pub keep: bool,
    /// Text of whoever put it.
    pub layout: String,
    /// Its tensors.
    pub tensors: Vec<NewTensor>,
}

/// Where a record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// In this process.
    Ram,
    /// In the folder.
    Disk,
}

/// All that the index knows of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub key: Key,
    pub parent: Key,
    pub space: Space,
    pub kind: RecordKind,
    pub start: usize,
    pub end: usize,
    /// Of the whole file.
    pub n_bytes: u64,
    pub grid: u32,
    pub complete_from: usize,
    pub keep: bool,
    /// Name of the file in the folder of records; empty in memory.
    pub file: String,
}

impl Row {
    /// True if this one is worth the place of `old`, which has the same key.
    pub fn replaces(&self, old: &Self) -> bool {
        let is_exact_now = self.grid != 0 && old.grid == 0 && self.complete_from <= old.complete_from;
        is_exact_now || (self.complete_from < old.complete_from && (self.grid != 0 || old.grid == 0))
    }
}

/// A record that was found.
#[derive(Clone, Debug)]
pub struct RecordInfo {
    pub(super) row: Row,
    /// Its tokens.
    pub(super) tokens: Vec<u32>,
    /// What it holds.
    pub kind: RecordKind,
    /// Its first token.
    pub start: usize,
    /// The token behind its last.
    pub end: usize,
    /// Bytes of the record.
    pub n_bytes: u64,
    /// See [`Wanted::grid`].
    pub grid: u32,
    /// See [`Wanted::complete_from`].
    pub complete_from: usize,
    /// Where it lies.
    pub tier: Tier,
    /// Tokens from `start` on that are the query's too.
    pub n_common: usize,
}

impl RecordInfo {
    pub(super) fn new(row: Row, tier: Tier, n_common: usize, tokens: Vec<u32>) -> Self {
        let Row { kind, start, end, n_bytes, grid, complete_from, .. } = row;
        Self { row, tokens, kind, start, end, n_bytes, grid, complete_from, tier, n_common }
    }

    /// Names the record.
    pub fn id(&self) -> String {
        key::hex(&self.row.key)
    }
}

/// A tensor of an open record.
#[derive(Clone, Debug)]
pub struct RecordTensor {
    /// Element type.
    pub dtype: Dtype,
    /// Length of every axis.
    pub shape: Vec<usize>,
    /// Its first byte.
    pub start: u64,
    /// Its bytes.
    pub n_bytes: u64,
    /// What their [`checksum`] must be; None if they never left memory.
    pub checksum: Option<u64>,
}

/// A record whose header was checked.
#[derive(Debug)]
pub struct OpenRecord {
    /// Text of whoever put it.
    pub layout: String,
    /// Its tensors by name.
    pub tensors: BTreeMap<String, RecordTensor>,
    bytes: Place,
    #[expect(dead_code, reason = "given back when this goes")]
    lease: Option<Arc<Lease>>,
}

#[derive(Debug)]
enum Place {
    Ram(Arc<NewRecord>),
    Disk(PathBuf, File),
}

impl Source for OpenRecord {
    fn bytes(&self, at: u64, n_bytes: usize) -> Option<&[u8]> {
        let Place::Ram(record) = &self.bytes else { return None };
        let mut start = 0;
        for tensor in &record.tensors {
            if start == at {
                return tensor.bytes.get(..n_bytes);
            }
            start += tensor.bytes.len() as u64;
        }
        None
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        match &self.bytes {
            Place::Ram(_) => Err(Error::value("restore", "a whole tensor", format!("{} bytes at {at}", bytes.len()))),
            Place::Disk(path, file) => file.read_exact_at(bytes, at).map_err(|error| Error::io("read", path, error)),
        }
    }
}

impl OpenRecord {
    pub(super) fn in_ram(record: &Arc<NewRecord>) -> Self {
        let mut start = 0;
        let mut tensors = BTreeMap::new();
        for tensor in &record.tensors {
            let n_bytes = tensor.bytes.len() as u64;
            let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
            // An empty tensor would share its start with the next.
            tensors.insert(tensor.name.clone(), RecordTensor { dtype, shape, start, n_bytes, checksum: None });
            start += n_bytes;
        }
        Self { layout: record.layout.clone(), tensors, bytes: Place::Ram(Arc::clone(record)), lease: None }
    }

    /// The same record, which is not evicted while this lives.
    pub(super) fn under(self, lease: Option<&Arc<Lease>>) -> Self {
        Self { lease: lease.cloned(), ..self }
    }

    /// Reads all tensors and compares their checksums.
    pub(super) fn verify(&self) -> Result<()> {
        let mut bytes = Vec::new();
        for (name, tensor) in &self.tensors {
            let Some(expected) = tensor.checksum else { continue };
            bytes.resize(tensor.n_bytes as usize, 0);
            self.read(&mut bytes, tensor.start)?;
            let found = checksum(&bytes);
            if found != expected {
                return Err(Error::value(
                    "verify",
                    format!("'{name}' with checksum {expected:016x}"),
                    format!("{found:016x}"),
                ));
            }
        }
        Ok(())
    }
}

/// The bytes before the data of a record's file, and the seal that ends it.
pub(super) fn encode(row: &Row, tokens: &[u32], record: &NewRecord) -> Result<(Vec<u8>, [u8; SEAL_BYTES])> {
    let checksums: Vec<_> =
        record.tensors.iter().map(|tensor| json!([tensor.name, format!("{:016x}", checksum(&tensor.bytes))])).collect();
    let about = json!({
        "format": FORMAT,
        "kind": row.kind.code(),
        "parent": key::hex(&row.parent),
        "space": key::hex(row.space.bytes()),
        "start": row.start,
        "tokens": tokens,
        "grid": row.grid,
        "complete_from": row.complete_from,
        "keep": row.keep,
        "layout": record.layout,
        "checksums": checksums,
    });
    let form = |name: &str, dtype, shape: &[usize]| Form { name: name.to_owned(), dtype, shape: shape.to_vec() };
    let mut forms: Vec<_> =
        record.tensors.iter().map(|tensor| form(&tensor.name, tensor.dtype, &tensor.shape)).collect();
    forms.push(form(SEAL, Dtype::U8, &[SEAL_BYTES]));
    let named: Vec<_> = forms.iter().map(|form| (form.name.clone(), form)).collect();
    let metadata = BTreeMap::from([(ABOUT.to_owned(), about.to_string())]);
    let head = header::build(&named, &metadata)?;
    let seal = *blake3::hash(&head).as_bytes();
    Ok((head, seal))
}

struct Form {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl crate::cache::schema::Described for &Form {
    fn shape(&self) -> Vec<usize> {
        self.shape.clone()
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }
}

/// What a record's file says it is.
#[derive(Debug)]
pub(super) struct Decoded {
    pub row: Row,
    pub tokens: Vec<u32>,
    pub open: OpenRecord,
}

/// Opens a record's file and checks its header against its seal and itself. The data is not read.
pub(super) fn open(path: &Path) -> Result<Decoded> {
    let fail = |source| Error::io("open", path, source);
    let file = File::open(path).map_err(fail)?;
    let size = file.metadata().map_err(fail)?.len();
    let mut prefix = [0; header::PREFIX_SIZE];
    file.read_exact_at(&mut prefix, 0).map_err(fail)?;
    let length = header::json_size(prefix, size).map_err(|fault| fault.in_file(path))?;
    let mut head = vec![0; header::PREFIX_SIZE + length];
    file.read_exact_at(&mut head, 0).map_err(fail)?;
    let mut seal = [0; SEAL_BYTES];
    let data = head.len() as u64;
    let at = size.checked_sub(SEAL_BYTES as u64).filter(|&at| at >= data);
    let at = at.ok_or_else(|| fail(io::ErrorKind::UnexpectedEof.into()))?;
    file.read_exact_at(&mut seal, at).map_err(fail)?;
    // In constant time or not: nobody guesses here.
    if blake3::hash(&head).as_bytes() != &seal {
        return Err(Error::format(path, "header", "one that its seal fits", "another"));
    }
    let found = header::parse(&head[header::PREFIX_SIZE..], size - data).map_err(|fault| fault.in_file(path))?;
    let fault = || Fault::new(ABOUT, format!("a record of format {FORMAT}"), "another text").in_file(path);
    let about: Value = found.metadata.get(ABOUT).and_then(|text| serde_json::from_str(text).ok()).ok_or_else(fault)?;
    let (mut row, tokens, layout, checksums) = read_about(&about).ok_or_else(fault)?;
    row.n_bytes = size;
    row.file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut tensors = BTreeMap::new();
    let mut end = 0;
    for (name, TensorInfo { dtype, shape, start, end: stop, .. }) in found.tensors {
        end = end.max(stop);
        if name == SEAL {
            continue;
        }
        let checksum = checksums.get(&name).copied();
        let checksum = Some(checksum.ok_or_else(|| Fault::new(&name, "a checksum", "none").in_file(path))?);
        tensors.insert(name, RecordTensor { dtype, shape, start: data + start, n_bytes: stop - start, checksum });
    }
    if data + end != size {
        return Err(Error::format(path, "data", format!("{end} bytes"), format!("{} bytes", size - data)));
    }
    let open = OpenRecord { layout, tensors, bytes: Place::Disk(path.to_owned(), file), lease: None };
    Ok(Decoded { row, tokens, open })
}

type About = (Row, Vec<u32>, String, BTreeMap<String, u64>);

fn read_about(about: &Value) -> Option<About> {
    let count = |name: &str| usize::try_from(about.get(name)?.as_u64()?).ok();
    let hash = |name: &str| unhex(about.get(name)?.as_str()?);
    if count("format")? as u64 != FORMAT {
        return None;
    }
    let kind = RecordKind::of_code(about.get("kind")?.as_i64()?)?;
    let tokens = about.get("tokens")?.as_array()?.iter().map(|token| u32::try_from(token.as_u64()?).ok());
    let tokens = tokens.collect::<Option<Vec<_>>>()?;
    let checksums =
        about.get("checksums")?.as_array()?.iter().map(|pair| {
            Some((pair.get(0)?.as_str()?.to_owned(), u64::from_str_radix(pair.get(1)?.as_str()?, 16).ok()?))
        });
    let checksums = checksums.collect::<Option<BTreeMap<_, _>>>()?;
    let (parent, start) = (hash("parent")?, count("start")?);
    let row = Row {
        key: key::child(&parent, kind, &tokens),
        parent,
        space: Space::new(hash("space")?),
        kind,
        start,
        end: start.checked_add(tokens.len())?,
        n_bytes: 0,
        grid: u32::try_from(count("grid")?).ok()?,
        complete_from: count("complete_from")?,
        keep: about.get("keep")?.as_bool()?,
        file: String::new(),
    };
    Some((row, tokens, about.get("layout")?.as_str()?.to_owned(), checksums))
}

/// The 32 bytes of as many pairs of hexadecimal digits.
pub(super) fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(bytes)
}
