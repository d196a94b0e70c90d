//! The safetensors header: what is refused, and where the error points.

use crate::fabricate::Form;
use mlxrs_py::array::Dtype;
use mlxrs_py::cache::schema::Fault;
use mlxrs_py::persist::header::{self, ALIGNMENT, Header, MAX_DIMS, MAX_HEADER_SIZE, PREFIX_SIZE};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Parses JSON before 64 bytes of data.
fn parse(json: &str) -> Result<Header, Fault> {
    header::parse(json.as_bytes(), 64)
}

/// A header of one tensor `a` with these fields.
fn one(fields: &str) -> Result<Header, Fault> {
    parse(&format!("{{\"a\":{{{fields}}}}}"))
}

#[track_caller]
fn refused(result: Result<Header, Fault>, key: &str, expected: &str, got: &str) {
    let fault = result.expect_err("a fault");
    assert_eq!(fault.key, key, "{fault:?}");
    assert!(fault.expected.contains(expected), "{fault:?}");
    assert!(fault.got.contains(got), "{fault:?}");
}

const GOOD: &str = r#""dtype":"F32","shape":[2,3],"data_offsets":[0,24]"#;

#[test]
fn a_good_header_is_read_whatever_the_order_and_the_spaces() {
    let header = parse(&format!("{{\"a\": {{{GOOD}}},\"__metadata__\":{{\"k\":\"v\"}} }}   \n")).unwrap();
    let a = &header.tensors["a"];
    assert_eq!((a.dtype, a.shape.as_slice(), a.start, a.end), (Dtype::F32, [2, 3].as_slice(), 0, 24));
    assert_eq!(header.metadata["k"], "v");
    assert_eq!(one(r#""data_offsets":[0,24],"shape":[2,3],"dtype":"F32""#).unwrap().tensors["a"], *a);
}

#[test]
fn no_metadata_and_null_metadata_are_no_strings() {
    assert_eq!(parse("{}").unwrap(), Header::default());
    assert_eq!(parse(r#"{"__metadata__":null}"#).unwrap(), Header::default());
    assert_eq!(parse(r#"{"__metadata__":{}}"#).unwrap(), Header::default());
}

#[test]
fn trailing_bytes_holes_and_tensors_without_elements_are_allowed() {
    let hole = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[3,4]},
        "b":{"dtype":"U8","shape":[1],"data_offsets":[9,10]},
        "none":{"dtype":"F32","shape":[0],"data_offsets":[3,3]},
        "end":{"dtype":"F32","shape":[7,0],"data_offsets":[64,64]}}"#;
    assert_eq!(parse(hole).unwrap().tensors.len(), 4);
}

#[test]
fn a_file_that_is_too_short_for_a_length_is_refused() {
    for size in [0, 3, 7] {
        let fault = header::parse_file(&vec![0; size]).unwrap_err();
        assert_eq!((fault.key.as_str(), fault.expected.as_str()), ("header", "8 bytes"));
    }
}

#[test]
fn a_length_beyond_the_file_or_the_limit_is_refused_before_anything_is_allocated() {
    for size in [1000, 1_000_000_000_000, u64::MAX - 7, u64::MAX - 1, u64::MAX] {
        let fault = header::json_size(size.to_le_bytes(), 9).unwrap_err();
        assert_eq!((fault.key.as_str(), fault.got), ("header", format!("{size} bytes")));
        assert_eq!(fault.expected, "at most 1 bytes");
    }
    assert!(header::json_size((MAX_HEADER_SIZE + 1).to_le_bytes(), u64::MAX).is_err());
    assert_eq!(header::json_size(MAX_HEADER_SIZE.to_le_bytes(), u64::MAX).unwrap() as u64, MAX_HEADER_SIZE);
    assert_eq!(header::json_size(1_u64.to_le_bytes(), 9), Ok(1));
    assert!(header::json_size(0_u64.to_le_bytes(), 3).is_ok_and(|size| size == 0));
}

#[test]
fn a_header_that_is_no_json_object_is_refused() {
    for text in ["", "x", "[]", "null", "  {}", "\"a\"", "{", "{]", "{}x", "{} {}", "{1:2}"] {
        assert_eq!(parse(text).unwrap_err().key, "header", "{text}");
    }
    assert_eq!(parse("{\"a\":}").unwrap_err().key, "a");
    assert_eq!(parse("{\"__metadata__\":{\"a\":\"b\"}").unwrap_err().key, "__metadata__");
    assert_eq!(header::parse(b"{\"\xff\":1}", 0).unwrap_err().key, "header");
}

#[test]
fn nesting_is_an_error_and_not_a_stack_overflow() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = format!("{{\"a\":{{\"shape\":{}1{}}}}}", open.repeat(200_000), close.repeat(200_000));
        refused(parse(&deep), "a", "a safetensors header", "");
        let deep = format!("{{\"__metadata__\":{{\"a\":{}1{}}}}}", open.repeat(200_000), close.repeat(200_000));
        refused(parse(&deep), "__metadata__", "a safetensors header", "");
    }
}

#[test]
fn a_key_that_stands_twice_is_refused_at_every_level() {
    refused(parse(&format!("{{\"a\":{{{GOOD}}},\"a\":{{{GOOD}}}}}")), "a", "", "twice");
    refused(parse(&format!("{{\"a\":{{{GOOD}}},\"\\u0061\":{{{GOOD}}}}}")), "a", "", "twice");
    refused(parse(r#"{"__metadata__":{},"__metadata__":{}}"#), "__metadata__", "", "duplicate");
    refused(parse(r#"{"__metadata__":{"k":"v","k":"v"}}"#), "__metadata__", "", "'k' twice");
    refused(one(&format!("{GOOD},\"dtype\":\"F32\"")), "a", "", "'dtype' twice");
    refused(one(&format!("{GOOD},\"shape\":[2,3]")), "a", "", "'shape' twice");
    refused(one(&format!("{GOOD},\"data_offsets\":[0,24]")), "a", "", "'data_offsets' twice");
}

#[test]
fn a_missing_or_an_unknown_field_is_refused() {
    refused(one(r#""shape":[2,3],"data_offsets":[0,24]"#), "a", "", "missing field `dtype`");
    refused(one(r#""dtype":"F32","data_offsets":[0,24]"#), "a", "", "missing field `shape`");
    refused(one(r#""dtype":"F32","shape":[2,3]"#), "a", "", "missing field `data_offsets`");
    refused(one(&format!("{GOOD},\"extra\":1")), "a", "", "unknown field `extra`");
    refused(parse(r#"{"a":[]}"#), "a", "", "a map of dtype, shape and data_offsets");
}

#[test]
fn a_dtype_that_mlx_does_not_read_is_refused() {
    for name in ["XX", "f32", "F8_E4M3", "F64", ""] {
        let fields = format!(r#""dtype":"{name}","shape":[1],"data_offsets":[0,8]"#);
        refused(one(&fields), "a", "a dtype", &format!("'{name}'"));
    }
    refused(one(r#""dtype":1,"shape":[1],"data_offsets":[0,8]"#), "a", "", "integer `1`");
}

#[test]
fn numbers_that_are_no_sizes_are_refused() {
    for shape in
        ["[-2,3]", "[2.0,3]", "[1e1]", "[\"2\",3]", "[true]", "[null]", "[18446744073709551616]", "6", "{}", "[[2,3]]"]
    {
        refused(
            one(&format!(r#""dtype":"F32","shape":{shape},"data_offsets":[0,24]"#)),
            "a",
            "a safetensors header",
            "",
        );
    }
    for offsets in ["[0]", "[]", "[0,24,24]", "[0,-24]", "[0.0,24]"] {
        assert_eq!(one(&format!(r#""dtype":"F32","shape":[2,3],"data_offsets":{offsets}"#)).unwrap_err().key, "a");
    }
}

#[test]
fn shapes_that_mlx_cannot_have_are_refused() {
    let many = vec!["1"; MAX_DIMS + 1].join(",");
    refused(one(&format!(r#""dtype":"F32","shape":[{many}],"data_offsets":[0,4]"#)), "a", "", "invalid length 33");
    let most = vec!["1"; MAX_DIMS].join(",");
    assert!(one(&format!(r#""dtype":"F32","shape":[{most}],"data_offsets":[0,4]"#)).is_ok());
    refused(one(r#""dtype":"F32","shape":[3000000000,0],"data_offsets":[0,0]"#), "a", "axes of at most", "3000000000");
    // 2^31 to the third power times 4 does not fit 64 bits; wrapping, it would be 0 bytes.
    let wraps = r#""dtype":"F32","shape":[1073741824,1073741824,1073741824],"data_offsets":[0,0]"#;
    refused(one(wraps), "a", "more than 2**64", "0 to 0");
}

#[test]
fn offsets_that_do_not_fit_the_shape_are_refused() {
    for offsets in ["[0,20]", "[0,28]", "[24,0]", "[0,18446744073709551615]"] {
        let fields = format!(r#""dtype":"F32","shape":[2,3],"data_offsets":{offsets}"#);
        refused(one(&fields), "a", "data_offsets of 24 bytes", " to ");
    }
}

#[test]
fn offsets_beyond_the_data_are_refused() {
    refused(one(r#""dtype":"F32","shape":[2,3],"data_offsets":[48,72]"#), "a", "within 64 bytes", "48 to 72");
    refused(one(r#""dtype":"F32","shape":[0],"data_offsets":[65,65]"#), "a", "within 64 bytes", "65 to 65");
    let top = u64::MAX;
    refused(one(&format!(r#""dtype":"F32","shape":[0],"data_offsets":[{top},{top}]"#)), "a", "within 64 bytes", "");
}

#[test]
fn tensors_that_overlap_are_refused() {
    let entry = |offsets: &str| format!(r#"{{"dtype":"U8","shape":[8],"data_offsets":{offsets}}}"#);
    let two = |first: &str, second: &str| parse(&format!("{{\"a\":{},\"b\":{}}}", entry(first), entry(second)));
    assert!(two("[0,8]", "[8,16]").is_ok());
    refused(two("[0,8]", "[7,15]"), "b", "after those of 'a', which end at 8", "7 to 15");
    refused(two("[7,15]", "[0,8]"), "a", "after those of 'b'", "7 to 15");
    assert!(two("[0,8]", "[0,8]").is_err());
}

#[test]
fn metadata_that_is_no_map_of_strings_is_refused() {
    for text in ["1", "[]", "\"x\"", "{\"k\":1}", "{\"k\":null}", "{\"k\":{}}", "{\"k\":[\"v\"]}"] {
        refused(parse(&format!("{{\"__metadata__\":{text}}}")), "__metadata__", "a safetensors header", "invalid type");
    }
}

#[test]
fn what_a_file_says_is_repeated_in_part_only() {
    let long = "k".repeat(100_000);
    let fault = parse(&format!("{{\"{long}\":{{\"{long}\":1}}}}")).unwrap_err();
    assert!(fault.key.len() < 200 && fault.got.len() < 200);
}

#[test]
fn a_built_header_ends_at_a_page_and_is_padded_with_spaces() {
    for n in [0, 1, 70, 700] {
        let tensors: Vec<_> =
            (0..n).map(|i| (format!("{i}.0"), Form { dtype: Dtype::Bf16, shape: vec![1, 2, i, 4] })).collect();
        let bytes = header::build(&tensors, &BTreeMap::new()).unwrap();
        assert_eq!(bytes.len() % ALIGNMENT, 0);
        assert_eq!(header::json_size(bytes[..PREFIX_SIZE].try_into().unwrap(), 1 << 40), Ok(bytes.len() - PREFIX_SIZE));
        let json = std::str::from_utf8(&bytes[PREFIX_SIZE..]).unwrap();
        assert!(json.trim_end_matches(' ').ends_with('}'));
        assert!(json.len() - json.trim_end_matches(' ').len() < ALIGNMENT);
    }
}

#[test]
fn no_header_is_built_that_could_not_be_read() {
    let long = "v".repeat(MAX_HEADER_SIZE as usize);
    let error = header::build::<Form>(&[], &BTreeMap::from([("k".into(), long)])).unwrap_err();
    assert!(error.to_string().contains("a header of at most 100000000 bytes"), "{error}");
}

fn shapes() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(0..4_usize, 0..5)
}

proptest! {
    #[test]
    fn a_built_header_reads_back(
        tensors in prop::collection::btree_map("\\PC{1,8}", (0..13_usize, shapes()), 0..6),
        metadata in prop::collection::btree_map(".{0,8}", ".{0,8}", 0..4),
    ) {
        let dtypes = [Dtype::Bool, Dtype::U8, Dtype::U16, Dtype::U32, Dtype::U64, Dtype::I8, Dtype::I16, Dtype::I32,
            Dtype::I64, Dtype::F16, Dtype::Bf16, Dtype::F32, Dtype::C64];
        let tensors: Vec<_> =
            tensors.into_iter().map(|(name, (dtype, shape))| (name, Form { dtype: dtypes[dtype], shape })).collect();
        let bytes = header::build(&tensors, &metadata).unwrap();
        let size = |form: &Form| form.shape.iter().product::<usize>() * form.dtype.size();
        let n_bytes: usize = tensors.iter().map(|(_, form)| size(form)).sum();
        let header = header::parse(&bytes[PREFIX_SIZE..], n_bytes as u64).unwrap();
        prop_assert_eq!(header.metadata, metadata);
        prop_assert_eq!(header.tensors.len(), tensors.len());
        let mut end = 0;
        for (name, form) in tensors {
            let info = &header.tensors[&name];
            prop_assert_eq!(info.start, end);
            end = info.end;
            prop_assert_eq!(Form::from(info.clone()), form);
        }
        prop_assert_eq!(end, n_bytes as u64);
    }

    #[test]
    fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = header::parse_file(&bytes);
        let _ = header::parse(&bytes, 64);
    }
}
