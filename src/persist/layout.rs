//! How a tensor lies in the file and in memory: integers only.

/// The bytes of one tensor, head by head: each head's rows lie together in the file and in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Where the tensor begins in the file.
    pub start: u64,
    /// Heads; 1 for a tensor that lies in memory as in the file.
    pub n_heads: usize,
    /// Bytes of a head in the file.
    pub in_file: usize,
    /// Of these, the bytes that are read or written: the first ones. What follows them is zero.
    pub valid: usize,
    /// Bytes of a head in memory.
    pub in_memory: usize,
}

impl Layout {
    /// A tensor that lies in memory as in the file.
    pub const fn plain(start: u64, n_bytes: usize) -> Self {
        Self { start, n_heads: 1, in_file: n_bytes, valid: n_bytes, in_memory: n_bytes }
    }

    /// One past its last byte in the file.
    pub const fn end(&self) -> u64 {
        self.start + (self.n_heads * self.in_file) as u64
    }
}
