//! Caches into files and back.

use crate::mock::{rows_of, tokens_of};
use mlxrs_py::Error;
use mlxrs_py::array::{Array, Dtype};
use mlxrs_py::cache::{
    Cache, ConcatenateKvCache, KvCache, KvTensor, QuantizedKvCache, RotatingKvCache, StandardKvCache, State,
};
use mlxrs_py::persist::{CacheFile, Format, SaveOptions, load_prompt_cache, save_prompt_cache};
use std::collections::BTreeMap;
use std::path::Path;

const FORMATS: [Format; 2] = [Format::V031, Format::V032];

fn options(format: Format) -> SaveOptions {
    SaveOptions { format, durable: false, ..SaveOptions::default() }
}

fn save(path: &Path, caches: &[Cache], options: &SaveOptions) -> u64 {
    let metadata = BTreeMap::from([("model".to_owned(), "m".to_owned())]);
    let saved = save_prompt_cache(path, caches, &metadata, options).unwrap();
    assert_eq!(saved.n_bytes, std::fs::metadata(&saved.path).unwrap().len());
    saved.n_bytes
}

fn feed(cache: &mut dyn KvCache, tokens: std::ops::Range<i32>) {
    let rows = rows_of(&tokens.collect::<Vec<_>>());
    cache.update(&rows, &rows).unwrap();
}

fn ring(max_size: usize, keep: usize, updates: &[i32]) -> Cache {
    let mut cache = RotatingKvCache::new(max_size, keep).unwrap();
    for &n in updates {
        let first = cache.offset() as i32;
        feed(&mut cache, first..first + n);
    }
    Cache::Rotating(cache)
}

fn all() -> Vec<Cache> {
    let mut standard = StandardKvCache::default();
    feed(&mut standard, 0..300);
    let mut concatenate = ConcatenateKvCache::default();
    feed(&mut concatenate, 0..5);
    let mut quantized = QuantizedKvCache::new(32, 4).unwrap();
    let rows = Array::arange(0, 64 * 7).unwrap().reshape(&[1, 1, 7, 64]).unwrap().astype(Dtype::F16).unwrap();
    quantized.update(&rows, &rows).unwrap();
    let mut all = vec![Cache::Standard(standard), Cache::Concatenate(concatenate), Cache::Quantized(quantized)];
    all.extend([
        ring(8, 2, &[5]),
        ring(8, 2, &[12]),
        ring(8, 2, &[12, 1, 1]),
        ring(8, 0, &[1; 9]),
        ring(600, 4, &[1; 3]),
    ]);
    all.extend([Cache::Standard(StandardKvCache::default()), Cache::Concatenate(ConcatenateKvCache::default())]);
    all.extend([ring(8, 2, &[]), Cache::Quantized(QuantizedKvCache::new(64, 8).unwrap())]);
    all
}

/// The bytes of the valid rows, or nothing for an empty cache.
fn content(cache: &Cache) -> Vec<Vec<u8>> {
    let Ok((keys, values)) = cache.as_kv().unwrap().keys_and_values() else { return Vec::new() };
    [keys, values].iter().flat_map(KvTensor::arrays).map(|array| array.to_bytes().unwrap()).collect()
}

fn numbers(cache: &Cache) -> Vec<i64> {
    let State::List(fields) = cache.as_dyn().state() else { panic!() };
    fields.iter().filter_map(|field| if let State::Int(value) = field { Some(*value) } else { None }).collect()
}

#[test]
fn every_cache_comes_back_in_both_formats_and_goes_on_alike() {
    let folder = tempfile::tempdir().unwrap();
    for format in FORMATS {
        for padded in [false, true].into_iter().filter(|&padded| !padded || format == Format::V032) {
            let path = folder.path().join(format!("{format}-{padded}"));
            let mut caches = all();
            save(&path, &caches, &SaveOptions { padded, ..options(format) });
            let (mut loaded, metadata) = load_prompt_cache(&path).unwrap();
            assert_eq!(metadata["model"], "m");
            assert_eq!(loaded.len(), caches.len());
            for (index, (a, b)) in caches.iter_mut().zip(&mut loaded).enumerate() {
                assert_eq!(a.as_dyn().reference_class_name(), b.as_dyn().reference_class_name());
                assert_eq!((numbers(a), content(a)), (numbers(b), content(b)), "{format} {padded} {index}");
                for _ in 0..3 {
                    let first = a.as_kv().unwrap().offset() as i32;
                    if !matches!(a, Cache::Quantized(_)) {
                        feed(a.as_kv_mut().unwrap(), first..first + 1);
                        feed(b.as_kv_mut().unwrap(), first..first + 1);
                    }
                }
                assert_eq!(content(a), content(b), "{format} {padded} {index}");
            }
        }
    }
}

#[test]
fn a_trimmed_cache_writes_its_valid_rows_and_no_byte_of_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.safetensors");
    let secret = 7_777_777_i32;
    for format in FORMATS {
        for padded in [false, true].into_iter().filter(|&padded| !padded || format == Format::V032) {
            for mut cache in [Cache::Standard(StandardKvCache::default()), ring(2000, 4, &[])] {
                feed(cache.as_kv_mut().unwrap(), 0..100);
                let tokens = vec![secret; 900];
                cache.as_kv_mut().unwrap().update(&rows_of(&tokens), &rows_of(&tokens)).unwrap();
                assert_eq!(cache.as_dyn_mut().trim(900).unwrap(), 900);
                let n_bytes = save(&path, &[cache.clone()], &SaveOptions { padded, ..options(format) });
                let valid = 2 * 100 * 16;
                if !padded {
                    assert!(n_bytes - 4096 <= valid * 105 / 100, "{n_bytes}");
                }
                let bytes = std::fs::read(&path).unwrap();
                let needle = (secret as f32).to_ne_bytes();
                assert!(!bytes.windows(4).any(|window| window == needle), "{format} {padded}");
                let (loaded, _) = load_prompt_cache(&path).unwrap();
                assert_eq!(content(&loaded[0]), content(&cache));
            }
        }
    }
}

#[test]
fn growing_buffers_come_back_padded_to_whole_steps_with_zeros_behind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p");
    let mut cache = StandardKvCache::default();
    feed(&mut cache, 1..301);
    save(&path, &[Cache::Standard(cache)], &options(Format::V032));
    let (loaded, _) = load_prompt_cache(&path).unwrap();
    let Cache::Standard(cache) = &loaded[0] else { panic!() };
    let keys = cache.keys.as_ref().unwrap();
    assert_eq!(keys.shape(), [1, 1, 512, 4]);
    let tokens = tokens_of(keys);
    assert!(tokens[..300].iter().copied().eq(1..301) && tokens[300..].iter().all(|&token| token == 0));
}

#[test]
fn the_data_begins_at_a_whole_page() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("h.safetensors");
    save(&path, &all(), &options(Format::V032));
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    assert_eq!((8 + length) % 4096, 0);
    assert_eq!(bytes[8 + length - 1], b' ');
}

#[test]
fn a_load_finds_the_name_with_and_without_its_ending() {
    let folder = tempfile::tempdir().unwrap();
    save(&folder.path().join("x.bin"), &all(), &options(Format::V032));
    assert!(folder.path().join("x.bin.safetensors").exists());
    CacheFile::open(&folder.path().join("x.bin")).unwrap();
    CacheFile::open(&folder.path().join("x.bin.safetensors")).unwrap();
    // The exact name comes first.
    std::fs::write(folder.path().join("x.bin"), "not a cache").unwrap();
    assert!(matches!(CacheFile::open(&folder.path().join("x.bin")), Err(Error::Format { .. })));
}

#[test]
fn what_is_no_file_is_an_io_error_with_its_path() {
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().join("missing"), folder.path().to_owned()] {
        let error = CacheFile::open(&path).unwrap_err();
        assert!(matches!(error, Error::Io { .. }) && error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn a_cut_file_is_refused_at_every_length() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.safetensors");
    save(&path, &[ring(8, 2, &[5])], &options(Format::V032));
    let whole = std::fs::read(&path).unwrap();
    for length in (0..whole.len()).step_by(7).chain([whole.len() - 1]) {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = load_prompt_cache(&path).unwrap_err();
        assert!(matches!(error, Error::Format { .. }), "{length}: {error}");
    }
}

#[test]
fn a_file_that_shrinks_after_the_check_is_an_error_not_a_short_cache() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.safetensors");
    save(&path, &all(), &options(Format::V032));
    let file = CacheFile::open(&path).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(5000).unwrap();
    assert!(matches!(file.read(None), Err(Error::Format { .. })));
}

#[test]
fn padding_is_refused_where_the_format_cannot_say_it() {
    let folder = tempfile::tempdir().unwrap();
    let options = SaveOptions { padded: true, ..options(Format::V031) };
    save_prompt_cache(&folder.path().join("x"), &all(), &BTreeMap::new(), &options).unwrap_err();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
