//! From one format into the other.

use crate::fabricate::{forms, load, save};
use crate::recast;
use crate::wire::samples::{BOTH, Draft, all, all_empty, kv, only_v032, parent, user};
use mlxrs_py::Error;
use mlxrs_py::persist::wire::Format;
use mlxrs_py::persist::{CacheFile, convert};
use std::path::{Path, PathBuf};

/// Writes `bytes` into a new file.
fn put(folder: &tempfile::TempDir, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join("from.safetensors");
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn every_class_comes_through_with_its_bytes() {
    for format in BOTH {
        let more = if format == Format::V032 { only_v032() } else { vec![] };
        for cache in all().into_iter().chain(all_empty()).chain(more) {
            for caches in [vec![cache.clone()], vec![kv(3, 3), parent(vec![parent(vec![]), cache])]] {
                let file = save(format, &caches, &user()).unwrap();
                recast::check(&file, &load(&file).unwrap());
            }
        }
    }
}

#[test]
fn a_converted_file_holds_the_valid_rows_only() {
    let folder = tempfile::tempdir().unwrap();
    let from = put(&folder, &save(Format::V032, &[kv(256, 3), kv(256, 0)], &user()).unwrap());
    for format in BOTH {
        let saved = convert(&from, &folder.path().join("to"), format, true).unwrap();
        assert_eq!(saved.path, folder.path().join("to.safetensors"));
        let bytes = std::fs::read(&saved.path).unwrap();
        // Keys and values of three rows, and in format 0.32 two offsets.
        let n_data = 2 * 3 * 4 * 2 + if format == Format::V032 { 2 * 4 } else { 0 };
        assert_eq!((saved.n_bytes, bytes.len()), (bytes.len() as u64, 4096 + n_data));
        assert_eq!(forms(load(&bytes).unwrap()), [kv(3, 3), kv(0, 0)]);
    }
}

#[test]
fn a_file_may_be_converted_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = put(&folder, &save(Format::V032, &all(), &user()).unwrap());
    for format in [Format::V031, Format::V031, Format::V032] {
        convert(&path, &path, format, false).unwrap();
        let file = CacheFile::open(&path).unwrap();
        assert_eq!((file.format, &file.metadata), (format, &user()));
        assert_eq!(forms(load(&std::fs::read(&path).unwrap()).unwrap()), all());
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn metadata_that_mlx_lm_nested_is_kept() {
    let file = crate::fabricate::file(&Draft::new(Format::V032, &[kv(3, 3)]).text("0.a.b", "c").text("0.7", "d").0);
    recast::check(&file, &load(&file).unwrap());
    // Without a layer nothing would tell such a file from others.
    let file = crate::fabricate::file(&Draft::new(Format::V032, &[]).text("0.a.b", "c").0);
    let error = mlxrs_py::persist::recast(load(&file).unwrap(), Format::V031).unwrap_err();
    assert!(error.to_string().starts_with("convert: expected metadata with plain keys"), "{error}");
}

#[test]
fn what_a_format_cannot_say_is_told_and_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let old = folder.path().join("to.safetensors");
    std::fs::write(&old, b"old").unwrap();
    for cache in only_v032() {
        let from = put(&folder, &save(Format::V032, &[kv(3, 3), cache.clone()], &user()).unwrap());
        let error = convert(&from, &old, Format::V031, false).unwrap_err();
        assert!(
            matches!(error, Error::Value { op: "convert", .. }) && error.to_string().contains("layer 1"),
            "{error}"
        );
        assert_eq!(std::fs::read(&old).unwrap(), b"old");
    }
}

#[test]
fn a_file_that_lies_or_is_missing_is_not_converted() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("to.safetensors");
    let mut bytes = save(Format::V032, &[kv(3, 3)], &user()).unwrap();
    bytes.pop();
    let error = convert(&put(&folder, &bytes), &to, Format::V031, false).unwrap_err();
    assert!(matches!(error, Error::Format { .. }), "{error}");
    let error = convert(Path::new("/nowhere/x"), &to, Format::V031, false).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert!(!to.exists());
}

#[test]
fn reading_through_counts_every_byte_and_finds_what_was_cut_off_since() {
    let folder = tempfile::tempdir().unwrap();
    let path = put(&folder, &save(Format::V032, &[kv(300, 3), kv(3, 3)], &user()).unwrap());
    let file = CacheFile::open(&path).unwrap();
    assert_eq!(file.read_through().unwrap(), 2 * 303 * 4 * 2);
    let len = std::fs::metadata(&path).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len - 100).unwrap();
    assert!(matches!(file.read_through().unwrap_err(), Error::Format { .. }));
}
