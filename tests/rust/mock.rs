//! A fake model: every layer's cache gets keys and values that depend on the tokens alone.

use mlxrs_py::Result;
use mlxrs_py::array::{Array, Dtype};
use mlxrs_py::cache::Cache;
use mlxrs_py::prefill::Model;

/// Keys and values are the token ids as floats, `(1, 1, S, 4)`; logits are zeros `(1, S, vocab)`.
pub struct MockModel {
    pub vocab: i32,
    /// Lengths of the windows seen.
    pub windows: Vec<usize>,
    /// Fails in the window with this index, after the first layer was updated.
    pub fail_at: Option<usize>,
}

impl MockModel {
    pub fn new(vocab: i32) -> Self {
        Self { vocab, windows: Vec::new(), fail_at: None }
    }
}

/// `(1, 1, S, 4)` float32, each row filled with its token id.
pub fn rows_of(tokens: &[i32]) -> Array {
    let bytes: Vec<u8> = tokens.iter().flat_map(|&t| (t as f32).to_ne_bytes().repeat(4)).collect();
    Array::from_host(&[1, 1, tokens.len() as i32, 4], Dtype::F32, |out| {
        out.copy_from_slice(&bytes);
        Ok(())
    })
    .unwrap()
}

/// The first number of each row of `(1, 1, S, 4)` float32.
pub fn tokens_of(rows: &Array) -> Vec<i32> {
    let bytes = rows.to_bytes().unwrap();
    bytes.chunks_exact(16).map(|row| f32::from_ne_bytes(row[..4].try_into().unwrap()) as i32).collect()
}

impl Model for MockModel {
    fn forward(&mut self, tokens: &Array, caches: &mut [Cache]) -> Result<Array> {
        let n_tokens = tokens.dim(1);
        self.windows.push(n_tokens);
        let rows = tokens.astype(Dtype::F32)?.reshape(&[1, 1, -1, 1])?;
        let rows = Array::concatenate(&[&rows, &rows, &rows, &rows], 3)?;
        for cache in caches {
            cache.as_kv_mut()?.update(&rows, &rows)?;
            if self.fail_at == Some(self.windows.len() - 1) {
                return Err(mlxrs_py::Error::value("forward", "no fault", "a fault"));
            }
        }
        Array::zeros(&[1, n_tokens as i32, self.vocab], Dtype::F32)
    }
}
