//! Which states the classes can have.

use crate::fabricate::{Form, Listed, Padding, array, cache, int, list};
use crate::states::{
    batch_quantized, batch_rotating, chunked, good, kv, packed, parent, quantized, quantized_rotating, refused,
    rotating, rows, sequences, with,
};
use mlxrs_py::array::Dtype;
use mlxrs_py::cache::plan::Ring;
use mlxrs_py::cache::schema::{CLASSES, Class, Fault, Kind, MAX_DEPTH, Rows, check, check_layers, map_arrays};
use mlxrs_py::cache::state::{CacheState, State};
use proptest::prelude::*;
use std::collections::BTreeSet;

#[test]
fn a_good_state_of_every_class_passes() {
    let good = good();
    assert_eq!(
        good.iter().map(|cache| cache.class.as_str()).collect::<Vec<_>>(),
        CLASSES.each_ref().map(|class| class.name)
    );
    assert_eq!(check_layers(&good), Ok(()));
}

#[test]
fn the_strings_of_format_031_are_numbered_without_gaps() {
    for class in &CLASSES {
        let texts = class.fields.iter().filter_map(|field| match field.v031 {
            mlxrs_py::cache::schema::V031::Text(at) => Some(at),
            _ => None,
        });
        assert_eq!(texts.collect::<BTreeSet<_>>(), (0..class.n_texts()).collect(), "{}", class.name);
    }
}

#[test]
fn an_unknown_class_is_refused_and_the_known_ones_are_named() {
    for name in ["Nope", "", "_BaseCache", "kvcache", "mx", "__builtins__", "LayerCache"] {
        refused(&list(name, vec![]), "class", "KVCache, RotatingKVCache, ", name);
    }
    let layers = [kv(rows(8), rows(8), int(5)), parent(vec![list("Nope", vec![])])];
    assert_eq!(check_layers(&layers).unwrap_err().key, "1.0.1");
}

#[test]
fn a_wrong_number_of_entries_is_refused_for_every_class() {
    for cache in good().into_iter().filter(|cache| cache.class != "CacheList") {
        let State::List(mut items) = cache.state else { panic!("a list") };
        let n = items.len();
        items.push(State::None);
        refused(&list(&cache.class, items.clone()), "state", &format!("{n} entries"), &format!("{} entries", n + 1));
        items.truncate(n - 1);
        refused(&list(&cache.class, items), "state", &format!("{n} entries"), &format!("{} entries", n - 1));
        refused(&CacheState { class: cache.class, state: State::None }, "state", "a tuple", "none");
    }
}

#[test]
fn the_state_of_one_class_is_refused_by_every_other() {
    for from in good() {
        for to in CLASSES.iter().filter(|class| class.name != from.class) {
            let swapped = CacheState { class: to.name.into(), state: from.state.clone() };
            assert!(check(&swapped).is_err(), "{} as {}", from.class, to.name);
        }
    }
}

#[test]
fn an_entry_of_the_wrong_kind_is_refused_for_every_class() {
    let kinds = [
        State::Int(3),
        State::Bool(true),
        State::Float(3.0),
        State::Str("3".into()),
        State::None,
        rows(8),
        State::List(vec![State::Int(3)]),
    ];
    for cache in good().into_iter().filter(|cache| cache.class != "CacheList") {
        let class = Class::find(&cache.class).unwrap();
        for (at, field) in class.fields.iter().enumerate() {
            for kind in &kinds {
                let fits = matches!(
                    (field.kind, kind),
                    (Kind::Rows, State::Array(_))
                        | (Kind::Rows | Kind::Packed | Kind::MaybePerSequence, State::None)
                        | (Kind::Count, State::Int(_))
                        | (Kind::Flag, State::Bool(_))
                );
                let fault = check(&with(cache.clone(), at, kind.clone())).err();
                if !fits {
                    let fault = fault.expect("a fault");
                    assert_eq!(fault.key, at.to_string());
                    assert!(fault.expected.starts_with(&format!("{} of a {}, ", field.name, class.name)), "{fault:?}");
                }
            }
        }
    }
}

#[test]
fn a_negative_count_is_refused_for_every_class() {
    for cache in good().into_iter().filter(|cache| cache.class != "CacheList") {
        let fields = Class::find(&cache.class).unwrap().fields;
        for at in (0..fields.len()).filter(|&at| fields[at].kind == Kind::Count) {
            for value in [-1, -3, -50, i64::MIN] {
                refused(
                    &with(cache.clone(), at, State::Int(value)),
                    &at.to_string(),
                    "not negative",
                    &value.to_string(),
                );
            }
        }
    }
}

#[test]
fn huge_counts_are_refused_without_overflow() {
    for cache in good().into_iter().filter(|cache| cache.class != "CacheList") {
        let fields = Class::find(&cache.class).unwrap().fields;
        for at in (0..fields.len()).filter(|&at| fields[at].kind == Kind::Count && fields[at].name != "chunk_size") {
            assert!(
                check(&with(cache.clone(), at, State::Int(i64::MAX))).is_err(),
                "{} {}",
                cache.class,
                fields[at].name
            );
        }
    }
    let all = [int(0), int(0)].map(|_| State::Int(i64::MAX));
    for cache in [rotating(Some(8), 0, 0, 0, 0), chunked(Some(8), 0, 0, 0)] {
        assert!(check(&with(with(cache, 2, all[0].clone()), 4, all[1].clone())).is_err());
    }
}

#[test]
fn keys_without_values_and_values_without_keys_are_refused() {
    refused(&kv(State::None, rows(8), int(0)), "0", "as there are values", "none");
    refused(&kv(rows(8), State::None, int(0)), "1", "as there are keys", "none");
    refused(&with(quantized(packed(8), 5, 32, 4), 0, State::None), "0", "as there are values", "none");
    assert_eq!(check(&kv(State::None, State::None, int(0))), Ok(()));
}

#[test]
fn keys_and_values_that_do_not_agree_are_refused() {
    let f16 = |shape: &[usize]| array(Dtype::F16, shape);
    for other in [[1, 1, 8, 4], [2, 2, 8, 4], [2, 1, 7, 4]] {
        refused(&kv(rows(8), f16(&other), int(5)), "1", "[2, 1, 8]", &format!("{:?}", &other[..3]));
    }
    assert_eq!(check(&kv(rows(8), array(Dtype::F32, &[2, 1, 8, 0]), int(5))), Ok(()));
    refused(&kv(f16(&[2, 8, 4]), rows(8), int(5)), "0", "(B, H, L, D)", "F16 [2, 8, 4]");
    refused(&kv(rows(8), f16(&[2, 1, 8, 4, 1]), int(5)), "1", "(B, H, L, D)", "[2, 1, 8, 4, 1]");
    refused(&kv(array(Dtype::I32, &[2, 1, 8, 4]), rows(8), int(5)), "0", "a float array", "I32");
    refused(&list("ConcatenateKVCache", vec![rows(8), rows(7)]), "1", "[2, 1, 8]", "[2, 1, 7]");
}

#[test]
fn an_offset_beyond_the_rows_is_refused() {
    refused(&kv(rows(8), rows(8), int(9)), "2", "at most 8 rows", "9");
    refused(&kv(rows(8), rows(8), int(999)), "2", "at most 8 rows", "999");
    refused(&kv(State::None, State::None, int(1)), "2", "at most 0 rows", "1");
    refused(&quantized(packed(8), 9, 32, 4), "2", "at most 8 rows", "9");
    assert_eq!(check(&kv(rows(8), rows(8), int(8))), Ok(()));
    let batch = |index| list("BatchKVCache", vec![rows(8), rows(8), sequences(2), sequences(2), int(index)]);
    refused(&batch(9), "4", "at most 8 rows", "9");
    refused(&batch_quantized(Some(8), 9, 32, 4), "4", "at most 8 rows", "9");
}

#[test]
fn quantized_rows_must_fit_group_size_and_bits() {
    refused(&quantized(packed(8), 5, 32, 7), "4", "among [1, 2, 3, 4, 5, 6, 8]", "7");
    refused(&quantized(packed(8), 5, 16, 4), "3", "among [32, 64, 128]", "16");
    refused(&quantized(State::None, 0, 16, 4), "3", "among [32, 64, 128]", "16");
    refused(&quantized(packed(8), 5, 32, 8), "0", "8 bits and group size 32", "[2, 1, 8, 8]");
    refused(&quantized(packed(8), 5, 64, 4), "0", "4 bits and group size 64", "[2, 1, 8, 8]");
    refused(&quantized_rotating(Some(8), [11, 2, 8, 5], 32, 7), "7", "among [1, 2, 3, 4, 5, 6, 8]", "7");
    refused(&quantized_rotating(None, [0, 2, 8, 0], 16, 4), "6", "among [32, 64, 128]", "16");
    refused(&quantized_rotating(Some(8), [11, 2, 8, 5], 64, 4), "0", "4 bits and group size 64", "[2, 1, 8, 8]");
    refused(&batch_quantized(Some(8), 5, 32, 7), "6", "among [1, 2, 3, 4, 5, 6, 8]", "7");
    refused(&batch_quantized(None, 0, 16, 4), "5", "among [32, 64, 128]", "16");
    refused(&batch_quantized(Some(8), 5, 32, 8), "0", "8 bits and group size 32", "[2, 1, 8, 8]");
    let parts = |words: &[usize], scales: State<Form>, biases: State<Form>| {
        quantized(State::List(vec![array(Dtype::U32, words), scales, biases]), 5, 32, 4)
    };
    let groups = |dtype, n| array(dtype, &[2, 1, 8, n]);
    let (f16, f32) = (Dtype::F16, Dtype::F32);
    refused(&parts(&[2, 1, 8, 8], groups(f16, 2), groups(f32, 2)), "0", "biases as the scales, F16", "F32");
    refused(&parts(&[2, 1, 8, 8], groups(f16, 2), groups(f16, 1)), "0", "biases as the scales", "[2, 1, 8, 1]");
    refused(&parts(&[2, 1, 7, 8], groups(f16, 2), groups(f16, 2)), "0", "words for scales", "[2, 1, 7, 8]");
    refused(&parts(&[1, 8, 8], groups(f16, 2), groups(f16, 2)), "0.0", "U32", "[1, 8, 8]");
    refused(&parts(&[2, 1, 8, 8], groups(Dtype::U32, 2), groups(f16, 2)), "0.1", "a float array", "U32");
    refused(&parts(&[2, 1, 8, 8], groups(f16, 2), array(f16, &[2])), "0.2", "(B, H, L, D)", "[2]");
    let wrong_words = quantized(State::List(vec![groups(f16, 8), groups(f16, 2), groups(f16, 2)]), 5, 32, 4);
    refused(&wrong_words, "0.0", "a U32 array", "F16");
    assert!(check(&parts(&[2, 1, 8, 8], groups(f16, usize::MAX), groups(f16, usize::MAX))).is_err());
    for bits in [1, 2, 3, 4, 5, 6, 8] {
        let keys = || State::List(vec![array(Dtype::U32, &[2, 1, 8, 3 * bits]), groups(f16, 3), groups(f16, 3)]);
        let cache = list("QuantizedKVCache", vec![keys(), keys(), int(5), int(32), int(bits)]);
        assert_eq!(check(&cache), Ok(()), "{bits} bits");
    }
}

#[test]
fn a_ring_needs_a_place_to_write() {
    refused(&rotating(None, 0, 0, 0, 0), "4", "keep < max_size", "max_size 0");
    refused(&rotating(Some(8), 3, 8, 8, 3), "3", "keep < max_size", "keep 8");
    refused(&rotating(Some(8), 5, 0, 8, 4), "5", "5, the offset", "4");
    refused(&rotating(Some(4), 5, 0, 8, 5), "2", "at most 4 rows", "5");
    refused(&rotating(Some(7), 9, 0, 8, 7), "0", "8 to 9 rows", "7");
    refused(&rotating(Some(12), 11, 0, 8, 11), "0", "8 to 11 rows", "12");
    refused(&rotating(Some(12), 5, 0, 8, 5), "0", "at most 8 rows", "12");
    refused(&rotating(Some(12), 13, 0, 8, 1), "5", "the end of the rows", "1");
    refused(&rotating(None, 9, 0, 8, 0), "0", "8 to 9 rows", "0");
    refused(&rotating(None, 3, 0, 8, 3), "2", "at most 0 rows", "3");
    refused(&rotating(Some(8), 1 << 31, 0, 8, 8), "2", "tokens", "2147483648");
    refused(&quantized_rotating(Some(8), [3, 8, 8, 3], 32, 4), "3", "keep < max_size", "keep 8");
    refused(&quantized_rotating(Some(12), [13, 0, 8, 1], 32, 4), "5", "the end of the rows", "1");
}

/// Rings of at most `max_size` + 10 tokens that updates and trims lead to; besides, a row of a batch may start as a
/// full ring at any offset.
fn reachable(max_size: usize, keep: usize) -> BTreeSet<(usize, usize, Option<usize>)> {
    let limit = max_size + 10;
    let start = Ring::new(max_size, keep);
    let full = (max_size..=limit).map(|offset| Ring { offset, index: max_size, len: Some(max_size), ..start });
    let mut todo: Vec<Ring> = full.chain([start]).collect();
    let mut seen = BTreeSet::new();
    while let Some(ring) = todo.pop() {
        if ring.offset > limit || !seen.insert((ring.offset, ring.index, ring.len)) {
            continue;
        }
        assert_eq!(ring.check(), Ok(()));
        todo.extend((1..=max_size).map(|step| ring.place(step).after));
        todo.extend((0..=limit).filter(|&n| n != 1).map(|n| ring.append(n).after));
        if !ring.is_wrapped() {
            todo.extend((0..=ring.offset).map(|n| ring.trimmed(n)));
        }
    }
    seen
}

#[test]
fn exactly_the_rings_that_updates_and_trims_lead_to_pass() {
    for max_size in 1..5 {
        for keep in 0..max_size {
            let mut reachable = reachable(max_size, keep);
            // A buffer that was never written is harmless; with one row it would be full after the first token.
            reachable.insert((0, 0, Some(max_size)));
            for len in std::iter::once(None).chain((0..max_size + 12).map(Some)) {
                for offset in 0..=max_size + 10 {
                    for index in 0..max_size + 12 {
                        let passes = check(&rotating(len, offset, keep, max_size, index)).is_ok();
                        let reached = reachable.contains(&(offset, index, len));
                        assert_eq!(passes, reached, "max {max_size} keep {keep}: {offset}, {index}, {len:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_chunk_lies_between_its_start_and_the_offset() {
    refused(&chunked(Some(8), 4, 4, 5), "4", "at most 4 (offset)", "5");
    refused(&chunked(Some(8), 14, 4, 5), "2", "start_position + 8 rows", "5 + 9");
    refused(&chunked(Some(8), 11, 0, 5), "3", "at least 1", "0");
    refused(&chunked(None, 1, 4, 0), "2", "start_position + 0 rows", "0 + 1");
    refused(&chunked(Some(8), 1 << 31, 4, (1 << 31) - 1), "2", "tokens", "2147483648");
}

#[test]
fn a_batch_ring_is_rotated_only_when_full() {
    for good in [
        (None, 4, 0, 0, false),
        (Some(4), 4, 2, 2, false),
        (Some(4), 4, 4, 4, false),
        (Some(7), 4, 9, 7, false),
        (Some(4), 4, 8, 4, true),
    ] {
        assert_eq!(check(&batch_rotating(good.0, good.1, good.2, good.3, good.4)), Ok(()), "{good:?}");
    }
    refused(&batch_rotating(Some(4), 4, 3, 3, true), "7", "a full ring of 4 rows", "_offset 3");
    refused(&batch_rotating(Some(7), 4, 9, 1, true), "7", "a full ring of 4 rows", "7 rows");
    refused(&batch_rotating(Some(4), 4, 9, 0, true), "6", "a place", "_idx 0");
    refused(&batch_rotating(Some(4), 4, 9, 5, true), "6", "a place", "_idx 5");
    refused(&batch_rotating(Some(4), 4, 5, 3, true), "6", "a place", "_idx 3");
    refused(&batch_rotating(Some(4), 4, 9, 2, false), "6", "the end of the rows", "2");
    refused(&batch_rotating(Some(4), 4, 2, 1, false), "6", "2, the offset", "1");
    refused(&batch_rotating(None, 0, 0, 0, false), "4", "at least 1", "0");
}

#[test]
fn arrays_with_one_number_per_sequence_agree_with_the_batch() {
    let batch = |offset, padding| list("BatchKVCache", vec![rows(8), rows(8), offset, padding, int(5)]);
    refused(&batch(sequences(3), sequences(2)), "2", "2", "3");
    refused(&batch(sequences(2), sequences(1)), "3", "2", "1");
    refused(&batch(array(Dtype::F32, &[2]), sequences(2)), "2", "an integer array (B,)", "F32 [2]");
    refused(&batch(array(Dtype::I32, &[2, 1]), sequences(2)), "2", "an integer array (B,)", "I32 [2, 1]");
    let empty = |n, m| list("BatchKVCache", vec![State::None, State::None, sequences(n), sequences(m), int(0)]);
    assert_eq!(check(&empty(3, 3)), Ok(()));
    refused(&empty(3, 2), "3", "3", "2");
}

#[test]
fn cache_lists_hold_pairs_of_a_state_and_a_known_class_to_a_limited_depth() {
    let child = kv(rows(8), rows(8), int(5));
    refused(&list("CacheList", vec![child.state.clone()]), "0", "a child's state and its class name", "a list of 3");
    refused(
        &list("CacheList", vec![State::List(vec![child.state.clone(), State::None])]),
        "0.1",
        "the class name",
        "none",
    );
    refused(&parent(vec![child.clone(), kv(rows(8), rows(8), int(9))]), "1.0.2", "at most 8 rows", "9");
    assert_eq!(check(&parent(vec![])), Ok(()));
    let nested = |depth| (0..depth).fold(child.clone(), |child, _| parent(vec![child]));
    assert_eq!(check(&nested(MAX_DEPTH)), Ok(()));
    let fault: Fault = check(&nested(MAX_DEPTH + 1)).unwrap_err();
    assert_eq!(fault.expected, "at most 8 CacheLists in each other");
    assert!(check(&nested(3000)).is_err());
}

#[test]
fn valid_rows_are_those_that_hold_tokens() {
    let valid = |cache: CacheState<Form>| {
        let mut seen = Vec::new();
        map_arrays(cache, &mut |form: Form, rows| {
            seen.push(rows);
            Ok::<_, ()>(form)
        })
        .unwrap();
        seen
    };
    let two = |valid, padded| vec![Some(Rows { valid, padded }); 2];
    assert_eq!(valid(kv(rows(8), rows(8), int(5))), two(5, true));
    assert_eq!(valid(quantized(packed(8), 5, 32, 4)), vec![Some(Rows { valid: 5, padded: true }); 6]);
    assert_eq!(valid(list("ConcatenateKVCache", vec![rows(8), rows(8)])), two(8, false));
    assert_eq!(valid(rotating(Some(8), 5, 0, 8, 5)), two(5, false));
    assert_eq!(valid(rotating(Some(8), 11, 0, 8, 3)), two(8, false));
    assert_eq!(valid(rotating(Some(12), 20, 0, 8, 12)), two(12, false));
    assert_eq!(valid(chunked(Some(8), 11, 4, 5)), two(6, true));
    assert_eq!(valid(good()[7].clone()), [two(5, true), vec![None; 2]].concat());
    assert_eq!(valid(batch_rotating(Some(8), 8, 5, 5, false)), [two(5, false), vec![None; 2]].concat());
    assert_eq!(valid(batch_rotating(Some(8), 8, 11, 3, true)), [two(8, false), vec![None; 2]].concat());
    assert_eq!(
        valid(quantized_rotating(Some(12), [20, 0, 8, 12], 32, 4)),
        vec![Some(Rows { valid: 12, padded: false }); 6]
    );
    assert_eq!(
        valid(batch_quantized(Some(8), 5, 32, 4)),
        [vec![Some(Rows { valid: 5, padded: true }); 6], vec![None; 2]].concat()
    );
    assert_eq!(valid(good()[5].clone()), vec![None; 2]);
    assert_eq!(
        valid(parent(vec![kv(rows(8), rows(8), int(3)), list("ConcatenateKVCache", vec![rows(8), rows(8)])])),
        [two(3, true), two(8, false)].concat()
    );
}

proptest! {
    #[test]
    fn every_fabricated_cache_passes_and_is_mapped_whole(
        choices in prop::collection::vec(any::<u16>(), 0..60),
        cut in any::<bool>(),
    ) {
        let padding = if cut { Padding::Cut } else { Padding::Kept };
        let cache = cache(&mut Listed::new(choices), padding, 0);
        prop_assert_eq!(check(&cache), Ok(()));
        let same = map_arrays(cache.clone(), &mut |form: Form, rows| {
            // Cutting to the valid rows is always possible.
            assert!(rows.is_none_or(|rows| rows.valid <= form.shape[2]));
            Ok::<_, ()>(form)
        });
        prop_assert_eq!(same, Ok(cache));
    }
}
