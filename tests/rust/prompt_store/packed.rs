//! Records that are made smaller on the disk.

use super::common::*;
use mlxrs_py::store::prompt_store::{Compression, Options, PromptStore};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::{TempDir, tempdir};

fn open_with(path: &Path, compression: Option<Compression>) -> PromptStore {
    PromptStore::open(Options { compression, ..options(Some(path)) }).unwrap()
}

fn files(folder: &TempDir) -> Vec<PathBuf> {
    fs::read_dir(folder.path().join("records")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn records_of_both_forms_are_read_whatever_is_written_now() {
    let folder = tempdir().unwrap();
    let a = tokens(&[(1, 50)]);
    let forms = [None, Some(Compression::Zstd), None];
    let mut sizes = Vec::new();
    for (compression, n_tokens) in forms.into_iter().zip([16, 32, 50]) {
        let store = open_with(folder.path(), compression);
        let report = store.put(&space(1), &a[..n_tokens], rows(&space(1), &a[..n_tokens], n_tokens - 16, 20_000));
        let report = report.wait(None).unwrap().unwrap();
        sizes.push(report.n_bytes / report.n_written as u64);
        assert_eq!(restore(&store, &space(1), &a), (n_tokens, 0));
        assert_eq!(store.verify(false).unwrap().faults, Vec::<String>::new());
    }
    assert!(sizes[1] < sizes[0] * 7 / 8 && sizes[0] == sizes[2], "{sizes:?}");
    // What the index says of them follows from the files.
    fs::remove_file(folder.path().join("index.sqlite")).unwrap();
    let store = open_with(folder.path(), None);
    assert_eq!(restore(&store, &space(1), &a), (50, 0));
    assert!(store.list().iter().all(|listed| listed.record.n_bytes == 60_000), "as they were put");
    assert_eq!(store.verify(false).unwrap().faults, Vec::<String>::new());
    // Parts of a tensor are read too.
    let found = store.find(&space(1), &a);
    let opened: Vec<_> = store.open_records(&found.blocks).into_iter().flatten().collect();
    for record in &opened {
        let whole: Vec<u8> = record.tensors.values().fold(vec![0; 60_000], |mut whole, tensor| {
            whole[tensor.start as usize..][..tensor.n_bytes as usize].copy_from_slice(&record.read(tensor).unwrap());
            whole
        });
        for range in [0..1, 39_990..40_010, 20_001..20_001, 59_999..60_000, 0..60_000, 1..59_999] {
            let mut part = vec![0; range.len()];
            record.read_into(&mut part, range.start as u64).unwrap();
            assert_eq!(part, whole[range]);
        }
        assert!(record.read_into(&mut [0; 2], 59_999).is_err());
    }
}

/// A file's header with other metadata under a seal that is right.
fn forge(path: &Path, change: impl Fn(&str) -> String) {
    let bytes = fs::read(path).unwrap();
    let size = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let text = change(std::str::from_utf8(&bytes[8..8 + size]).unwrap().trim_end());
    let mut head = bytes[..8].to_vec();
    head.extend_from_slice(format!("{text:size$}").as_bytes());
    assert_eq!(head.len(), 8 + size);
    let data = &bytes[head.len()..bytes.len() - 32];
    let seal = *blake3::hash(&head).as_bytes();
    fs::write(path, [&head, data, &seal].concat()).unwrap();
}

#[test]
fn what_claims_to_become_other_bytes_than_it_does_is_a_miss() {
    let shape = "\\\"shape\\\":[1,4000]";
    let forgeries = [
        // More than there can be in so few bytes, more than anybody has, none, and a few more than there are.
        (shape, "\\\"shape\\\":[9000,4000]"),
        (shape, "\\\"shape\\\":[4294967295,4294967295,4294967295]"),
        (shape, "\\\"shape\\\":[0,4000]"),
        (shape, "\\\"shape\\\":[2,4000]"),
        (shape, "\\\"shape\\\":4000"),
        ("zstd", "none"),
        ("\\\"packed\\\":{", "\\\"packed\\\":{\\\"other\\\":{},"),
        ("\\\"version\\\":2", "\\\"version\\\":1"),
        ("\\\"version\\\":2", "\\\"version\\\":3"),
    ];
    for (from, to) in forgeries {
        let folder = tempdir().unwrap();
        let a = tokens(&[(1, 8)]);
        let store = open_with(folder.path(), Some(Compression::Zstd));
        put(&store, &space(1), &a, rows(&space(1), &a, 0, 4_000));
        drop(store);
        let file = files(&folder).remove(0);
        forge(&file, |text| {
            assert!(text.contains(from), "{text}");
            text.replacen(from, to, 1)
        });
        // With the index that knows better, and with one that is built from the forgery.
        let kept = fs::read(&file).unwrap();
        assert_eq!(restore(&open(folder.path()), &space(1), &a), (0, 0), "{to}");
        fs::write(&file, kept).unwrap();
        fs::remove_file(folder.path().join("index.sqlite")).unwrap();
        let store = open(folder.path());
        assert_eq!(restore(&store, &space(1), &a), (0, 0), "{to} without an index");
        assert_eq!(files(&folder).len(), 0, "put aside");
    }
}
