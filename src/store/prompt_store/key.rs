//! Names of records: a chain of hashes from the space over the blocks.

use std::fmt;

/// Distinguishes the roots of this format from all other uses of BLAKE3.
const ROOT: &str = "mlxrs_py 2025 prompt store root";

/// Everything but the tokens that decides what rows hold: a fingerprint of model, adapter, quantization, namespace,
/// classes of caches and the format's version. The store compares it and knows no more of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Space(pub [u8; 32]);

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(f, &self.0)
    }
}

/// Name of a record: BLAKE3 over its tokens and kind, keyed by the name of the block before it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordId(pub(super) [u8; 32]);

impl RecordId {
    /// Before the first block of `space`. Blocks of another size make another tree.
    pub(super) fn root(space: &Space, block_tokens: usize) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(ROOT);
        hasher.update(&space.0).update(&(block_tokens as u64).to_le_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    /// Of the rows of `tokens` after this block.
    pub(super) fn rows(&self, tokens: &[u32]) -> Self {
        Self(*blake3::keyed_hash(&self.0, &little_endian(tokens)).as_bytes())
    }

    /// Of the state after this block and `tokens`.
    pub(super) fn state(&self, tokens: &[u32]) -> Self {
        let mut bytes = little_endian(tokens);
        // A length that no rows have.
        bytes.push(b'S');
        Self(*blake3::keyed_hash(&self.0, &bytes).as_bytes())
    }

    /// The id that 64 hexadecimal digits write.
    pub fn from_hex(text: &str) -> Option<Self> {
        let text: &[u8; 64] = text.as_bytes().try_into().ok()?;
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.chunks(2)) {
            let digit = |at: usize| match pair[at] {
                digit @ b'0'..=b'9' => Some(digit - b'0'),
                digit @ b'a'..=b'f' => Some(digit - b'a' + 10),
                _ => None,
            };
            *byte = digit(0)? << 4 | digit(1)?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(f, &self.0)
    }
}

impl fmt::Debug for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(f, &self.0)
    }
}

fn hex(f: &mut fmt::Formatter<'_>, bytes: &[u8; 32]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn little_endian(tokens: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(tokens.len() * 4 + 1);
    for token in tokens {
        bytes.extend_from_slice(&token.to_le_bytes());
    }
    bytes
}
