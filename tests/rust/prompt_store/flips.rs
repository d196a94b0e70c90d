//! One bit flipped, wherever it lies: in a record it is found, in the index it changes no answer but to a miss.
//!
//! `MLXRS_STORE_FLIPS` sets how many bits of the index are tried; 0: all.

use super::common::*;
use mlxrs_py::store::prompt_store::{Compression, Found, Listed, Options, PromptStore, RecordKind};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use tempfile::{TempDir, tempdir};

/// A small store with what a store can hold, and its tokens.
fn sample(compression: Option<Compression>) -> (TempDir, Vec<u32>) {
    let folder = tempdir().unwrap();
    let store = PromptStore::open(Options { compression, ..options(Some(folder.path())) }).unwrap();
    let a = tokens(&[(1, 27)]);
    // Only what has some bytes can be made smaller.
    let size = if compression.is_some() { 400 } else { 16 };
    let mut records = rows(&space(1), &a, 0, size);
    records[1].grid = 16;
    records[1].complete_from = 12;
    records.push(record(&space(1), &a, RecordKind::State, 24, 27, 8));
    put(&store, &space(1), &a, records);
    let b = tokens(&[(1, 12), (2, 9)]);
    put(&store, &space(1), &b, rows(&space(1), &b, 8, 16));
    store.pin(&space(1), &b).unwrap();
    drop(store);
    (folder, a)
}

fn read_only(path: &Path) -> PromptStore {
    PromptStore::open(Options { read_only: true, ..options(Some(path)) }).unwrap()
}

#[test]
fn every_flipped_bit_of_a_record_is_found() {
    every_flipped_bit_is_found(None);
}

#[test]
fn every_flipped_bit_of_a_record_that_was_made_smaller_is_found() {
    every_flipped_bit_is_found(Some(Compression::Zstd));
}

fn every_flipped_bit_is_found(compression: Option<Compression>) {
    let (folder, a) = sample(compression);
    // A store that is only read puts nothing aside: the same one serves for all flips.
    let store = read_only(folder.path());
    let found = store.find(&space(1), &a);
    let block = found.blocks[1].clone();
    let is_good = || {
        let opened = store.open_records(std::slice::from_ref(&block)).remove(0);
        opened.is_some_and(|open| check(&space(1), &a, &block, &open))
    };
    assert!(is_good());
    let id = block.id.to_string();
    let files = fs::read_dir(folder.path().join("records")).unwrap().map(|entry| entry.unwrap().path());
    let path = files.into_iter().find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&id)).unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.windows(4).any(|window| window == b"zstd"), compression.is_some());
    let file = File::options().write(true).open(&path).unwrap();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            file.write_all_at(&[bytes[at] ^ 1 << bit], at as u64).unwrap();
            assert!(!is_good(), "bit {bit} of byte {at} of {}", bytes.len());
        }
        file.write_all_at(&bytes[at..=at], at as u64).unwrap();
    }
    for size in [0, 1, 8, 4095, bytes.len() - 33, bytes.len() - 1] {
        file.set_len(size as u64).unwrap();
        assert!(!is_good(), "{size} of {} bytes", bytes.len());
        fs::write(&path, &bytes).unwrap();
    }
    fs::write(&path, [&bytes[..], b"x"].concat()).unwrap();
    assert!(!is_good(), "a byte more");
    fs::write(&path, &bytes).unwrap();
    assert!(is_good());
}

/// Whether `now` says nothing that `whole` does not say.
fn agrees(now: &Found, whole: &Found) -> bool {
    let is_known = |state| whole.states.contains(state);
    let whole_rows: Vec<_> = whole.blocks.iter().chain(&whole.partials).collect();
    let is_start = now.blocks.iter().zip(&whole.blocks).all(|(a, b)| a == b) && now.blocks.len() <= whole.blocks.len();
    // With blocks missing, the next one serves as the nearest; a block then differs from what was whole in nothing.
    let partial = now.partials.iter().all(|partial| {
        whole_rows.iter().any(|row| {
            let mut row = (*row).clone();
            row.n_common = partial.n_common;
            row == *partial
        }) || partial.n_common < partial.end - partial.start
    });
    is_start && partial && now.states.iter().all(is_known)
}

fn is_known(listed: &Listed, whole: &[Listed]) -> bool {
    let mut listed = listed.clone();
    whole.iter().any(|known| {
        (listed.hits, listed.last_used) = (known.hits, known.last_used);
        listed == *known
    })
}

#[test]
fn a_flipped_bit_of_the_index_gives_the_same_answer_or_a_miss_and_is_mended() {
    let (folder, a) = sample(None);
    let path = folder.path().join("index.sqlite");
    let index = fs::read(&path).unwrap();
    let store = read_only(folder.path());
    let (whole, listed) = (store.find(&space(1), &a), store.list());
    assert_eq!((whole.blocks.len(), whole.states.len(), listed.len()), (3, 1, 7));
    drop(store);
    let n_bits = index.len() as u64 * 8;
    let n_flips = match env_number("MLXRS_STORE_FLIPS", 600) {
        0 => n_bits,
        n_flips => n_flips.min(n_bits),
    };
    let (mut n_same, mut n_mended) = (0, 0);
    for flip in 0..n_flips {
        // Steps through all of the file, and through the bits of a byte.
        let bit = if n_flips == n_bits { flip } else { (flip * (n_bits / n_flips)) + flip % 8 };
        let mut flipped = index.clone();
        flipped[bit as usize / 8] ^= 1 << (bit % 8);
        // In place, as a failing disk does.
        for ending in ["-wal", "-shm"] {
            let _ = fs::remove_file(folder.path().join(format!("index.sqlite{ending}")));
        }
        fs::write(&path, &flipped).unwrap();
        let store = read_only(folder.path());
        let now = store.find(&space(1), &a);
        let is_same = now == whole;
        n_same += u64::from(is_same);
        assert!(agrees(&now, &whole), "bit {bit}: {now:?}");
        assert!(store.list().iter().all(|now| is_known(now, &listed)), "bit {bit}");
        restore(&store, &space(1), &a);
        drop(store);
        // Whatever changed an answer is mended, and now and then what changed none.
        if !is_same || flip % (n_flips / 60).clamp(1, 128) == 0 {
            n_mended += 1;
            let store = open(folder.path());
            assert!(agrees(&store.find(&space(1), &a), &whole), "bit {bit}");
            assert!(store.verify(true).unwrap().is_repaired);
            assert_eq!(store.find(&space(1), &a), whole, "bit {bit}");
            assert_eq!(restore(&store, &space(1), &a), (27, 27));
            assert_eq!(store.verify(false).unwrap().faults, Vec::<String>::new(), "bit {bit}");
        }
    }
    eprintln!(
        "{n_flips} of {n_bits} bits of the index: {n_same} give the same answer, the others miss; {n_mended} were mended"
    );
}
