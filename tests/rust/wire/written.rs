//! What is written, and what is not.

use super::samples::{BOTH, all, arrays, kv, only_v032, parent, rotating, slot, user};
use crate::fabricate::{Form, array, forms, int, list, load, save};
use mlxrs_py::Error;
use mlxrs_py::array::Dtype;
use mlxrs_py::cache::schema::Described;
use mlxrs_py::cache::state::{CacheState, State};
use mlxrs_py::persist::wire::{self, Encoded, Format};
use std::collections::BTreeMap;

fn tensors(encoded: &Encoded<Form>) -> BTreeMap<&str, (&str, Vec<usize>)> {
    encoded.tensors.iter().map(|(key, leaf)| (key.as_str(), (leaf.dtype().safetensors_name(), leaf.shape()))).collect()
}

fn texts(encoded: &Encoded<Form>) -> Vec<(&str, &str)> {
    encoded.metadata.iter().map(|(key, text)| (key.as_str(), text.as_str())).collect()
}

#[test]
fn format_032_of_a_kv_cache_is_that_of_mlx_lm() {
    let encoded = wire::encode(Format::V032, vec![kv(256, 3)], &user()).unwrap();
    assert_eq!(
        texts(&encoded),
        [("0.model", "m"), ("1.0", "KVCache"), ("2.0", ""), ("2.1.0", "0.2"), ("2.1.1", "scalar")]
    );
    let buffer = ("BF16", vec![1, 1, 256, 4]);
    assert_eq!(tensors(&encoded), BTreeMap::from([("0.0", buffer.clone()), ("0.1", buffer), ("0.2", ("I32", vec![]))]));
}

#[test]
fn format_032_of_empty_slots_and_of_children_is_that_of_mlx_lm() {
    let padded =
        list("ArraysCache", vec![State::List(vec![slot(), State::None]), array(Dtype::I32, &[1]), State::None]);
    let encoded = wire::encode(Format::V032, vec![padded], &BTreeMap::new()).unwrap();
    let none = ("F32", vec![0]);
    assert_eq!(
        tensors(&encoded),
        BTreeMap::from([
            ("0.0.0", ("F32", vec![1, 2])),
            ("0.0.1", none.clone()),
            ("0.1", ("I32", vec![1])),
            ("0.2", none.clone())
        ])
    );
    assert_eq!(texts(&encoded)[2..], [("2.1.0", "0.0.1"), ("2.1.1", "none"), ("2.2.0", "0.2"), ("2.2.1", "none")]);

    let encoded =
        wire::encode(Format::V032, vec![parent(vec![kv(256, 2), arrays(vec![slot()])])], &BTreeMap::new()).unwrap();
    let table: Vec<_> =
        texts(&encoded).into_iter().filter(|(key, _)| key.starts_with("2.")).map(|(_, text)| text).collect();
    assert_eq!(
        table,
        ["", "0.0.0.2", "scalar", "0.0.1", "string", "0.1.0.1", "none", "0.1.0.2", "none", "0.1.1", "string"]
    );
    let expected = ["0.0.0.0", "0.0.0.1", "0.0.0.2", "0.0.1", "0.1.0.0.0", "0.1.0.1", "0.1.0.2", "0.1.1"];
    assert!(tensors(&encoded).keys().eq(expected.iter()));
    assert_eq!(tensors(&encoded)["0.0.1"], ("I32", vec![7]));
}

#[test]
fn format_031_is_that_of_mlx_lm() {
    let layers = vec![kv(3, 3), rotating(), parent(vec![kv(2, 2), arrays(vec![slot()])])];
    let encoded = wire::encode(Format::V031, layers, &user()).unwrap();
    let expected = [
        ("0.0", ""),
        ("0.1.0", "2"),
        ("0.1.1", "8"),
        ("0.1.2", "10"),
        ("0.1.3", "4"),
        ("0.2.0.0", "KVCache"),
        ("0.2.0.1", "ArraysCache"),
        ("0.2.1.0", ""),
        ("0.2.1.1", ""),
        ("1.model", "m"),
        ("2.0", "KVCache"),
        ("2.1", "RotatingKVCache"),
        ("2.2", "CacheList"),
    ];
    assert_eq!(texts(&encoded), expected);
    assert!(tensors(&encoded).keys().eq(["0.0", "0.1", "1.0", "1.1", "2.0.0", "2.0.1", "2.1.0"].iter()));

    let encoded =
        wire::encode(Format::V031, vec![parent(vec![parent(vec![kv(2, 2)]), kv(2, 2)])], &BTreeMap::new()).unwrap();
    let expected = [
        ("0.0.0.0", "CacheList"),
        ("0.0.0.1", "KVCache"),
        ("0.0.1.0.0.0", "KVCache"),
        ("0.0.1.0.1.0", ""),
        ("0.0.1.1", ""),
        ("2.0", "CacheList"),
    ];
    assert_eq!(texts(&encoded), expected);
    assert!(tensors(&encoded).keys().eq(["0.0.0.0", "0.0.0.1", "0.1.0", "0.1.1"].iter()));
}

#[test]
fn numbers_of_format_031_stand_in_its_own_order() {
    let text = |cache: CacheState<Form>, n: usize| {
        let encoded = wire::encode(Format::V031, vec![cache], &BTreeMap::new()).unwrap();
        (0..n).map(|at| encoded.metadata[&format!("0.0.{at}")].clone()).collect::<Vec<_>>()
    };
    let mut all = all().into_iter();
    assert_eq!(text(all.by_ref().nth(1).unwrap(), 4), ["2", "8", "10", "4"]);
    assert_eq!(text(all.next().unwrap(), 3), ["3", "32", "4"]);
    assert_eq!(text(all.nth(1).unwrap(), 2), ["8", "4"]);
    assert_eq!(text(all.nth(3).unwrap(), 4), ["4", "7", "2", "True"]);
}

#[test]
fn no_layers_are_written_as_mlx_lm_writes_them() {
    assert_eq!(texts(&wire::encode(Format::V032, vec![], &BTreeMap::new()).unwrap()), [("2.0", "")]);
    assert_eq!(texts(&wire::encode(Format::V031, vec![], &BTreeMap::new()).unwrap()), []);
    for format in BOTH {
        for user in [BTreeMap::new(), user()] {
            let decoded = load(&save(format, &[], &user).unwrap()).unwrap();
            assert_eq!((decoded.format, decoded.layers.len(), decoded.metadata), (format, 0, user));
        }
    }
}

#[test]
fn every_tensor_begins_at_a_multiple_of_its_element_size() {
    for format in BOTH {
        let encoded = wire::encode(format, all(), &user()).unwrap();
        let mut at = 0;
        for (key, leaf) in &encoded.tensors {
            assert_eq!(at % leaf.dtype().size(), 0, "{key}");
            at += leaf.shape().iter().product::<usize>() * leaf.dtype().size();
        }
    }
}

#[test]
fn a_number_beyond_int32_is_written_as_int64() {
    let huge = list("RotatingKVCache", vec![State::None, State::None, int(0), int(0), int(1 << 40), int(0)]);
    let encoded = wire::encode(Format::V032, vec![huge.clone()], &user()).unwrap();
    assert_eq!(tensors(&encoded)["0.4"], ("I64", vec![]));
    for format in BOTH {
        assert_eq!(
            forms(load(&save(format, std::slice::from_ref(&huge), &user()).unwrap()).unwrap()),
            std::slice::from_ref(&huge)
        );
    }
}

#[test]
fn caches_that_lie_or_cannot_be_said_are_not_written() {
    let refused = |format, cache: CacheState<Form>, expected: &str| {
        let error = wire::encode(format, vec![kv(3, 3), cache], &user()).unwrap_err();
        assert!(matches!(error, Error::Value { op: "save_prompt_cache", .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    };
    for format in BOTH {
        refused(format, kv(3, 4), "layer 1.2: offset of a KVCache, at most 3 rows, got 4");
        refused(format, list("LayerCache", vec![]), "layer 1: a class among KVCache,");
        let f64 = array(Dtype::F64, &[1, 1, 3, 4]);
        refused(format, list("KVCache", vec![f64.clone(), f64, int(3)]), "1.0 of a type that MLX's files hold");
    }
    refused(Format::V031, kv(256, 3), "layer 1: 3 rows, the valid ones, got 256 rows");
    refused(Format::V031, parent(vec![kv(256, 3)]), "layer 1.0: 3 rows, the valid ones");
    for cache in only_v032().into_iter().filter(|cache| cache.class != "ArraysCache") {
        refused(Format::V031, parent(vec![cache.clone()]), "layer 1.0: a class that format 0.31 has, or format 0.32");
        refused(Format::V031, cache, "layer 1: a class that format 0.31 has, or format 0.32");
    }
    let padded = list("ArraysCache", vec![State::List(vec![slot()]), array(Dtype::I32, &[1]), State::None]);
    refused(Format::V031, padded, "layer 1: no left_padding and no lengths in format 0.31");
}

#[test]
fn metadata_that_would_not_come_back_is_refused() {
    for key in ["", "a.b", ".", "0", "12", "-1", "+1", " 1", "1_0", "١", "Ⅷ"] {
        let user = BTreeMap::from([("model".to_owned(), "m".to_owned()), (key.to_owned(), "x".to_owned())]);
        let error = wire::check_metadata(&user).unwrap_err().to_string();
        assert!(error.contains(&format!("got {key:?}")), "{error}");
        assert!(BOTH.into_iter().all(|format| wire::encode::<Form>(format, vec![], &user).is_err()));
    }
    for key in ["a", "1a", "-", "a b", "ü", "__metadata__", "a\"b\n"] {
        let user = BTreeMap::from([(key.to_owned(), "x.0\u{0}".to_owned())]);
        wire::check_metadata(&user).unwrap();
        for format in BOTH {
            assert_eq!(load(&save(format, &[kv(3, 3)], &user).unwrap()).unwrap().metadata, user);
        }
    }
}

#[test]
fn formats_have_names() {
    for format in BOTH {
        assert_eq!(format.to_string().parse::<Format>().unwrap(), format);
    }
    assert_eq!(Format::default().to_string(), "0.32");
    let error = "0.33".parse::<Format>().unwrap_err().to_string();
    assert_eq!(error, "format: expected '0.32' or '0.31', got '0.33'");
}
