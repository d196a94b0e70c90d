//! Damaged files: none may make the readers panic, and what they accept must hold together.
//!
//! `MLXRS_FUZZ_INPUTS` sets how many are tried. A failure names its seed, which makes the same file again.

use crate::damage::{Aim, input};
use crate::fabricate::{Form, Xorshift, forms, load, save};
use crate::revive::revive;
use mlxrs_py::cache::schema::{self, Rows};
use mlxrs_py::cache::state::CacheState;
use mlxrs_py::persist::header;
use mlxrs_py::persist::wire::{Decoded, Format};
use std::path::Path;

/// What is done with every file that loads: saved in both formats and loaded again, and brought to life.
fn exercise(file: &[u8], decoded: Decoded, folder: &Path) {
    revive(file, folder);
    let user = decoded.metadata.clone();
    let user = user.into_iter().filter(|(key, _)| key.chars().all(char::is_alphabetic) && !key.is_empty()).collect();
    let states = forms(decoded);
    let again = save(Format::V032, &states, &user).expect("what loads can be saved");
    assert_eq!(forms(load(&again).expect("what is saved can be loaded")), states);

    let cut = |form: Form, rows: Option<Rows>| {
        let mut form = form;
        if let Some(rows) = rows {
            form.shape[2] = rows.valid;
        }
        Ok::<_, ()>(form)
    };
    let cut: Vec<CacheState<Form>> =
        states.into_iter().map(|cache| schema::map_arrays(cache, &mut { cut }).expect("no error")).collect();
    assert_eq!(schema::check_layers(&cut), Ok(()));
    match save(Format::V031, &cut, &user) {
        Ok(again) => assert_eq!(forms(load(&again).expect("what is saved can be loaded")), cut),
        Err(error) => {
            let error = error.to_string();
            let unsayable = ["no left_padding and no lengths in format 0.31", "a class that format 0.31 has"];
            assert!(unsayable.iter().any(|what| error.contains(what)), "{error}");
        }
    }
}

#[derive(Debug, Default)]
struct Tally {
    inputs: u64,
    headers: u64,
    loads: u64,
}

fn fuzz(aim: Aim, inputs: u64) -> Tally {
    let mut tally = Tally { inputs, ..Tally::default() };
    let folder = tempfile::tempdir().unwrap();
    for seed in 1..=inputs {
        let outcome = std::panic::catch_unwind(|| {
            let file = input(&mut Xorshift(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)), aim);
            let header = header::parse_file(&file).is_ok();
            let loaded = load(&file).map(|decoded| exercise(&file, decoded, folder.path())).is_ok();
            (header, loaded)
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
    let inputs = std::env::var("MLXRS_FUZZ_INPUTS").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000);
    for aim in [Aim::Header, Aim::Wire(Format::V031), Aim::Wire(Format::V032)] {
        let tally = fuzz(aim, inputs / 3);
        // Fewer would mean that the inputs no longer reach what they are to try.
        assert!(tally.headers * 100 >= tally.inputs * 30, "{tally:?}");
        assert!(tally.loads * 100 >= tally.inputs * 5, "{tally:?}");
        assert!(tally.loads * 100 <= tally.inputs * 90, "{tally:?}");
    }
}
