//! Converting files in memory: what comes out must say the same, byte for byte.

use crate::fabricate::{Form, file_of, forms, load};
use mlxrs_py::cache::schema::{self, Rows};
use mlxrs_py::cache::state::CacheState;
use mlxrs_py::persist::header::{self, TensorInfo};
use mlxrs_py::persist::recast;
use mlxrs_py::persist::wire::{Decoded, Format};

/// What a format may refuse to say.
const UNSAYABLE: [&str; 3] =
    ["no left_padding and no lengths in format 0.31", "a class that format 0.31 has", "metadata with plain keys"];

/// The same caches without the padding behind their valid rows, and the bytes of all arrays in order.
fn cut(file: &[u8], decoded: Decoded) -> (Vec<CacheState<Form>>, Vec<u8>) {
    let (_, data) = header::parse_file(file).expect("a good header");
    let mut bytes = Vec::new();
    let mut cut = |info: TensorInfo, rows: Option<Rows>| {
        let all = &file[data + info.start as usize..data + info.end as usize];
        let mut form = Form::from(info);
        if let Some(rows) = rows {
            let row = form.shape[3] * form.dtype.size();
            if form.shape[2] * row > 0 {
                all.chunks(form.shape[2] * row).for_each(|head| bytes.extend(&head[..rows.valid * row]));
            }
            form.shape[2] = rows.valid;
        } else {
            bytes.extend(all);
        }
        Ok::<_, ()>(form)
    };
    let layers = decoded.layers.into_iter().map(|cache| schema::map_arrays(cache, &mut cut).expect("no error"));
    (layers.collect(), bytes)
}

/// Asserts that both are equal; a NaN in the state of a registered class is equal to itself.
#[track_caller]
pub fn assert_same<T: PartialEq + std::fmt::Debug>(got: &T, expected: &T) {
    assert!(got == expected || format!("{got:?}") == format!("{expected:?}"), "{got:?} for {expected:?}");
}

/// Converts `file`, which says `decoded`, into both formats, and checks what comes out.
pub fn check(file: &[u8], decoded: &Decoded) {
    let (_, data) = header::parse_file(file).expect("a good header");
    let expected = cut(file, decoded.clone());
    assert_eq!(schema::check_layers(&expected.0), Ok(()));
    for format in [Format::V032, Format::V031] {
        let encoded = match recast(decoded.clone(), format) {
            Ok(encoded) => encoded,
            Err(error) => {
                let error = error.to_string();
                assert!(error.starts_with("convert: ") && UNSAYABLE.iter().any(|what| error.contains(what)), "{error}");
                assert!(format == Format::V031 && decoded.format == Format::V032, "{error}");
                continue;
            }
        };
        let new = file_of(&encoded, |tensor| {
            let run = |(start, n): (u64, u64)| &file[data + start as usize..data + (start + n) as usize];
            tensor.runs().flat_map(run).copied().collect()
        });
        let again = load(&new).expect("what is converted can be loaded");
        assert_eq!((again.format, &again.metadata), (format, &decoded.metadata));
        assert_same(&cut(&new, again.clone()), &expected);
        assert_same(&forms(again), &expected.0);
    }
}
