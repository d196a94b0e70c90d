//! What is read back.

use super::samples::{BOTH, Draft, all, all_empty, arrays, kv, only_v032, parent, rows, user};
use crate::fabricate::{Listed, Padding, array, file, forms, int, layers, list, load, metadata, save};
use mlxrs_py::array::Dtype;
use mlxrs_py::cache::state::State;
use mlxrs_py::persist::wire::Format;
use proptest::prelude::*;

#[test]
fn every_class_comes_back_from_both_formats() {
    for format in BOTH {
        for caches in [all(), all_empty(), if format == Format::V032 { only_v032() } else { vec![] }] {
            let decoded = load(&save(format, &caches, &user()).unwrap()).unwrap();
            assert_eq!((decoded.format, &decoded.metadata), (format, &user()));
            assert_eq!(forms(decoded), caches);
        }
    }
}

#[test]
fn every_class_comes_back_as_the_only_layer_and_as_a_child() {
    for format in BOTH {
        let more = if format == Format::V032 { only_v032() } else { vec![] };
        for cache in all().into_iter().chain(all_empty()).chain(more) {
            for caches in [
                vec![cache.clone()],
                vec![parent(vec![cache.clone()])],
                vec![parent(vec![parent(vec![]), cache, parent(vec![])])],
            ] {
                assert_eq!(forms(load(&save(format, &caches, &user()).unwrap()).unwrap()), caches);
            }
        }
    }
}

#[test]
fn empty_lists_that_mlx_lm_leaves_out_are_read() {
    let slots = Draft::new(Format::V032, &[arrays(vec![])]).no_tensor("0.0");
    let slots = slots.text("2.1.0", "0.1").text("2.1.1", "none").text("2.2.0", "0.2").no_text("2.3.0").no_text("2.3.1");
    assert_eq!(slots.load().unwrap(), [arrays(vec![])]);
    let children = Draft::new(Format::V032, &[parent(vec![])]).no_tensor("0").no_text("2.1.0").no_text("2.1.1");
    assert_eq!(children.load().unwrap(), [parent(vec![])]);
    let slots = Draft::new(Format::V031, &[arrays(vec![])]).no_tensor("0.0").text("0.0", "");
    assert_eq!(slots.load().unwrap(), [arrays(vec![])]);
    let children = Draft::new(Format::V031, &[parent(vec![])]).no_tensor("0.0").no_text("0.0");
    assert_eq!(children.load().unwrap(), [parent(vec![])]);
}

#[test]
fn numbers_of_other_writers_are_read() {
    let draft = || Draft::new(Format::V032, &[kv(3, 3)]);
    for shape in [&[][..], &[1]] {
        for (dtype, size) in [
            (Dtype::I64, 8),
            (Dtype::U64, 8),
            (Dtype::U32, 4),
            (Dtype::I16, 2),
            (Dtype::U16, 2),
            (Dtype::I8, 1),
            (Dtype::U8, 1),
        ] {
            let bytes = &[3, 0, 0, 0, 0, 0, 0, 0][..size];
            assert_eq!(draft().tensor("0.2", dtype, shape, bytes).load().unwrap(), [kv(3, 3)]);
        }
    }
}

#[test]
fn nested_metadata_keeps_its_dotted_keys() {
    for (format, group) in [(Format::V032, 0), (Format::V031, 1)] {
        let draft = Draft::new(format, &[kv(3, 3)]).text(&format!("{group}.a.b"), "c").text(&format!("{group}."), "d");
        let decoded = load(&file(&draft.0)).unwrap();
        assert_eq!((decoded.metadata["a.b"].as_str(), decoded.metadata[""].as_str()), ("c", "d"));
    }
}

#[test]
fn the_counts_that_format_031_leaves_out_follow_from_the_rows() {
    let draft = Draft::new(Format::V031, &[list("ChunkedKVCache", vec![rows(3), rows(3), int(7), int(8), int(4)])]);
    let State::List(fields) = &draft.text("0.0.1", "252").load().unwrap()[0].state else { panic!("a list") };
    assert_eq!(fields[2..], [int(255), int(8), int(252)]);
}

#[test]
fn rotated_is_read_as_it_is_written() {
    let batch = |rotated, offset, index| {
        let sequences = || array(Dtype::I32, &[1]);
        list(
            "BatchRotatingKVCache",
            vec![rows(4), rows(4), sequences(), sequences(), int(4), int(offset), int(index), State::Bool(rotated)],
        )
    };
    for cache in [batch(false, 4, 4), batch(true, 7, 2)] {
        assert_eq!(Draft::new(Format::V031, std::slice::from_ref(&cache)).load().unwrap(), [cache]);
    }
    let draft = || Draft::new(Format::V031, &[batch(true, 7, 2)]);
    for text in ["true", "1", "", "False "] {
        draft().text("0.0.3", text).refused("__metadata__.0.0.3", "'True' or 'False'", text);
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(choices in prop::collection::vec(any::<u16>(), 0..200)) {
        for (format, padding) in [(Format::V032, Padding::Kept), (Format::V031, Padding::Cut)] {
            let choose = &mut Listed::new(choices.clone());
            let (user, caches) = (metadata(choose), layers(choose, padding));
            let bytes = save(format, &caches, &user);
            prop_assert!(bytes.is_ok(), "{:?}", bytes);
            let decoded = load(&bytes.unwrap());
            prop_assert!(decoded.is_ok(), "{:?}", decoded);
            let decoded = decoded.unwrap();
            prop_assert_eq!((decoded.format, &decoded.metadata), (format, &user));
            prop_assert_eq!(forms(decoded), caches);
        }
    }
}
