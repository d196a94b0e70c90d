//! A header while it is being read: what was asked for is gone, what is left at the end is a fault.

use super::super::header::{Header, TensorInfo};
use crate::array::Dtype;
use crate::cache::schema::{self, Class, Fault, MAX_DEPTH};
use crate::cache::state::State;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// Code points of the longest class name that is read.
pub const MAX_TEXT: usize = schema::MAX_NAME;

pub(super) struct Source<'a> {
    path: &'a Path,
    tensors: BTreeMap<&'a str, &'a TensorInfo>,
    metadata: BTreeMap<&'a str, &'a str>,
    read: &'a mut dyn FnMut(&TensorInfo) -> Result<Vec<u8>>,
}

impl<'a> Source<'a> {
    pub fn new(path: &'a Path, header: &'a Header, read: &'a mut dyn FnMut(&TensorInfo) -> Result<Vec<u8>>) -> Self {
        let tensors = header.tensors.iter().map(|(key, tensor)| (key.as_str(), tensor)).collect();
        let metadata = header.metadata.iter().map(|(key, text)| (key.as_str(), text.as_str())).collect();
        Self { path, tensors, metadata, read }
    }

    /// The error at a tensor.
    pub fn refuse(&self, key: &str, expected: impl Into<String>, got: impl AsRef<str>) -> Error {
        Fault::new(key, expected, got).in_file(self.path)
    }

    /// The error at a string.
    pub fn refuse_text(&self, key: &str, expected: impl Into<String>, got: Option<&str>) -> Error {
        let got = got.map_or_else(|| "nothing".to_owned(), |got| format!("'{got}'"));
        self.refuse(&metadata_key(key), expected, got)
    }

    /// True if a tensor that nobody asked for yet has this key.
    pub fn has(&self, key: &str) -> bool {
        self.tensors.contains_key(key)
    }

    /// True if such a tensor has a key that goes on behind this one.
    pub fn has_below(&self, key: &str) -> bool {
        let prefix = format!("{key}.");
        self.tensors.range(prefix.as_str()..).next().is_some_and(|(name, _)| name.starts_with(&prefix))
    }

    pub fn peek(&self, key: &str) -> Option<&'a TensorInfo> {
        self.tensors.get(key).copied()
    }

    pub fn take(&mut self, key: &str) -> Option<&'a TensorInfo> {
        self.tensors.remove(key)
    }

    pub fn take_text(&mut self, key: &str) -> Option<&'a str> {
        self.metadata.remove(key)
    }

    /// All strings whose key begins with `prefix`, which is cut off.
    pub fn take_group(&mut self, prefix: &str) -> BTreeMap<String, String> {
        let mut group = BTreeMap::new();
        self.metadata.retain(|key, text| match key.strip_prefix(prefix) {
            Some(rest) => group.insert(rest.to_owned(), (*text).to_owned()).is_some(),
            None => true,
        });
        group
    }

    /// The class that the file names at `key`.
    pub fn class(&self, name: &str, key: &str) -> Result<&'static Class> {
        Class::named(name, key).map_err(|fault| fault.in_file(self.path))
    }

    /// Checks that a `CacheList` may stand below `depth` others.
    pub fn check_depth(&self, key: &str, depth: usize) -> Result<()> {
        if depth < MAX_DEPTH {
            return Ok(());
        }
        Err(self.refuse(key, format!("at most {MAX_DEPTH} CacheLists in each other"), "one more"))
    }

    /// The error of an entry that has no tensor.
    pub fn missing(&self, key: &str, entry: &str, class: &Class) -> Error {
        self.refuse(key, format!("{entry} of a {}", class.name), "nothing")
    }

    /// Checks that all was asked for.
    pub fn finish(&self) -> Result<()> {
        if let Some((key, text)) = self.metadata.first_key_value() {
            return Err(self.refuse_text(key, "only keys of the format, numbered without gaps", Some(text)));
        }
        match self.tensors.first_key_value() {
            Some((key, tensor)) => {
                let got = format!("{} {:?}", tensor.dtype.safetensors_name(), tensor.shape);
                Err(self.refuse(key, "only tensors of the classes that the file names, numbered without gaps", got))
            }
            None => Ok(()),
        }
    }

    /// The number or truth value that a tensor of one element holds.
    pub fn scalar(&mut self, info: &TensorInfo) -> Result<State<TensorInfo>> {
        if !matches!(info.shape.as_slice(), [] | [1]) {
            return Err(self.refuse(&info.name, "a scalar", format!("shape {:?}", info.shape)));
        }
        let bytes = self.bytes(info)?;
        let state = match info.dtype {
            Dtype::Bool => State::Bool(bytes.first() != Some(&0)),
            Dtype::F32 => State::Float(<[u8; 4]>::try_from(bytes.as_slice()).map_or(f32::NAN, f32::from_le_bytes)),
            dtype => match integers(dtype, &bytes).as_deref() {
                Some(&[value]) => State::Int(value),
                _ => return Err(self.refuse(&info.name, "an integer, a bool or an F32", dtype.safetensors_name())),
            },
        };
        Ok(state)
    }

    /// The text of at most `limit` that a tensor of code points holds.
    pub fn text(&mut self, info: &TensorInfo, limit: usize) -> Result<String> {
        let fits = matches!(info.shape.as_slice(), &[n] if n <= limit);
        if !fits {
            return Err(self.refuse(
                &info.name,
                format!("a text of at most {limit}"),
                format!("shape {:?}", info.shape),
            ));
        }
        if info.shape == [0] {
            return Ok(String::new());
        }
        let bytes = self.bytes(info)?;
        let point = |value: i64| u32::try_from(value).ok().and_then(char::from_u32);
        integers(info.dtype, &bytes)
            .and_then(|values| values.into_iter().map(point).collect())
            .ok_or_else(|| self.refuse(&info.name, "code points of a text", info.dtype.safetensors_name()))
    }

    fn bytes(&mut self, info: &TensorInfo) -> Result<Vec<u8>> {
        let bytes = (self.read)(info)?;
        if bytes.len() as u64 == info.n_bytes() {
            return Ok(bytes);
        }
        Err(self.refuse(&info.name, format!("{} bytes", info.n_bytes()), format!("{} bytes", bytes.len())))
    }
}

/// A metadata key as errors name it.
pub(super) fn metadata_key(key: &str) -> String {
    format!("__metadata__.{key}")
}

/// The elements of an integer tensor; none if the type is no integer or a value does not fit.
fn integers(dtype: Dtype, bytes: &[u8]) -> Option<Vec<i64>> {
    let signed = match dtype {
        Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64 => true,
        Dtype::U8 | Dtype::U16 | Dtype::U32 | Dtype::U64 => false,
        _ => return None,
    };
    let extend = |element: &[u8]| {
        let negative = signed && element.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..element.len()].copy_from_slice(element);
        let value = i64::from_le_bytes(wide);
        (signed || value >= 0).then_some(value)
    };
    bytes.chunks_exact(dtype.size()).map(extend).collect()
}
