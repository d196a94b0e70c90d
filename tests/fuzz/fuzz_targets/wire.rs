//! Bytes as choices: good files of both formats with structured damage.
#![no_main]
#![allow(dead_code)]

#[path = "../../rust/damage.rs"]
mod damage;
#[path = "../../rust/fabricate.rs"]
mod fabricate;

use fabricate::{forms, load, save};
use libfuzzer_sys::fuzz_target;
use mlxrs_py::persist::wire::Format;
use std::collections::BTreeMap;

fuzz_target!(|bytes: &[u8]| {
    let file = damage::input_of(bytes);
    if let Ok(decoded) = load(&file) {
        let states = forms(decoded);
        let again = save(Format::V032, &states, &BTreeMap::new()).expect("what loads can be saved");
        // As texts: a NaN is equal to itself.
        let loaded = forms(load(&again).expect("what is saved can be loaded"));
        assert_eq!(format!("{loaded:?}"), format!("{states:?}"));
    }
});
