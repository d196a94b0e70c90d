//! Damaged files: none may make the readers panic, and what they accept must hold together.
//!
//! `MLXRS_FUZZ_INPUTS` sets how many are tried. A failure names its seed, which makes the same file again.

use crate::damage::{Aim, input, input_of};
use crate::fabricate::{Xorshift, decode, forms, load, save};
use crate::recast;
use crate::revive::revive;
use mlxrs_py::persist::header;
use mlxrs_py::persist::wire::{Decoded, Format};
use std::path::Path;

/// Files at most that are brought to life: system calls are slow.
const MAX_REVIVED: u64 = 100_000;

/// What is done with every file that loads: converted, saved in the format that says everything, and loaded again.
fn exercise(file: &[u8], decoded: Decoded) {
    recast::check(file, &decoded);
    let user = decoded.metadata.clone();
    let user = user.into_iter().filter(|(key, _)| key.chars().all(char::is_alphabetic) && !key.is_empty()).collect();
    let states = forms(decoded);
    let again = save(Format::V032, &states, &user).expect("what loads can be saved");
    recast::assert_same(&forms(load(&again).expect("what is saved can be loaded")), &states);
}

#[derive(Debug, Default)]
struct Tally {
    inputs: u64,
    headers: u64,
    loads: u64,
}

/// A folder in memory, where there is one.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Whether `file` passes the header, and whether it loads; panics if what loads does not hold together.
fn try_file(file: &[u8], folder: Option<&Path>) -> (bool, bool) {
    let Ok((header, data)) = header::parse_file(file) else { return (false, false) };
    let Ok(decoded) = decode(file, &header, data) else { return (true, false) };
    exercise(file, decoded);
    if let Some(folder) = folder {
        revive(file, folder);
    }
    (true, true)
}

fn fuzz(aim: Aim, inputs: u64) -> Tally {
    let mut tally = Tally { inputs, ..Tally::default() };
    let folder = scratch();
    let stride = inputs.div_ceil(MAX_REVIVED);
    for seed in 1..=inputs {
        let outcome = std::panic::catch_unwind(|| {
            let file = input(&mut Xorshift(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)), aim);
            try_file(&file, (seed % stride == 0).then_some(folder.path()))
        });
        let (header, loaded) = outcome.unwrap_or_else(|_| panic!("seed {seed} of {aim:?}"));
        tally.headers += u64::from(header);
        tally.loads += u64::from(loaded);
    }
    let percent = |n: u64| 100.0 * n as f64 / inputs.max(1) as f64;
    eprintln!(
        "{aim:?}: {inputs} inputs, {:.1} % pass the header, {:.1} % load",
        percent(tally.headers),
        percent(tally.loads)
    );
    tally
}

#[test]
fn damaged_files_are_refused_or_hold_together() {
    let inputs = std::env::var("MLXRS_FUZZ_INPUTS").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000_u64);
    std::thread::scope(|scope| {
        let aims = [Aim::Header, Aim::Wire(Format::V031), Aim::Wire(Format::V032)];
        for thread in aims.map(|aim| scope.spawn(move || fuzz(aim, inputs.div_ceil(3)))) {
            let tally = thread.join().expect("no panic");
            // Fewer would mean that the inputs no longer reach what they are to try.
            assert!(tally.headers * 100 >= tally.inputs * 30, "{tally:?}");
            assert!(tally.loads * 100 >= tally.inputs * 5, "{tally:?}");
            assert!(tally.loads * 100 <= tally.inputs * 90, "{tally:?}");
        }
    });
}

/// What the fuzzers under tests/fuzz start from.
#[test]
fn the_corpus_is_refused_or_holds_together() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    let (folder, mut n_files, mut n_loaded) = (scratch(), 0, 0);
    for target in ["header", "wire", "convert"] {
        for entry in std::fs::read_dir(corpus.join(target)).unwrap() {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap();
            let file = if target == "header" { bytes } else { input_of(&bytes) };
            n_loaded += usize::from(try_file(&file, Some(folder.path())).1);
            n_files += 1;
        }
    }
    assert!(n_files >= 12 && n_loaded >= 6, "{n_loaded} of {n_files} load");
}
