//! Bytes as choices: good files of both formats with structured damage.
#![no_main]
#![allow(dead_code)]

#[path = "../../rust/damage.rs"]
mod damage;
#[path = "../../rust/fabricate.rs"]
mod fabricate;

use damage::Aim;
use fabricate::{Listed, forms, load, save};
use libfuzzer_sys::fuzz_target;
use mlxrs_py::persist::wire::Format;
use std::collections::BTreeMap;

fuzz_target!(|bytes: &[u8]| {
    let mut choices = bytes.chunks(2).map(|pair| pair.iter().fold(0, |all, &byte| all << 8 | u16::from(byte)));
    let aims = [Aim::Wire(Format::V032), Aim::Wire(Format::V031), Aim::Header];
    let aim = aims[usize::from(choices.next().unwrap_or(0)) % aims.len()];
    let file = damage::input(&mut Listed::new(choices.collect()), aim);
    if let Ok(decoded) = load(&file) {
        let states = forms(decoded);
        let again = save(Format::V032, &states, &BTreeMap::new()).expect("what loads can be saved");
        assert_eq!(forms(load(&again).expect("what is saved can be loaded")), states);
    }
});
