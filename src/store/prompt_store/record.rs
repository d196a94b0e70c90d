//! A record: the rows or the state that belong to some tokens, as bytes.

use super::key::{RecordId, Space};
use crate::array::Dtype;
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::sync::OnceLock;

/// Name of the tensor that ends a record's file.
pub(super) const SEAL: &str = "seal";

/// What a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RecordKind {
    /// Keys and values of the tokens.
    Rows,
    /// What layers that cannot be cut hold after the last of the tokens.
    State,
}

/// A tensor of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTensor {
    /// Its name, once in a record; not `seal`.
    pub name: String,
    /// Element type; not `F64`.
    pub dtype: Dtype,
    /// Length of every axis.
    pub shape: Vec<usize>,
    /// The elements, row after row.
    pub bytes: Vec<u8>,
}

/// A record to be stored. It covers the tokens from `start` to before `end`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewRecord {
    /// What it holds.
    pub kind: RecordKind,
    /// First token: a multiple of the store's block.
    pub start: usize,
    /// Token after the last: a block behind `start` for a full block, less for a tail. Of a state the boundary at
    /// which it was taken; `start` is then `end` rounded down to a block.
    pub end: usize,
    /// The step in whose full windows all rows were computed; 0 if there is none.
    pub grid: u32,
    /// First token from which the rows of all layers with a window are there; `start` if none is missing.
    pub complete_from: usize,
    /// A state that thinning must leave.
    pub keep: bool,
    /// The caller's own description, given back as it is.
    pub layout: String,
    /// The bytes.
    pub tensors: Vec<NewTensor>,
}

/// What a caller would store, to ask whether it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// As in [`NewRecord`].
    pub kind: RecordKind,
    /// As in [`NewRecord`].
    pub start: usize,
    /// As in [`NewRecord`].
    pub end: usize,
    /// As in [`NewRecord`].
    pub grid: u32,
    /// As in [`NewRecord`].
    pub complete_from: usize,
    /// As in [`NewRecord`].
    pub keep: bool,
}

/// What decides which of two records of one name stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Worth {
    pub is_on_grid: bool,
    pub complete_from: usize,
    pub keep: bool,
}

impl Worth {
    /// Better in something than `old`, and worse in nothing.
    pub const fn replaces(self, old: Self) -> bool {
        let is_worse =
            self.complete_from > old.complete_from || (!self.is_on_grid && old.is_on_grid) || (!self.keep && old.keep);
        let is_better =
            self.complete_from < old.complete_from || (self.is_on_grid && !old.is_on_grid) || (self.keep && !old.keep);
        is_better && !is_worse
    }
}

impl Wanted {
    pub(super) const fn worth(&self) -> Worth {
        Worth { is_on_grid: self.grid != 0, complete_from: self.complete_from, keep: self.keep }
    }
}

/// Records that have an order of their own: of each class the best one for a query stands next to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Class(u8);

impl Class {
    /// States.
    pub const STATE: Self = Self(1);
    /// Rows: whole ones on a grid and off, then those that lack rows of windowed layers, on a grid and off.
    pub const ROWS: [Self; 4] = [Self(0), Self(2), Self(4), Self(6)];

    /// As the index keeps it.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// Whether its records lack rows.
    pub fn lacks_rows(self) -> bool {
        Self::ROWS[2..].contains(&self)
    }
}

/// Checksum of a tensor's bytes: XXH3 with 64 bits, as fast as memory.
pub fn checksum(bytes: &[u8]) -> u64 {
    twox_hash::XxHash3_64::oneshot(bytes)
}

/// What the indices know of a record: all that identifies it and decides whether it serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub id: RecordId,
    pub parent: RecordId,
    pub space: Space,
    pub kind: RecordKind,
    pub start: usize,
    pub tokens: Vec<u32>,
    pub grid: u32,
    pub complete_from: usize,
    pub keep: bool,
    /// Bytes of the tensors.
    pub n_bytes: u64,
    /// Tells its file from others of the same name; 0 in memory.
    pub nonce: u64,
}

impl Entry {
    pub const fn end(&self) -> usize {
        self.start + self.tokens.len()
    }

    pub const fn worth(&self) -> Worth {
        Worth { is_on_grid: self.grid != 0, complete_from: self.complete_from, keep: self.keep }
    }

    pub const fn class(&self) -> Class {
        match self.kind {
            RecordKind::State => Class::STATE,
            RecordKind::Rows => Class::ROWS[2 * (self.complete_from > self.start) as usize + (self.grid == 0) as usize],
        }
    }

    /// Whether the name follows from the rest.
    pub fn is_named_right(&self) -> bool {
        self.id == name(&self.parent, self.kind, &self.tokens)
    }
}

/// Name of the record of `tokens` after the block `parent`.
pub(super) fn name(parent: &RecordId, kind: RecordKind, tokens: &[u32]) -> RecordId {
    match kind {
        RecordKind::Rows => parent.rows(tokens),
        RecordKind::State => parent.state(tokens),
    }
}

/// A tensor in memory, with its place among the record's bytes.
#[derive(Debug)]
pub(super) struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub start: u64,
    pub bytes: Vec<u8>,
    checksum: OnceLock<u64>,
}

impl Tensor {
    pub fn checksum(&self) -> u64 {
        *self.checksum.get_or_init(|| checksum(&self.bytes))
    }
}

/// A checked record in memory.
#[derive(Debug)]
pub(super) struct Record {
    pub entry: Entry,
    pub layout: String,
    /// Wide types first, so that each begins at a multiple of its element.
    pub tensors: Vec<Tensor>,
}

impl Record {
    /// Bytes that it takes in memory, roughly.
    pub fn size(&self) -> u64 {
        self.entry.n_bytes + self.entry.tokens.len() as u64 * 4 + self.layout.len() as u64 + 512
    }

    /// Checks `new`, which covers some of `tokens`; `chain` holds the names of the blocks, the root first.
    pub fn new(new: NewRecord, space: &Space, tokens: &[u32], chain: &[RecordId], block: usize) -> Result<Self> {
        let NewRecord { kind, start, end, grid, complete_from, keep, layout, tensors } = new;
        check_place(kind, start, end, tokens.len(), block)?;
        if complete_from < start || complete_from > end {
            return Err(wrong(format!("complete_from within {start} to {end}"), complete_from));
        }
        let mut names = BTreeSet::new();
        for tensor in &tensors {
            check_tensor(tensor)?;
            if !names.insert(tensor.name.as_str()) {
                return Err(wrong("each tensor's name once".into(), format!("'{}' twice", tensor.name)));
            }
        }
        let mut tensors: Vec<_> = tensors
            .into_iter()
            .map(|NewTensor { name, dtype, shape, bytes }| Tensor {
                name,
                dtype,
                shape,
                start: 0,
                bytes,
                checksum: OnceLock::new(),
            })
            .collect();
        tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.size()));
        let mut n_bytes = 0;
        for tensor in &mut tensors {
            tensor.start = n_bytes;
            n_bytes += tensor.bytes.len() as u64;
        }
        let (parent, tokens) = (chain[start / block], tokens[start..end].to_vec());
        let id = name(&parent, kind, &tokens);
        let space = *space;
        let entry = Entry { id, parent, space, kind, start, tokens, grid, complete_from, keep, n_bytes, nonce: 0 };
        Ok(Self { entry, layout, tensors })
    }
}

/// Checks that a record may cover the tokens from `start` to `end`, of `n_tokens`.
pub(super) fn check_place(kind: RecordKind, start: usize, end: usize, n_tokens: usize, block: usize) -> Result<()> {
    if !start.is_multiple_of(block) {
        return Err(wrong(format!("records that start at multiples of {block}"), start));
    }
    let lengths = match kind {
        RecordKind::Rows => 1..=block,
        RecordKind::State => 0..=block - 1,
    };
    match end.checked_sub(start) {
        Some(length) if lengths.contains(&length) && end <= n_tokens => Ok(()),
        _ => Err(wrong(
            format!("{} to {} tokens from {start} on, of {n_tokens}", lengths.start(), lengths.end()),
            format!("an end at {end}"),
        )),
    }
}

fn check_tensor(tensor: &NewTensor) -> Result<()> {
    let NewTensor { name, dtype, shape, bytes } = tensor;
    if name == SEAL || name == "__metadata__" || *dtype == Dtype::F64 {
        return Err(wrong("tensors not named 'seal', not of F64".into(), format!("'{name}' of {dtype:?}")));
    }
    let n_bytes = shape.iter().try_fold(dtype.size(), |size, &dim| size.checked_mul(dim));
    if n_bytes != Some(bytes.len()) {
        return Err(wrong(
            format!("as many bytes as {dtype:?} {shape:?} has"),
            format!("{} for '{name}'", bytes.len()),
        ));
    }
    Ok(())
}

fn wrong(expected: String, got: impl std::fmt::Display) -> Error {
    Error::value("put", expected, got)
}
