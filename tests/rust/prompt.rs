//! The driver: a prompt into a file, through a fake model.

use crate::mock::MockModel;
use mlxrs_py::Result;
use mlxrs_py::cache::CacheConfig;
use mlxrs_py::persist::{CacheFile, load_prompt_cache};
use mlxrs_py::prompt::{META_TOKENS, META_TOKENS_BLAKE3, PromptInfo, cache_prompt_ids, hash_tokens};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const PLAIN: CacheConfig = CacheConfig { num_hidden_layers: 2, sliding_window: None };

fn cache(prompt: &[i32], config: &CacheConfig, path: &Path, extra: &[(&str, &str)]) -> Result<PromptInfo> {
    let extra: BTreeMap<_, _> = extra.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
    cache_prompt_ids(&mut MockModel::new(5), prompt, config, path, "the-model", "{\"a\": 1}", 3, &extra)
}

fn entries(folder: &Path) -> usize {
    fs::read_dir(folder).unwrap().count()
}

#[test]
fn an_empty_prompt_is_an_error_and_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    cache(&[], &PLAIN, &folder.path().join("a"), &[]).unwrap_err();
    assert_eq!(entries(folder.path()), 0);
}

#[test]
fn caches_are_fresh_for_every_prompt() {
    let folder = tempfile::tempdir().unwrap();
    for (name, prompt) in [("four", &[1, 2, 3, 4][..]), ("two", &[5, 6])] {
        let info = cache(prompt, &PLAIN, &folder.path().join(name), &[]).unwrap();
        assert_eq!(info.tokens_processed, prompt.len());
        assert_eq!(info.n_bytes, fs::metadata(&info.file).unwrap().len());
        let (caches, _) = load_prompt_cache(&folder.path().join(name)).unwrap();
        assert!(caches.len() == 2 && caches.iter().all(|cache| cache.as_kv().unwrap().offset() == prompt.len()));
    }
}

#[test]
fn a_sliding_window_gives_rotating_caches_that_a_load_names_so() {
    let folder = tempfile::tempdir().unwrap();
    let config = CacheConfig { num_hidden_layers: 3, sliding_window: Some(4) };
    let info = cache(&[1, 2, 3, 4, 5, 6], &config, &folder.path().join("ring"), &[]).unwrap();
    let (caches, _) = load_prompt_cache(&info.file).unwrap();
    assert_eq!(caches.len(), 3);
    for cache in &caches {
        let cache = cache.as_kv().unwrap();
        let seen = (cache.reference_class_name(), cache.max_size(), cache.offset());
        assert_eq!(seen, ("RotatingKVCache", Some(4), 6));
    }
}

#[test]
fn the_drivers_metadata_wins_over_the_users() {
    let folder = tempfile::tempdir().unwrap();
    let extra = [("model", "a lie"), ("tokenizer_config", "a lie"), (META_TOKENS, "0"), ("mine", "kept")];
    let info = cache(&[7, 8, 9], &PLAIN, &folder.path().join("m"), &extra).unwrap();
    let metadata = CacheFile::open(&info.file).unwrap().metadata;
    assert_eq!(metadata["model"], "the-model");
    assert_eq!(metadata["tokenizer_config"], "{\"a\": 1}");
    assert_eq!(metadata[META_TOKENS], "3");
    assert_eq!(metadata[META_TOKENS_BLAKE3], hash_tokens(&[7, 8, 9]));
    assert_eq!(metadata["mine"], "kept");
}

#[test]
fn metadata_that_the_format_would_change_is_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    for key in ["", "a.b", "7"] {
        let error = cache(&[1], &PLAIN, &folder.path().join("m"), &[(key, "x")]).unwrap_err();
        assert!(error.to_string().contains(&format!("{key:?}")), "{error}");
    }
    assert_eq!(entries(folder.path()), 0);
}

#[test]
fn a_failed_save_leaves_the_old_file_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let info = cache(&[1, 2, 3], &PLAIN, &folder.path().join("c"), &[("version", "old")]).unwrap();
    let before = fs::read(&info.file).unwrap();
    // The model fails in the middle of the prompt.
    let mut model = MockModel { fail_at: Some(1), ..MockModel::new(5) };
    cache_prompt_ids(&mut model, &[1, 2, 3, 4, 5], &PLAIN, &info.file, "m", "{}", 2, &BTreeMap::new()).unwrap_err();
    assert_eq!(fs::read(&info.file).unwrap(), before);
    assert_eq!(entries(folder.path()), 1);
    let (caches, metadata) = load_prompt_cache(&info.file).unwrap();
    assert_eq!((caches[0].as_kv().unwrap().offset(), metadata["version"].as_str()), (3, "old"));
}

#[test]
fn a_folder_as_target_is_refused_and_untouched() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("t.safetensors");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("inside"), "x").unwrap();
    cache(&[1, 2], &PLAIN, &target, &[]).unwrap_err();
    assert_eq!((entries(folder.path()), entries(&target)), (1, 1));
}
