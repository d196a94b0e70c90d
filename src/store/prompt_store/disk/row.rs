//! A row of the index: what it knows of a record, under a checksum.

use crate::store::prompt_store::key::{RecordId, Space};
use crate::store::prompt_store::record::{Entry, RecordKind, checksum};

/// Bytes of a packed row, its checksum included.
const N_BYTES: usize = 3 * 32 + 2 + 6 * 8 + 4;
const KEEP: u8 = 1;
const PINNED: u8 = 2;

/// A record of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub entry: Entry,
    /// Bytes of its file, in whole pages.
    pub size: u64,
    pub is_pinned: bool,
}

impl Row {
    pub fn slot(&self) -> i64 {
        slot(&self.entry.id)
    }

    /// Name of its file.
    pub fn file_name(&self) -> String {
        file_name(&self.entry.id, self.entry.nonce)
    }

    /// The row but for the tokens.
    pub fn pack(&self) -> Vec<u8> {
        let Entry { id, parent, space, kind, start, grid, complete_from, keep, n_bytes, nonce, .. } = &self.entry;
        let mut body = Vec::with_capacity(N_BYTES);
        for key in [&id.0, &parent.0, &space.0] {
            body.extend_from_slice(key);
        }
        body.push(*kind as u8);
        body.push((u8::from(*keep) * KEEP) | (u8::from(self.is_pinned) * PINNED));
        body.extend_from_slice(&grid.to_le_bytes());
        for number in [*start as u64, *complete_from as u64, *n_bytes, self.size, *nonce] {
            body.extend_from_slice(&number.to_le_bytes());
        }
        let check = check(&body, &big_endian(&self.entry.tokens));
        body.extend_from_slice(&check.to_le_bytes());
        body
    }

    /// The row that `body` and `tokens` make in `slot`; None if any bit of them is not as it was packed.
    pub fn unpack(slot: i64, tokens: &[u8], body: &[u8]) -> Option<Self> {
        if body.len() != N_BYTES || !tokens.len().is_multiple_of(4) {
            return None;
        }
        let (packed, expected) = body.split_last_chunk::<8>()?;
        if check(packed, tokens) != u64::from_le_bytes(*expected) {
            return None;
        }
        let (id, rest) = packed.split_first_chunk::<32>()?;
        let (parent, rest) = rest.split_first_chunk::<32>()?;
        let (space, rest) = rest.split_first_chunk::<32>()?;
        let (&[kind, flags], rest) = rest.split_first_chunk::<2>()?;
        let (grid, rest) = rest.split_first_chunk::<4>()?;
        let mut numbers = rest.chunks_exact(8).map(|bytes| bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)));
        let mut next = || numbers.next();
        let (start, complete_from, n_bytes, size, nonce) = (next()?, next()?, next()?, next()?, next()?);
        let entry = Entry {
            id: RecordId(*id),
            parent: RecordId(*parent),
            space: Space(*space),
            kind: [RecordKind::Rows, RecordKind::State].into_iter().find(|known| *known as u8 == kind)?,
            start: usize::try_from(start).ok()?,
            tokens: tokens.chunks_exact(4).map(|t| u32::from_be_bytes([t[0], t[1], t[2], t[3]])).collect(),
            grid: u32::from_le_bytes(*grid),
            complete_from: usize::try_from(complete_from).ok()?,
            keep: flags & KEEP != 0,
            n_bytes,
            nonce,
        };
        let row = Self { entry, size, is_pinned: flags & PINNED != 0 };
        (row.slot() == slot).then_some(row)
    }
}

/// Where the index keeps the record `id`: its first bytes. Of two that share them one is stored.
pub fn slot(id: &RecordId) -> i64 {
    prefix(&id.0)
}

/// The first bytes of a key as a number of SQL.
pub fn prefix(key: &[u8; 32]) -> i64 {
    key.first_chunk().map_or(0, |bytes| i64::from_be_bytes(*bytes))
}

/// Tokens as bytes whose order is that of the tokens.
pub fn big_endian(tokens: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(tokens.len() * 4);
    for token in tokens {
        bytes.extend_from_slice(&token.to_be_bytes());
    }
    bytes
}

/// Name of the file of the record `id`.
pub fn file_name(id: &RecordId, nonce: u64) -> String {
    format!("{id}-{nonce:016x}.safetensors")
}

/// What [`file_name`] made, taken apart.
pub fn parse_file_name(name: &str) -> Option<(RecordId, u64)> {
    let (id, nonce) = name.strip_suffix(".safetensors")?.split_once('-')?;
    let nonce = u64::from_str_radix(nonce, 16).ok()?;
    let id = RecordId::from_hex(id)?;
    (file_name(&id, nonce) == name).then_some((id, nonce))
}

fn check(body: &[u8], tokens: &[u8]) -> u64 {
    let mut bytes = Vec::with_capacity(body.len() + tokens.len());
    bytes.extend_from_slice(body);
    bytes.extend_from_slice(tokens);
    checksum(&bytes)
}
