//! What the states of the cache classes consist of: one table, which the checks and both file formats read.
//!
//! Nine classes are mlx-lm's, and the numbers those of mlx-lm 0.32.2; two are ours, for what mlx-lm cannot quantize. Rows are the entries of axis 2 of keys and values `(B, H, L, D)`: one per token.

mod check;
mod registry;
mod rows;

pub use check::{MAX_OFFSET, check, check_layers};
pub use registry::{MAX_NAME, register};
pub use rows::{Rows, map_arrays, n_rows};

use super::state::State;
use crate::array::Dtype;
use crate::error::Error;
use std::path::Path;

/// How deep `CacheList`s may stand in each other; models have one level.
pub const MAX_DEPTH: usize = 8;
/// How deep lists may stand in each other in the state of a registered class.
pub const MAX_LEVELS: usize = 64;
/// Letters that a text in the state of a registered class may have.
pub const MAX_STATE_TEXT: usize = 1 << 20;

/// Characters of a key or value that an error repeats.
const MAX_SHOWN: usize = 160;

/// Something that has the form of an array: the array itself, or its entry in a file's header.
pub trait Described {
    /// Length of every axis.
    fn shape(&self) -> Vec<usize>;
    /// Element type.
    fn dtype(&self) -> Dtype;
}

/// What is wrong with a state or a file, without the name of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Dotted key of the entry, or the part of the file.
    pub key: String,
    /// What belongs there.
    pub expected: String,
    /// What is there.
    pub got: String,
}

impl Fault {
    /// A fault at `key`. What came out of a file is shortened.
    pub fn new(key: &str, expected: impl Into<String>, got: impl AsRef<str>) -> Self {
        Self { key: shown(key), expected: expected.into(), got: shown(got.as_ref()) }
    }

    /// The fault as an error of the file at `path`.
    #[must_use]
    pub fn in_file(self, path: &Path) -> Error {
        Error::format(path, self.key, self.expected, self.got)
    }
}

/// `text`, cut after [`MAX_SHOWN`] characters.
fn shown(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// What one entry of a state is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Keys or values: one float array `(B, H, L, D)`, or none while the cache is empty.
    Rows,
    /// The same, affine-quantized: packed words, scales and biases, or none.
    Packed,
    /// An integer that is not negative.
    Count,
    /// A bool.
    Flag,
    /// An array `(B,)` of integers.
    PerSequence,
    /// The same, or none.
    MaybePerSequence,
    /// A list of arrays of any shape, each possibly none.
    Slots,
}

/// Where format 0.31 puts an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum V031 {
    /// Among the tensors, in the order of the fields.
    Tensor,
    /// Among the strings of `meta_state`, at this place.
    Text(usize),
    /// Nowhere: a count follows from the rows, anything else reads as none.
    Absent,
}

/// One entry of a state.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Attribute of mlx-lm's class.
    pub name: &'static str,
    /// What the entry is.
    pub kind: Kind,
    /// Where format 0.31 puts it.
    pub v031: V031,
}

/// How many rows are valid, and which numbers go together. The numbers are places in [`Class::fields`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The first `n`, where the field at this place is `n`; what follows is padding.
    First(usize),
    /// The first `offset - start_position`.
    Chunk,
    /// The first `offset`, or all once there are not more.
    Ring,
    /// The first `_idx`, or all once rotated.
    BatchRing,
    /// All.
    All,
    /// There are no rows.
    Slots,
    /// The state is a list of children, each a pair of its state and its class name.
    Children,
    /// The state is any tree: the class is a registered one.
    Any,
}

/// A cache class.
#[derive(Debug)]
pub struct Class {
    /// Its Python name.
    pub name: &'static str,
    /// False for a class that format 0.31 has no form for.
    pub in_v031: bool,
    /// The entries of its state; keys and values, if there are any, come first.
    pub fields: &'static [Field],
    /// Which rows are valid.
    pub rule: Rule,
}

const fn field(name: &'static str, kind: Kind, v031: V031) -> Field {
    Field { name, kind, v031 }
}

const KEYS: Field = field("keys", Kind::Rows, V031::Tensor);
const VALUES: Field = field("values", Kind::Rows, V031::Tensor);
const PACKED_KEYS: Field = field("keys", Kind::Packed, V031::Tensor);
const PACKED_VALUES: Field = field("values", Kind::Packed, V031::Tensor);
const OFFSETS: Field = field("offset", Kind::PerSequence, V031::Tensor);
const LEFT_PADDING: Field = field("left_padding", Kind::PerSequence, V031::Tensor);

/// The classes; a file that names another one, which is not [registered](register) either, is refused.
pub static CLASSES: [Class; 11] = [
    Class {
        name: "KVCache",
        in_v031: true,
        fields: &[KEYS, VALUES, field("offset", Kind::Count, V031::Absent)],
        rule: Rule::First(2),
    },
    Class {
        name: "RotatingKVCache",
        in_v031: true,
        fields: &[
            KEYS,
            VALUES,
            field("offset", Kind::Count, V031::Text(2)),
            field("keep", Kind::Count, V031::Text(0)),
            field("max_size", Kind::Count, V031::Text(1)),
            field("_idx", Kind::Count, V031::Text(3)),
        ],
        rule: Rule::Ring,
    },
    Class {
        name: "QuantizedKVCache",
        in_v031: true,
        fields: &[
            PACKED_KEYS,
            PACKED_VALUES,
            field("offset", Kind::Count, V031::Text(0)),
            field("group_size", Kind::Count, V031::Text(1)),
            field("bits", Kind::Count, V031::Text(2)),
        ],
        rule: Rule::First(2),
    },
    Class { name: "ConcatenateKVCache", in_v031: true, fields: &[KEYS, VALUES], rule: Rule::All },
    Class {
        name: "ChunkedKVCache",
        in_v031: true,
        fields: &[
            KEYS,
            VALUES,
            field("offset", Kind::Count, V031::Absent),
            field("chunk_size", Kind::Count, V031::Text(0)),
            field("start_position", Kind::Count, V031::Text(1)),
        ],
        rule: Rule::Chunk,
    },
    Class {
        name: "ArraysCache",
        in_v031: true,
        fields: &[
            field("cache", Kind::Slots, V031::Tensor),
            field("left_padding", Kind::MaybePerSequence, V031::Absent),
            field("lengths", Kind::MaybePerSequence, V031::Absent),
        ],
        rule: Rule::Slots,
    },
    Class { name: "CacheList", in_v031: true, fields: &[], rule: Rule::Children },
    Class {
        name: "BatchKVCache",
        in_v031: true,
        fields: &[KEYS, VALUES, OFFSETS, LEFT_PADDING, field("_idx", Kind::Count, V031::Absent)],
        rule: Rule::First(4),
    },
    Class {
        name: "BatchRotatingKVCache",
        in_v031: true,
        fields: &[
            KEYS,
            VALUES,
            OFFSETS,
            LEFT_PADDING,
            field("max_size", Kind::Count, V031::Text(0)),
            field("_offset", Kind::Count, V031::Text(1)),
            field("_idx", Kind::Count, V031::Text(2)),
            field("rotated", Kind::Flag, V031::Text(3)),
        ],
        rule: Rule::BatchRing,
    },
    Class {
        name: "QuantizedRotatingKVCache",
        in_v031: false,
        fields: &[
            PACKED_KEYS,
            PACKED_VALUES,
            field("offset", Kind::Count, V031::Absent),
            field("keep", Kind::Count, V031::Absent),
            field("max_size", Kind::Count, V031::Absent),
            field("_idx", Kind::Count, V031::Absent),
            field("group_size", Kind::Count, V031::Absent),
            field("bits", Kind::Count, V031::Absent),
        ],
        rule: Rule::Ring,
    },
    Class {
        name: "BatchQuantizedKVCache",
        in_v031: false,
        fields: &[
            PACKED_KEYS,
            PACKED_VALUES,
            OFFSETS,
            LEFT_PADDING,
            field("_idx", Kind::Count, V031::Absent),
            field("group_size", Kind::Count, V031::Absent),
            field("bits", Kind::Count, V031::Absent),
        ],
        rule: Rule::First(4),
    },
];

impl Class {
    /// The class called `name`: mlx-lm's, ours, or a registered one.
    pub fn find(name: &str) -> Option<&'static Self> {
        CLASSES.iter().find(|class| class.name == name).or_else(|| registry::find(name))
    }

    /// The class that `key` names.
    ///
    /// # Errors
    /// A fault that lists all classes.
    pub fn named(name: &str, key: &str) -> Result<&'static Self, Fault> {
        Self::find(name).ok_or_else(|| Fault::new(key, format!("a class among {}", Self::names()), format!("'{name}'")))
    }

    /// All names, for error texts.
    pub fn names() -> String {
        CLASSES.each_ref().map(|class| class.name).join(", ")
    }

    /// Place of the entry `name` in the state.
    pub fn place(&self, name: &str) -> Option<usize> {
        self.fields.iter().position(|field| field.name == name)
    }

    /// True if keys and values are the first two entries.
    pub const fn has_rows(&self) -> bool {
        !matches!(self.rule, Rule::Slots | Rule::Children | Rule::Any)
    }

    /// Number of `meta_state` strings in format 0.31.
    pub fn n_texts(&self) -> usize {
        self.fields.iter().filter(|field| matches!(field.v031, V031::Text(_))).count()
    }

    /// Valid rows among the `len` of a state that [`check`] accepts.
    pub fn valid_rows<T>(&self, fields: &[State<T>], len: usize) -> usize {
        let count = |at| count(fields, at) as usize;
        match self.rule {
            Rule::First(at) => count(at),
            Rule::Chunk => count(2).saturating_sub(count(4)),
            Rule::Ring => count(2).min(len),
            Rule::BatchRing if matches!(fields.get(7), Some(State::Bool(true))) => len,
            Rule::BatchRing => count(6),
            Rule::All | Rule::Slots | Rule::Children | Rule::Any => len,
        }
    }

    /// The count that says that all `len` rows are valid.
    pub fn count_of<T>(&self, fields: &[State<T>], len: usize) -> i64 {
        let start = if self.rule == Rule::Chunk { count(fields, 4) } else { 0 };
        start.saturating_add(len as i64)
    }

    /// True if the buffers may get any number of rows behind the valid ones: the class grows them by whole steps.
    pub const fn is_padded(&self) -> bool {
        matches!(self.rule, Rule::First(_) | Rule::Chunk)
    }
}

/// The integer at this place of a state; 0 if there is none.
fn count<T>(fields: &[State<T>], at: usize) -> i64 {
    if let Some(State::Int(value)) = fields.get(at) { *value } else { 0 }
}
