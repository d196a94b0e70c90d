//! Format 0.32: the state, entry by entry, under dotted keys `layer.entry…`.
//!
//! Metadata: `0.<key>` the user's strings; `1.<layer>` class names; `2.0` an empty mark, then for each tensor that
//! stands for something else `2.<n>.0` its key and `2.<n>.1` what it is: `scalar`, `string` or `none`.
//!
//! mlx-lm writes nothing at all for an empty list, so that a `CacheList` without children vanishes if it is the last
//! layer, and its reader returns fewer layers. Here an empty list is written as an empty *string*, which mlx-lm
//! reads as a sequence without entries: a `CacheList` without children, or an `ArraysCache` without slots. Both
//! spellings are read. The state of a registered class may hold both: there an empty string is F32, as mlx-lm writes it,
//! and an empty list I32.

use super::super::header::TensorInfo;
use super::source::{MAX_TEXT, Source, metadata_key};
use super::{Encoded, Leaf};
use crate::array::Dtype;
use crate::cache::schema::{Class, Kind, MAX_LEVELS, MAX_STATE_TEXT, Rule};
use crate::cache::state::{CacheState, State};
use crate::error::Result;
use std::collections::BTreeMap;

/// What a tensor stands for, by key; tensors without entry are arrays.
type Table<'a> = BTreeMap<&'a str, &'a str>;

pub(super) fn encode<T>(layers: Vec<CacheState<T>>, user: &BTreeMap<String, String>) -> Encoded<T> {
    let mut encoder = Encoder { encoded: Encoded::new(), n_table: 0 };
    let metadata = &mut encoder.encoded.metadata;
    metadata.extend(user.iter().map(|(key, text)| (format!("0.{key}"), text.clone())));
    metadata.insert("2.0".into(), String::new());
    for (layer, cache) in layers.into_iter().enumerate() {
        encoder.encoded.metadata.insert(format!("1.{layer}"), cache.class);
        encoder.put(layer.to_string(), cache.state);
    }
    encoder.encoded
}

struct Encoder<T> {
    encoded: Encoded<T>,
    n_table: usize,
}

impl<T> Encoder<T> {
    fn put(&mut self, key: String, state: State<T>) {
        match state {
            State::Array(array) => self.encoded.tensors.push((key, Leaf::Array(array))),
            State::Int(value) => match i32::try_from(value) {
                Ok(value) => self.stand_in(key, "scalar", number(Dtype::I32, &value.to_le_bytes())),
                Err(_) => self.stand_in(key, "scalar", number(Dtype::I64, &value.to_le_bytes())),
            },
            State::Bool(value) => self.stand_in(key, "scalar", number(Dtype::Bool, &[value.into()])),
            State::Float(value) => self.stand_in(key, "scalar", number(Dtype::F32, &value.to_le_bytes())),
            State::None => self.stand_in(key, "none", Leaf::nothing()),
            State::List(items) if items.is_empty() => {
                self.stand_in(key, "string", Leaf::Scalar { dtype: Dtype::I32, shape: vec![0], bytes: Vec::new() });
            }
            State::Str(text) if text.is_empty() => self.stand_in(key, "string", Leaf::nothing()),
            State::Str(text) => {
                let bytes: Vec<u8> = text.chars().flat_map(|point| u32::from(point).to_le_bytes()).collect();
                let shape = vec![bytes.len() / Dtype::I32.size()];
                self.stand_in(key, "string", Leaf::Scalar { dtype: Dtype::I32, shape, bytes });
            }
            State::List(items) => {
                for (at, item) in items.into_iter().enumerate() {
                    self.put(format!("{key}.{at}"), item);
                }
            }
        }
    }

    fn stand_in(&mut self, key: String, what: &str, leaf: Leaf<T>) {
        self.n_table += 1;
        self.encoded.metadata.insert(format!("2.{}.0", self.n_table), key.clone());
        self.encoded.metadata.insert(format!("2.{}.1", self.n_table), what.into());
        self.encoded.tensors.push((key, leaf));
    }
}

fn number<T>(dtype: Dtype, bytes: &[u8]) -> Leaf<T> {
    Leaf::Scalar { dtype, shape: Vec::new(), bytes: bytes.to_vec() }
}

pub(super) fn decode(source: &mut Source<'_>) -> Result<Vec<CacheState<TensorInfo>>> {
    let table = take_table(source)?;
    let mut decoder = Decoder { source, table };
    let mut layers = Vec::new();
    loop {
        let name_key = format!("1.{}", layers.len());
        let Some(name) = decoder.source.take_text(&name_key) else { return Ok(layers) };
        let class = decoder.source.class(name, &metadata_key(&name_key))?;
        let state = decoder.state(class, &layers.len().to_string(), 0)?;
        layers.push(CacheState { class: name.to_owned(), state });
    }
}

/// Reads group 2; every entry must name a tensor, and none twice.
fn take_table<'a>(source: &mut Source<'a>) -> Result<Table<'a>> {
    let mut table = Table::new();
    source.take_text("2.0");
    for n in 1_usize.. {
        let (tensor_key, what_key) = (format!("2.{n}.0"), format!("2.{n}.1"));
        let Some(tensor) = source.take_text(&tensor_key) else { break };
        if !source.has(tensor) {
            return Err(source.refuse_text(&tensor_key, "the key of a tensor", Some(tensor)));
        }
        let what = source.take_text(&what_key);
        let Some(what) = what.filter(|what| ["scalar", "string", "none"].contains(what)) else {
            return Err(source.refuse_text(&what_key, "'scalar', 'string' or 'none'", what));
        };
        if table.insert(tensor, what).is_some() {
            return Err(source.refuse_text(&tensor_key, "each tensor once", Some(tensor)));
        }
    }
    Ok(table)
}

struct Decoder<'a, 'b> {
    source: &'b mut Source<'a>,
    table: Table<'a>,
}

impl Decoder<'_, '_> {
    /// The state of a class whose entries lie below `key`.
    fn state(&mut self, class: &'static Class, key: &str, depth: usize) -> Result<State<TensorInfo>> {
        match class.rule {
            Rule::Children => return self.children(key, depth),
            Rule::Any => return self.any(key, 0)?.ok_or_else(|| self.source.missing(key, "state", class)),
            _ => {}
        }
        let fields = class.fields.iter().enumerate().map(|(at, field)| {
            let key = format!("{key}.{at}");
            match (self.leaf(&key)?, field.kind) {
                (Some(State::Str(text)), Kind::Slots) if text.is_empty() => Ok(State::List(Vec::new())),
                (Some(leaf), _) => Ok(leaf),
                (None, Kind::Slots) => self.items(&key),
                (None, Kind::Packed) if self.source.has(&format!("{key}.0")) => self.items(&key),
                (None, _) => Err(self.source.missing(&key, field.name, class)),
            }
        });
        fields.collect::<Result<_>>().map(State::List)
    }

    /// The children of a `CacheList`: state and class name of each.
    fn children(&mut self, key: &str, depth: usize) -> Result<State<TensorInfo>> {
        self.source.check_depth(key, depth)?;
        let mut children = Vec::new();
        match self.leaf(key)? {
            None => {}
            Some(State::Str(text)) if text.is_empty() => return Ok(State::List(children)),
            Some(other) => return Err(self.source.refuse(key, "the children of a CacheList", other.kind())),
        }
        loop {
            let child_key = format!("{key}.{}", children.len());
            let name_key = format!("{child_key}.1");
            let Some(leaf) = self.leaf(&name_key)? else { return Ok(State::List(children)) };
            let State::Str(name) = leaf else {
                return Err(self.source.refuse(&name_key, "the class name of a child, a string", leaf.kind()));
            };
            let class = self.source.class(&name, &name_key)?;
            let state = self.state(class, &format!("{child_key}.0"), depth + 1)?;
            children.push(State::List(vec![state, State::Str(name)]));
        }
    }

    /// Whatever stands at `key` and below; None if nothing does.
    fn any(&mut self, key: &str, level: usize) -> Result<Option<State<TensorInfo>>> {
        if self.source.has(key) {
            let empty_list = self.source.peek(key).is_some_and(|info| info.dtype == Dtype::I32 && info.shape == [0]);
            return self.leaf_of(key, MAX_STATE_TEXT).map(|leaf| match leaf {
                Some(State::Str(_)) if empty_list => Some(State::List(Vec::new())),
                leaf => leaf,
            });
        }
        if !self.source.has_below(key) {
            return Ok(None);
        }
        if level == MAX_LEVELS {
            return Err(self.source.refuse(key, format!("at most {MAX_LEVELS} lists in each other"), "one more"));
        }
        let mut items = Vec::new();
        while let Some(item) = self.any(&format!("{key}.{}", items.len()), level + 1)? {
            items.push(item);
        }
        Ok(Some(State::List(items)))
    }

    /// A list of leaves, up to the first number that is missing.
    fn items(&mut self, key: &str) -> Result<State<TensorInfo>> {
        let mut items = Vec::new();
        while let Some(leaf) = self.leaf(&format!("{key}.{}", items.len()))? {
            items.push(leaf);
        }
        Ok(State::List(items))
    }

    /// What the tensor at `key` stands for; None if there is none.
    fn leaf(&mut self, key: &str) -> Result<Option<State<TensorInfo>>> {
        self.leaf_of(key, MAX_TEXT)
    }

    /// The same, with texts of at most `max_text`.
    fn leaf_of(&mut self, key: &str, max_text: usize) -> Result<Option<State<TensorInfo>>> {
        let Some(info) = self.source.take(key) else { return Ok(None) };
        Ok(Some(match self.table.get(key).copied() {
            None => State::Array(info.clone()),
            Some("scalar") => self.source.scalar(info)?,
            Some("string") => State::Str(self.source.text(info, max_text)?),
            // Only "none" is left.
            Some(_) if info.n_bytes() == 0 => State::None,
            Some(_) => {
                return Err(self.source.refuse(key, "no elements, as it stands for none", format!("{:?}", info.shape)));
            }
        }))
    }
}
