//! L5: the driver. A prompt goes through a model into fresh caches, and those into a file.

use crate::cache::{CacheConfig, make_prompt_cache};
use crate::error::{Error, Result};
use crate::persist::{self, SaveOptions, save_prompt_cache};
use crate::prefill::{Model, materialize_caches, prefill_full};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use crate::persist::effective_safetensors_path;

/// Metadata key of the model's name.
pub const META_MODEL: &str = "model";
/// Metadata key of the tokenizer's configuration, JSON.
pub const META_TOKENIZER_CONFIG: &str = "tokenizer_config";
/// Metadata key of the number of tokens.
pub const META_TOKENS: &str = "mlxrs_tokens";
/// Metadata key of the hash of the tokens: BLAKE3 over the ids as little-endian 64-bit integers.
pub const META_TOKENS_BLAKE3: &str = "mlxrs_tokens_blake3";

/// What [`cache_prompt_ids`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptInfo {
    /// Tokens that went into the caches.
    pub tokens_processed: usize,
    /// The file that was written.
    pub file: PathBuf,
    /// Its size in bytes.
    pub n_bytes: u64,
}

/// Runs `prompt` through `model` into fresh caches and saves them, durably.
///
/// The file gets the metadata of mlx-lm (`model`, `tokenizer_config`), the number of tokens and their hash; these win
/// over keys of the same names in `extra_metadata`.
///
/// # Errors
/// [`Error::Value`] for an empty prompt or metadata that the format would change, before any work; what the model
/// meets; [`Error::Io`] if the file cannot be written. An older file at `out_path` then stays as it was.
#[expect(clippy::too_many_arguments, reason = "the driver's published signature")]
pub fn cache_prompt_ids(
    model: &mut dyn Model,
    prompt: &[i32],
    config: &CacheConfig,
    out_path: &Path,
    model_id: &str,
    tokenizer_config_json: &str,
    step: usize,
    extra_metadata: &BTreeMap<String, String>,
) -> Result<PromptInfo> {
    if prompt.is_empty() {
        return Err(Error::value("cache_prompt_ids", "at least one token", "an empty prompt"));
    }
    let mut metadata = extra_metadata.clone();
    metadata.insert(META_MODEL.to_owned(), model_id.to_owned());
    metadata.insert(META_TOKENIZER_CONFIG.to_owned(), tokenizer_config_json.to_owned());
    metadata.insert(META_TOKENS.to_owned(), prompt.len().to_string());
    metadata.insert(META_TOKENS_BLAKE3.to_owned(), hash_tokens(prompt));
    persist::check_metadata(&metadata)?;

    let mut caches = make_prompt_cache(config)?;
    prefill_full(model, prompt, &mut caches, step)?;
    materialize_caches(&caches)?;
    let saved = save_prompt_cache(out_path, &caches, &metadata, &SaveOptions::default())?;
    Ok(PromptInfo { tokens_processed: prompt.len(), file: saved.path, n_bytes: saved.n_bytes })
}

/// BLAKE3 of token ids, as 64 hex digits.
pub fn hash_tokens(tokens: &[i32]) -> String {
    let mut hasher = blake3::Hasher::new();
    for &token in tokens {
        hasher.update(&i64::from(token).to_le_bytes());
    }
    hasher.finalize().to_hex().to_string()
}
