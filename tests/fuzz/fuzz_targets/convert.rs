//! Bytes as choices: damaged files that load are converted into both formats.
#![no_main]
#![allow(dead_code)]

#[path = "../../rust/damage.rs"]
mod damage;
#[path = "../../rust/fabricate.rs"]
mod fabricate;
#[path = "../../rust/recast.rs"]
mod recast;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let file = damage::input_of(bytes);
    if let Ok(decoded) = fabricate::load(&file) {
        recast::check(&file, &decoded);
    }
});
