//! What becomes of files that load: real caches, which are updated, trimmed and saved.

use mlxrs_py::array::{Array, Dtype};
use mlxrs_py::cache::{Cache, KvTensor, State};
use mlxrs_py::persist::{CacheFile, SaveOptions, load_prompt_cache, save_prompt_cache};
use std::path::Path;

/// Loads `file` into real caches, goes on with those of the crate's classes, and saves them. `folder` is scratch.
pub fn revive(file: &[u8], folder: &Path) {
    let path = folder.join("damaged.safetensors");
    std::fs::write(&path, file).expect("scratch");
    let (states, _) = CacheFile::open(&path).expect("what decodes opens").read(None).expect("what decodes reads");
    let own = states.into_iter().filter(|cache| is_own(&cache.class, &cache.state));
    let mut caches: Vec<Cache> = own.map(|state| Cache::from_state(state).expect("what is checked is taken")).collect();
    for cache in caches.iter_mut().filter(|cache| cache.as_kv().is_ok()) {
        for n_tokens in [1, 3] {
            update(cache, n_tokens);
        }
        let before = cache.as_kv().unwrap().offset();
        match cache.as_dyn_mut().trim(2) {
            Ok(n) => assert_eq!(cache.as_kv().unwrap().offset() + n, before),
            Err(_) => assert!(!cache.as_dyn().is_trimmable()),
        }
    }
    let options = SaveOptions { durable: false, ..SaveOptions::default() };
    let saved =
        save_prompt_cache(&folder.join("again"), &caches, &[].into(), &options).expect("what lives can be saved");
    let (loaded, _) = load_prompt_cache(&saved.path).expect("what is saved can be loaded");
    let numbers = |caches: &[Cache]| {
        let offset = |cache: &Cache| cache.as_kv().ok().map(|cache| cache.offset());
        caches.iter().map(|cache| (offset(cache), cache.as_dyn().size(), cache.as_dyn().is_empty())).collect::<Vec<_>>()
    };
    assert_eq!(numbers(&loaded), numbers(&caches));
}

/// True if the crate has the class, and those of all children.
fn is_own(class: &str, state: &State<Array>) -> bool {
    let is_own_child = |child: &State<Array>| {
        let State::List(parts) = child else { return false };
        matches!(&parts[..], [state, State::Str(class)] if is_own(class, state))
    };
    Cache::of_class(class).is_some()
        && match state {
            State::List(children) if class == "CacheList" => children.iter().all(is_own_child),
            _ => true,
        }
}

/// Adds zeros of the shape that the cache holds, or of any if it is empty.
fn update(cache: &mut Cache, n_tokens: i32) {
    let group_size =
        if let Cache::Quantized(cache) = &*cache { Some(cache.scheme().group_size() as i32) } else { None };
    let zeros = |tensor: Option<KvTensor>| {
        let (shape, dtype) = match &tensor {
            None => ([1, 1, 1, group_size.unwrap_or(4)], Dtype::F32),
            Some(KvTensor::Dense(array)) => (array.shape().try_into().expect("four axes"), array.dtype()),
            Some(KvTensor::Quantized([_, scales, _])) => {
                let shape: [i32; 4] = scales.shape().try_into().expect("four axes");
                ([shape[0], shape[1], 1, shape[3] * group_size.unwrap_or(1)], scales.dtype())
            }
        };
        Array::zeros(&[shape[0], shape[1], n_tokens, shape[3]], dtype).expect("zeros")
    };
    let (keys, values) = (zeros(cache.as_kv().unwrap().keys()), zeros(cache.as_kv().unwrap().values()));
    let before = cache.as_kv().unwrap().offset();
    match cache.as_kv_mut().unwrap().update(&keys, &values) {
        Ok(_) => assert_eq!(cache.as_kv().unwrap().offset(), before + n_tokens as usize),
        // Offsets are counted in int32: at the very end there is no room.
        Err(error) => assert_eq!(cache.as_kv().unwrap().offset(), before, "{error}"),
    }
}
