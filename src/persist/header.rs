//! The header of a safetensors file: pure, without files and arrays.
//!
//! A file is 8 bytes (length of the header, little-endian), the header (a JSON object, padded with spaces), then the
//! data. Here the data begins at a multiple of [`ALIGNMENT`]; any header is read.

use crate::array::Dtype;
use crate::cache::schema::{Described, Fault};
use crate::error::{Error, Result};
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

/// Bytes of the length before the header.
pub const PREFIX_SIZE: usize = 8;
/// Bytes that a header may have: the limit of MLX's own reader.
pub const MAX_HEADER_SIZE: u64 = 100_000_000;
/// Headers are padded so that the data begins at a multiple of this: a memory page.
pub const ALIGNMENT: usize = 4096;
/// Tensors that a file may have, and strings: far more than any cache needs, and few enough to be read at once.
pub const MAX_ENTRIES: usize = 1 << 18;
/// Axes that a tensor may have.
pub const MAX_DIMS: usize = 32;
/// Longest axis: MLX counts in int32.
pub const MAX_DIM: u64 = i32::MAX as u64;

/// Name under which the header keeps strings.
const METADATA: &str = "__metadata__";

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its key.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Length of every axis.
    pub shape: Vec<usize>,
    /// Bytes from the beginning of the data to the first element.
    pub start: u64,
    /// Bytes from the beginning of the data to the end of the last element.
    pub end: u64,
}

impl TensorInfo {
    /// Number of bytes.
    pub const fn n_bytes(&self) -> u64 {
        self.end - self.start
    }
}

impl Described for TensorInfo {
    fn shape(&self) -> Vec<usize> {
        self.shape.clone()
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }
}

/// All that a header says; every tensor lies inside the data and none on another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The tensors by key.
    pub tensors: BTreeMap<String, TensorInfo>,
    /// The strings; empty if there are none.
    pub metadata: BTreeMap<String, String>,
}

/// Length of the JSON, as the first bytes of a file of `file_size` bytes say: checked before anybody allocates it.
///
/// # Errors
/// A fault if the header would be too long or would not fit into the file.
pub fn json_size(prefix: [u8; PREFIX_SIZE], file_size: u64) -> Result<usize, Fault> {
    let size = u64::from_le_bytes(prefix);
    let limit = MAX_HEADER_SIZE.min(file_size.saturating_sub(PREFIX_SIZE as u64));
    match usize::try_from(size) {
        Ok(fits) if size <= limit => Ok(fits),
        _ => Err(Fault::new("header", format!("at most {limit} bytes"), format!("{size} bytes"))),
    }
}

/// Reads the JSON of a header whose file holds `data_size` bytes after it. Bytes that no tensor uses are allowed.
///
/// # Errors
/// The first fault: JSON that is malformed, too deep, or names a key twice; a field too few or too many; an unknown
/// dtype; offsets that do not fit the shape, the data or another tensor.
pub fn parse(json: &[u8], data_size: u64) -> Result<Header, Fault> {
    if json.first() != Some(&b'{') {
        return Err(Fault::new("header", "a JSON object", String::from_utf8_lossy(&json[..json.len().min(16)])));
    }
    let mut reader = HeaderReader { data_size, key: String::new(), fault: None };
    let mut json = serde_json::Deserializer::from_slice(json);
    let header = reader.deserialize_with(&mut json).and_then(|header| json.end().map(|()| header));
    let header = header.map_err(|error| {
        let key = if reader.key.is_empty() { "header" } else { &reader.key };
        reader.fault.take().unwrap_or_else(|| Fault::new(key, "a safetensors header", error.to_string()))
    })?;
    check_overlaps(&header)?;
    Ok(header)
}

/// Reads the header of a whole file in memory; gives the place of the data too.
///
/// # Errors
/// As [`json_size`] and [`parse`].
pub fn parse_file(file: &[u8]) -> Result<(Header, usize), Fault> {
    let Some((prefix, rest)) = file.split_first_chunk() else {
        return Err(Fault::new("header", format!("{PREFIX_SIZE} bytes"), format!("{} bytes", file.len())));
    };
    let size = json_size(*prefix, file.len() as u64)?;
    let (json, data) = rest.split_at(size);
    Ok((parse(json, data.len() as u64)?, PREFIX_SIZE + size))
}

/// The bytes before the data, for tensors that follow each other in this order without gaps.
///
/// # Errors
/// [`Error::Value`] if the header would be longer than readers accept.
pub fn build<T: Described>(tensors: &[(String, T)], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    if let Some(n) = [tensors.len(), metadata.len()].into_iter().find(|&n| n > MAX_ENTRIES) {
        return Err(Error::value("save_prompt_cache", format!("at most {MAX_ENTRIES} tensors and strings"), n));
    }
    let mut entries = Vec::with_capacity(tensors.len() + 1);
    if !metadata.is_empty() {
        entries.push(format!("\"{METADATA}\":{}", serde_json::json!(metadata)));
    }
    let mut start = 0_u64;
    for (name, tensor) in tensors {
        let (shape, dtype) = (tensor.shape(), tensor.dtype());
        let end = start + shape.iter().product::<usize>() as u64 * dtype.size() as u64;
        let (name, dtype) = (serde_json::json!(name), dtype.safetensors_name());
        entries.push(format!("{name}:{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}"));
        start = end;
    }
    let json = format!("{{{}}}", entries.join(","));
    let size = (PREFIX_SIZE + json.len()).next_multiple_of(ALIGNMENT) - PREFIX_SIZE;
    if size as u64 > MAX_HEADER_SIZE {
        return Err(Error::value("save_prompt_cache", format!("a header of at most {MAX_HEADER_SIZE} bytes"), size));
    }
    let mut bytes = (size as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes.resize(PREFIX_SIZE + size, b' ');
    Ok(bytes)
}

/// Tensors may touch but not overlap; those without elements lie anywhere.
fn check_overlaps(header: &Header) -> Result<(), Fault> {
    let mut spans: Vec<_> = header.tensors.values().filter(|tensor| tensor.n_bytes() > 0).collect();
    spans.sort_unstable_by_key(|tensor| tensor.start);
    for pair in spans.windows(2) {
        if pair[1].start < pair[0].end {
            let expected = format!("bytes after those of '{}', which end at {}", pair[0].name, pair[0].end);
            return Err(Fault::new(&pair[1].name, expected, format!("{} to {}", pair[1].start, pair[1].end)));
        }
    }
    Ok(())
}

/// Reads the top level; remembers where it is, for the error.
struct HeaderReader {
    data_size: u64,
    key: String,
    fault: Option<Fault>,
}

impl HeaderReader {
    fn deserialize_with<'de, D: Deserializer<'de>>(&mut self, json: D) -> Result<Header, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut HeaderReader {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header::default();
        let mut has_metadata = false;
        while let Some(key) = map.next_key::<String>()? {
            self.key.clone_from(&key);
            if key == METADATA {
                if std::mem::replace(&mut has_metadata, true) {
                    return Err(A::Error::duplicate_field(METADATA));
                }
                header.metadata = map.next_value_seed(Strings)?;
                continue;
            }
            let entry = map.next_value_seed(EntryReader)?;
            let info = entry.check(key, self.data_size).map_err(|fault| {
                self.fault = Some(fault);
                A::Error::custom("")
            })?;
            if header.tensors.len() == MAX_ENTRIES {
                return Err(A::Error::custom(format_args!("more than {MAX_ENTRIES} tensors")));
            }
            match header.tensors.entry(info.name.clone()) {
                Entry::Vacant(place) => place.insert(info),
                Entry::Occupied(_) => return Err(A::Error::custom("the same key twice")),
            };
        }
        self.key.clear();
        Ok(header)
    }
}

/// Reads the strings of `__metadata__`, or null.
struct Strings;

impl<'de> DeserializeSeed<'de> for Strings {
    type Value = BTreeMap<String, String>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strings {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of strings or null")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(BTreeMap::new())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut strings = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            if strings.len() == MAX_ENTRIES {
                return Err(A::Error::custom(format_args!("more than {MAX_ENTRIES} strings")));
            }
            match strings.entry(key) {
                Entry::Vacant(place) => place.insert(value),
                Entry::Occupied(place) => return Err(A::Error::custom(format_args!("'{}' twice", place.key()))),
            };
        }
        Ok(strings)
    }
}

/// An entry before its numbers are checked.
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    offsets: Vec<u64>,
}

impl RawEntry {
    fn check(self, name: String, data_size: u64) -> Result<TensorInfo, Fault> {
        let fault = |expected: String, got: String| Err(Fault::new(&name, expected, got));
        // MLX reads no F64, and nothing here writes it.
        let known = Dtype::from_safetensors_name(&self.dtype).filter(|&dtype| dtype != Dtype::F64);
        let Some(dtype) = known else {
            return fault("a dtype of MLX's files".into(), format!("'{}'", self.dtype));
        };
        if let Some(long) = self.shape.iter().find(|&&dim| dim > MAX_DIM) {
            return fault(format!("axes of at most {MAX_DIM}"), long.to_string());
        }
        let &[start, end] = self.offsets.as_slice() else {
            return fault("two data_offsets".into(), format!("{}", self.offsets.len()));
        };
        let n_elements = self.shape.iter().try_fold(1_u64, |n, &dim| n.checked_mul(dim));
        let n_bytes = n_elements.and_then(|n| n.checked_mul(dtype.size() as u64));
        if start > end || n_bytes != Some(end - start) {
            let size = n_bytes.map_or_else(|| "more than 2**64".into(), |n| n.to_string());
            return fault(format!("data_offsets of {size} bytes for {:?}", self.shape), format!("{start} to {end}"));
        }
        if end > data_size {
            return fault(format!("data_offsets within {data_size} bytes of data"), format!("{start} to {end}"));
        }
        let shape = self.shape.iter().map(|&dim| dim as usize).collect();
        Ok(TensorInfo { name, dtype, shape, start, end })
    }
}

/// Reads one entry: exactly `dtype`, `shape` and `data_offsets`, each once.
struct EntryReader;

impl<'de> DeserializeSeed<'de> for EntryReader {
    type Value = RawEntry;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<RawEntry, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntryReader {
    type Value = RawEntry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawEntry, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "dtype" if dtype.is_none() => dtype = Some(map.next_value()?),
                "shape" if shape.is_none() => shape = Some(map.next_value_seed(Numbers)?),
                "data_offsets" if offsets.is_none() => offsets = Some(map.next_value_seed(Numbers)?),
                "dtype" | "shape" | "data_offsets" => return Err(A::Error::custom(format_args!("'{key}' twice"))),
                _ => return Err(A::Error::unknown_field(&key, &["dtype", "shape", "data_offsets"])),
            }
        }
        Ok(RawEntry {
            dtype: dtype.ok_or_else(|| A::Error::missing_field("dtype"))?,
            shape: shape.ok_or_else(|| A::Error::missing_field("shape"))?,
            offsets: offsets.ok_or_else(|| A::Error::missing_field("data_offsets"))?,
        })
    }
}

/// Reads a list of at most [`MAX_DIMS`] numbers.
struct Numbers;

impl<'de> DeserializeSeed<'de> for Numbers {
    type Value = Vec<u64>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Vec<u64>, D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Numbers {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MAX_DIMS} numbers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<u64>, A::Error> {
        let mut numbers = Vec::new();
        while let Some(number) = list.next_element()? {
            if numbers.len() == MAX_DIMS {
                return Err(A::Error::invalid_length(MAX_DIMS + 1, &self));
            }
            numbers.push(number);
        }
        Ok(numbers)
    }
}
