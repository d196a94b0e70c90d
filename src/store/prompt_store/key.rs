//! What names a record: a hash of everything that its bytes depend on.

use std::fmt;

/// All but the tokens that rows depend on: model, adapter, quantization, namespace, classes of caches.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Space([u8; 32]);

impl Space {
    /// The space of a fingerprint.
    pub const fn new(fingerprint: [u8; 32]) -> Self {
        Self(fingerprint)
    }

    pub(super) const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Space({})", hex(&self.0))
    }
}

/// What a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RecordKind {
    /// Rows of tokens: a block, or the part of one.
    Rows,
    /// The states of recurrent layers at a token.
    State,
}

impl RecordKind {
    pub(super) const fn code(self) -> u8 {
        match self {
            Self::Rows => 0,
            Self::State => 1,
        }
    }

    pub(super) const fn of_code(code: i64) -> Option<Self> {
        match code {
            0 => Some(Self::Rows),
            1 => Some(Self::State),
            _ => None,
        }
    }
}

/// BLAKE3 of a record's parent, kind and tokens.
pub(super) type Key = [u8; 32];

/// The parent of the first block.
pub(super) fn root(space: &Space) -> Key {
    *blake3::Hasher::new_derive_key("mlxrs_py prompt store 1, root").update(&space.0).finalize().as_bytes()
}

/// The key of the record of `tokens` behind the block `parent`.
pub(super) fn child(parent: &Key, kind: RecordKind, tokens: &[u32]) -> Key {
    let mut hasher = blake3::Hasher::new_keyed(parent);
    hasher.update(&[kind.code()]).update(&bytes_of(tokens));
    *hasher.finalize().as_bytes()
}

/// The keys of the full blocks of `tokens`, each after its parent; the root first.
pub(super) fn chain(space: &Space, tokens: &[u32], block: usize) -> Vec<Key> {
    let mut keys = vec![root(space)];
    for tokens in tokens.chunks_exact(block) {
        keys.push(child(&keys[keys.len() - 1], RecordKind::Rows, tokens));
    }
    keys
}

/// Tokens as bytes that sort as they do.
pub(super) fn bytes_of(tokens: &[u32]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_be_bytes()).collect()
}

/// The tokens of such bytes.
pub(super) fn tokens_of(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks().0.iter().map(|&four| u32::from_be_bytes(four)).collect()
}

/// Hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Tokens that two sequences begin with.
pub(super) fn n_common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
