//! A Rust user's view: a model, caches, a prefill in chunks. Run with `cargo run --example rust_prefill`.

use mlxrs_py::array::{Array, Dtype};
use mlxrs_py::cache::{Cache, CacheConfig, make_prompt_cache};
use mlxrs_py::prefill::{Model, prefill_full};

/// Stands for a language model: its keys and values are zeros.
struct Silent;

impl Model for Silent {
    fn forward(&mut self, tokens: &Array, caches: &mut [Cache]) -> mlxrs_py::Result<Array> {
        let n_tokens = tokens.shape()[1];
        let rows = Array::zeros(&[1, 4, n_tokens, 64], Dtype::Bf16)?;
        for cache in caches {
            cache.as_kv_mut()?.update(&rows, &rows)?;
        }
        Array::zeros(&[1, n_tokens, 32], Dtype::F32)
    }
}

fn main() -> mlxrs_py::Result<()> {
    let prompt: Vec<i32> = (0..1000).collect();
    let mut caches = make_prompt_cache(&CacheConfig { num_hidden_layers: 2, sliding_window: None })?;
    let logits = prefill_full(&mut Silent, &prompt, &mut caches, 256)?;
    assert_eq!(logits.shape(), [1, 1, 32]);
    assert!(caches.iter().all(|cache| cache.as_kv().is_ok_and(|cache| cache.offset() == prompt.len())));
    Ok(())
}
