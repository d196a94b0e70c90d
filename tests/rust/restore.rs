//! Files that several threads read.

use crate::mock::rows_of;
use mlxrs_py::Error;
use mlxrs_py::array::{Array, Dtype};
use mlxrs_py::cache::{Cache, StandardKvCache};
use mlxrs_py::persist::{CacheFile, SaveOptions, save_prompt_cache};
use std::collections::BTreeMap;
use std::num::NonZero;
use std::path::Path;

/// A cache of `shape` whose bytes tell their place.
fn cache_of(shape: [i32; 4]) -> Cache {
    let rows = |seed: usize| {
        Array::from_host(&shape, Dtype::Bf16, |bytes| {
            bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 251 + at + seed) as u8 & 0x3f);
            Ok(())
        })
        .unwrap()
    };
    let mut cache = Cache::Standard(StandardKvCache::default());
    cache.as_kv_mut().unwrap().update(&rows(0), &rows(7)).unwrap();
    cache
}

fn bytes_of(path: &Path, threads: usize) -> Vec<Vec<u8>> {
    let (states, _) = CacheFile::open(path).unwrap().read(NonZero::new(threads)).unwrap();
    let mut all = Vec::new();
    for state in &states {
        state.state.for_each_array(&mut |array| all.push(array.to_bytes().unwrap()));
    }
    all
}

#[test]
fn any_number_of_threads_reads_the_same_bytes_and_zeros_behind_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.safetensors");
    // Many small heads, whole steps, a few large ones, one larger than what is read at once.
    let shapes = [[2, 40, 3, 8], [1, 4, 256, 32], [1, 3, 300, 128], [1, 1, 70_000, 64], [1, 1, 1, 1]];
    let caches: Vec<_> = shapes.into_iter().map(cache_of).collect();
    for padded in [false, true] {
        let options = SaveOptions { padded, durable: false, ..SaveOptions::default() };
        save_prompt_cache(&path, &caches, &BTreeMap::new(), &options).unwrap();
        let alone = bytes_of(&path, 1);
        let mut expected = Vec::new();
        for cache in &caches {
            cache.as_dyn().state().for_each_array(&mut |array| expected.push(array.to_bytes().unwrap()));
        }
        assert!(alone == expected, "padded {padded}");
        for threads in [2, 7, 100] {
            assert!(bytes_of(&path, threads) == alone, "{threads} threads");
        }
    }
}

#[test]
fn a_file_that_is_written_while_it_is_read_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.safetensors");
    let mut cache = Cache::Standard(StandardKvCache::default());
    cache.as_kv_mut().unwrap().update(&rows_of(&[1, 2, 3]), &rows_of(&[1, 2, 3])).unwrap();
    save_prompt_cache(&path, &[cache], &BTreeMap::new(), &SaveOptions::default()).unwrap();
    let file = CacheFile::open(&path).unwrap();
    let written = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    written.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(9)).unwrap();
    let error = file.read(None).unwrap_err();
    assert!(matches!(&error, Error::Format { got, .. } if got == "one that changed"), "{error}");
}
