//! Raw bytes as a file: the header never panics, and what passes can be decoded or is refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mlxrs_py::persist::{header, wire};
use std::path::Path;

fuzz_target!(|file: &[u8]| {
    if let Ok((header, data)) = header::parse_file(file) {
        let read = |info: &header::TensorInfo| file[data + info.start as usize..data + info.end as usize].to_vec();
        let _ = wire::decode(Path::new("fuzz"), &header, &mut |info| Ok(read(info)));
    }
});
