//! What is refused: one test per kind of damage.

use super::samples::{BOTH, Draft, all, all_empty, arrays, kv, parent, quantized, rotating, slot, user};
use crate::fabricate::{NAME, save};
use mlxrs_py::Error;
use mlxrs_py::array::Dtype;
use mlxrs_py::cache::schema::{CLASSES, MAX_DEPTH};
use mlxrs_py::cache::state::State;
use mlxrs_py::persist::wire::{self, Format, MAX_TEXT};
use std::path::Path;

#[test]
fn a_file_that_is_no_prompt_cache_is_refused() {
    for format in BOTH {
        let mut bare = Draft::new(format, &[kv(3, 3)]);
        bare.0.metadata.clear();
        bare.refused("__metadata__.2.0", "the mark of a prompt cache", "nothing");
        Draft::new(format, &[kv(3, 3)]).no_text("2.0").refused("__metadata__.2.0", "a prompt cache", "nothing");
    }
    let weights = Draft::new(Format::V031, &[]).text("format", "mlx");
    weights.refused("__metadata__.2.0", "a prompt cache", "nothing");
    Draft::new(Format::V031, &[]).text("1.0", "KVCache").refused("__metadata__.2.0", "a prompt cache", "nothing");
}

#[test]
fn missing_class_names_are_refused() {
    Draft::new(Format::V032, &[kv(3, 3)]).no_text("1.0").refused("0.0", "only tensors of the classes", "BF16");
    Draft::new(Format::V031, &[kv(3, 3), kv(3, 3)]).no_text("2.1").refused(
        "__metadata__.0.1",
        "only keys of the format",
        "",
    );
}

#[test]
fn unknown_classes_are_refused() {
    for name in ["Nope", "_BaseCache", "mx", "copy", "Any", "LRUPromptCache", "__builtins__", "KVCache "] {
        Draft::new(Format::V032, &[kv(3, 3)]).text("1.0", name).refused(
            "__metadata__.1.0",
            "a class among KVCache",
            name,
        );
        Draft::new(Format::V031, &[kv(3, 3)]).text("2.0", name).refused(
            "__metadata__.2.0",
            "a class among KVCache",
            name,
        );
        Draft::new(Format::V031, &[parent(vec![kv(3, 3)])]).text("0.0.0.0", name).refused(
            "__metadata__.0.0.0.0",
            "a class among KVCache",
            name,
        );
    }
    let points: Vec<u8> = "_BaseCache".bytes().flat_map(|byte| [byte, 0, 0, 0]).collect();
    Draft::new(Format::V032, &[parent(vec![kv(3, 3)])]).tensor("0.0.1", Dtype::I32, &[10], &points).refused(
        "0.0.1",
        "a class among KVCache",
        "_BaseCache",
    );
}

#[test]
fn a_swapped_class_is_refused() {
    for (format, group) in [(Format::V032, 1), (Format::V031, 2)] {
        for cache in all() {
            for class in CLASSES.iter().filter(|class| class.name != cache.class) {
                let draft = Draft::new(format, std::slice::from_ref(&cache)).text(&format!("{group}.0"), class.name);
                let loaded = draft.load();
                // Format 0.31 writes classes without numbers alike, and slots may hold anything.
                let same = format == Format::V031
                    && ["KVCache", "ConcatenateKVCache", "BatchKVCache"].contains(&cache.class.as_str())
                    && ["KVCache", "ConcatenateKVCache", "ArraysCache"].contains(&class.name);
                assert!(loaded.is_err() || same, "{} as {} in {format}", cache.class, class.name);
            }
        }
    }
    Draft::new(Format::V032, &[kv(3, 3)]).text("1.0", "RotatingKVCache").refused(
        "0.3",
        "keep of a RotatingKVCache",
        "nothing",
    );
    Draft::new(Format::V032, &[kv(3, 3)]).text("1.0", "ConcatenateKVCache").refused(
        "0.2",
        "only tensors of the classes",
        "I32 []",
    );
    Draft::new(Format::V032, &[kv(3, 3)]).text("1.0", "ArraysCache").refused(
        "0.0",
        "cache of a ArraysCache",
        "an array",
    );
}

#[test]
fn classes_that_format_031_has_no_form_for_are_refused_there() {
    for name in ["QuantizedRotatingKVCache", "BatchQuantizedKVCache"] {
        let got = name;
        Draft::new(Format::V031, &[kv(3, 3)]).text("2.0", name).refused("0", "a class that format 0.31 has", got);
        Draft::new(Format::V031, &[parent(vec![kv(3, 3)])]).text("0.0.0.0", name).refused("0.0", "0.31 has", got);
    }
}

#[test]
fn layers_and_classes_of_different_number_are_refused() {
    let two = [kv(3, 3), kv(3, 3)];
    Draft::new(Format::V032, &two[..1]).text("1.1", "KVCache").refused("1.0", "keys of a KVCache", "nothing");
    Draft::new(Format::V032, &two).no_text("1.1").refused("1.0", "only tensors of the classes", "BF16");
    Draft::new(Format::V031, &two[..1]).text("2.1", "KVCache").refused("__metadata__.0.1", "''", "nothing");
    Draft::new(Format::V031, &two[..1]).text("2.1", "KVCache").text("0.1", "").refused(
        "1.0",
        "keys of a KVCache",
        "nothing",
    );
    Draft::new(Format::V031, &two).no_text("2.1").no_text("0.1").refused("1.0", "only tensors of the classes", "BF16");
}

#[test]
fn gaps_in_layer_numbers_are_refused() {
    Draft::new(Format::V032, &[kv(3, 3)]).text("1.2", "KVCache").refused("__metadata__.1.2", "without gaps", "KVCache");
    Draft::new(Format::V031, &[kv(3, 3)]).text("2.2", "KVCache").refused("__metadata__.2.2", "without gaps", "KVCache");
    for format in BOTH {
        Draft::new(format, &[kv(3, 3)]).array("2.0", Dtype::F32, &[1]).refused("2.0", "without gaps", "F32 [1]");
        Draft::new(format, &[kv(3, 3)]).array("0.3", Dtype::F32, &[1]).refused("0.3", "without gaps", "F32 [1]");
    }
}

#[test]
fn huge_layer_numbers_and_deep_keys_are_refused_at_once() {
    let deep = format!("0{}", ".0".repeat(3000));
    for format in BOTH {
        for key in ["3000000", "3000000.0", "0.3000000", "99999999999999999999999.0", deep.as_str()] {
            let error = Draft::new(format, &[kv(3, 3)]).array(key, Dtype::F32, &[1]).load().unwrap_err().to_string();
            assert!(error.contains("only tensors of the classes"), "{error}");
            assert!(error.len() < 500);
        }
    }
    Draft::new(Format::V032, &[kv(3, 3)]).text("1.3000000", "KVCache").refused(
        "__metadata__.1.3000000",
        "without gaps",
        "",
    );
    Draft::new(Format::V031, &[kv(3, 3)]).text("2.3000000", "KVCache").refused(
        "__metadata__.2.3000000",
        "without gaps",
        "",
    );
    let error = Draft::new(Format::V032, &[kv(3, 3)]).text(&deep.replacen('0', "2", 1), "x").load().unwrap_err();
    assert!(error.to_string().contains("only keys of the format"), "{error}");
}

#[test]
fn keys_that_are_no_plain_numbers_are_refused() {
    for format in BOTH {
        for key in ["a", "0.a", "00.0", "0.00", "+0.0", "0.-1", "0. 1", "", ".", "0.", ".0", "0..0", "0.0 "] {
            Draft::new(format, &[kv(3, 3)]).array(key, Dtype::F32, &[1]).refused(
                key,
                "only tensors of the classes",
                "",
            );
        }
    }
}

#[test]
fn a_tensor_and_a_subtree_at_one_key_are_refused() {
    for format in BOTH {
        Draft::new(format, &[kv(3, 3)]).array("0.0.0", Dtype::F32, &[1]).refused(
            "0.0.0",
            "only tensors of the classes",
            "",
        );
        Draft::new(format, &[quantized()]).array("0.0", Dtype::F32, &[1, 1, 3, 4]).load().unwrap_err();
        Draft::new(format, &[parent(vec![kv(3, 3)])]).array("0.0", Dtype::F32, &[1]).refused(
            "0.0",
            "only tensors of the classes",
            "",
        );
    }
    Draft::new(Format::V032, &[arrays(vec![slot()])]).array("0.0", Dtype::F32, &[1]).refused(
        "0.0.0",
        "only tensors of the classes",
        "",
    );
    Draft::new(Format::V032, &[parent(vec![kv(3, 3)])]).array("0", Dtype::F32, &[1]).refused(
        "0",
        "the children of a CacheList",
        "an array",
    );
}

#[test]
fn missing_tensors_are_refused() {
    for format in BOTH {
        Draft::new(format, &[kv(3, 3)]).no_tensor("0.1").refused("0.1", "values of a KVCache", "nothing");
        Draft::new(format, &[rotating()]).no_tensor("0.0").refused("0.0", "keys of a RotatingKVCache", "nothing");
        Draft::new(format, &[quantized()]).no_tensor("0.1.2").refused(
            "0.1",
            "values of a QuantizedKVCache, three arrays",
            "a list of 2",
        );
        Draft::new(format, &[quantized()]).no_tensor("0.0.0").load().unwrap_err();
        Draft::new(format, &[all()[7].clone()]).no_tensor("0.3").refused(
            "0.3",
            "left_padding of a BatchKVCache",
            "nothing",
        );
    }
    let draft = Draft::new(Format::V032, &[kv(3, 3)]).no_tensor("0.2");
    draft.refused("__metadata__.2.1.0", "the key of a tensor", "'0.2'");
    Draft::new(Format::V032, &[kv(3, 3)]).no_tensor("0.2").no_text("2.1.0").no_text("2.1.1").refused(
        "0.2",
        "offset of a KVCache",
        "nothing",
    );
}

#[test]
fn a_table_that_is_wrong_is_refused() {
    let draft = || Draft::new(Format::V032, &[kv(3, 3)]);
    draft().text("2.1.0", "9.9").refused("__metadata__.2.1.0", "the key of a tensor", "'9.9'");
    draft().text("2.1.1", "weird").refused("__metadata__.2.1.1", "'scalar', 'string' or 'none'", "'weird'");
    draft().no_text("2.1.1").refused("__metadata__.2.1.1", "'scalar', 'string' or 'none'", "nothing");
    draft().no_text("2.1.0").refused("__metadata__.2.1.1", "only keys of the format", "scalar");
    draft().text("2.3.0", "0.1").text("2.3.1", "scalar").refused("__metadata__.2.3.0", "without gaps", "0.1");
    draft().text("2.2.0", "0.2").text("2.2.1", "scalar").refused("__metadata__.2.2.0", "each tensor once", "0.2");
    draft().text("2.1", "x").refused("__metadata__.2.1", "only keys of the format", "x");
    draft().text("2.1.0", "0.0").text("2.1.1", "scalar").refused("0.0", "a scalar", "[1, 1, 3, 4]");
    draft().text("2.1.0", "0.0").text("2.1.1", "none").refused("0.0", "no elements", "[1, 1, 3, 4]");
    draft().text("2.1.0", "0.0").text("2.1.1", "string").refused("0.0", "a text of at most 64", "[1, 1, 3, 4]");
    draft().no_text("2.1.0").no_text("2.1.1").refused("0.2", "an integer that is not negative", "an array I32 []");
}

#[test]
fn metadata_beyond_the_groups_is_refused() {
    for format in BOTH {
        for key in ["format", "3.0", "0", "1", "2", "", "00.model", " 0.model"] {
            let draft = Draft::new(format, &[kv(3, 3)]).text(key, "mlx");
            draft.refused(&format!("__metadata__.{key}"), "only keys of the format", "'mlx'");
        }
    }
    Draft::new(Format::V031, &[kv(3, 3)]).text("0.0", "x").refused("__metadata__.0.0", "''", "'x'");
    Draft::new(Format::V031, &[kv(3, 3)]).text("0.1", "").refused("__metadata__.0.1", "only keys of the format", "''");
    Draft::new(Format::V031, &[rotating()]).text("0.0", "").refused(
        "__metadata__.0.0",
        "only keys of the format",
        "''",
    );
    Draft::new(Format::V031, &[rotating()]).text("0.0.4", "1").refused(
        "__metadata__.0.0.4",
        "only keys of the format",
        "'1'",
    );
}

#[test]
fn scalars_of_the_wrong_form_are_refused() {
    let draft = || Draft::new(Format::V032, &[kv(3, 3)]);
    for value in [-1, -3] {
        draft().int("0.2", value).refused("0.2", "not negative", &value.to_string());
    }
    draft().int("0.2", 999).refused("0.2", "at most 3 rows", "999");
    draft().tensor("0.2", Dtype::F32, &[], &2.5_f32.to_le_bytes()).refused("0.2", "an integer", "a float");
    draft().tensor("0.2", Dtype::F32, &[], &3.0_f32.to_le_bytes()).refused("0.2", "an integer", "a float");
    draft().tensor("0.2", Dtype::Bool, &[], &[1]).refused("0.2", "an integer", "a bool");
    draft().text("2.1.1", "string").tensor("0.2", Dtype::I32, &[1], &[51, 0, 0, 0]).refused(
        "0.2",
        "an integer",
        "a string",
    );
    draft().text("2.1.1", "none").tensor("0.2", Dtype::F32, &[0], &[]).refused("0.2", "an integer", "none");
    draft().tensor("0.2", Dtype::U64, &[], &u64::MAX.to_le_bytes()).refused("0.2", "an integer", "U64");
    draft().tensor("0.2", Dtype::F16, &[], &[0, 0]).refused("0.2", "an integer", "F16");
    draft().tensor("0.2", Dtype::C64, &[], &[0; 8]).refused("0.2", "an integer", "C64");
    for shape in [&[1, 1][..], &[0], &[2]] {
        draft().array("0.2", Dtype::I32, shape).refused("0.2", "a scalar", &format!("{shape:?}"));
    }
    let batch = Draft::new(Format::V032, &[all()[8].clone()]).int("0.7", 1);
    batch.refused("0.7", "rotated of a BatchRotatingKVCache, a bool", "1");
}

#[test]
fn texts_of_the_wrong_form_are_refused() {
    let draft = || Draft::new(Format::V032, &[parent(vec![kv(3, 3)])]);
    let text = |points: &[u32]| points.iter().flat_map(|point| point.to_le_bytes()).collect::<Vec<u8>>();
    draft().tensor("0.0.1", Dtype::I32, &[2], &text(&[0xd800, 65])).refused("0.0.1", "code points", "I32");
    draft().tensor("0.0.1", Dtype::I32, &[1], &text(&[u32::MAX])).refused("0.0.1", "code points", "I32");
    draft().tensor("0.0.1", Dtype::F32, &[1], &text(&[75])).refused("0.0.1", "code points", "F32");
    draft().tensor("0.0.1", Dtype::F32, &[0], &[]).refused("0.0.1", "a class among", "''");
    draft().array("0.0.1", Dtype::I32, &[MAX_TEXT + 1]).refused("0.0.1", "a text of at most 64", "[65]");
    draft().array("0.0.1", Dtype::I32, &[1, 7]).refused("0.0.1", "a text of at most 64", "[1, 7]");
    draft().text("2.2.1", "scalar").int("0.0.1", 7).refused("0.0.1", "the class name of a child", "an integer");
}

#[test]
fn texts_of_format_031_that_are_no_counts_are_refused() {
    for text in ["", "2.0", "+2", " 2", "02", "2_0", "-0", "٢", "0x2", "None", "True", "99999999999999999999"] {
        Draft::new(Format::V031, &[rotating()]).text("0.0.0", text).refused(
            "__metadata__.0.0.0",
            "keep, an integer",
            text,
        );
    }
    Draft::new(Format::V031, &[rotating()]).no_text("0.0.2").refused(
        "__metadata__.0.0.2",
        "offset, an integer",
        "nothing",
    );
}

#[test]
fn numbers_that_contradict_the_rows_are_refused_where_they_stand() {
    let ring = |format| Draft::new(format, &[rotating()]);
    ring(Format::V032).int("0.5", -50).refused("0.5", "not negative", "-50");
    ring(Format::V031).text("0.0.3", "-50").refused("__metadata__.0.0.3", "not negative", "-50");
    ring(Format::V032).int("0.4", 0).refused("0.4", "keep < max_size", "max_size 0");
    ring(Format::V031).text("0.0.1", "0").refused("__metadata__.0.0.1", "keep < max_size", "max_size 0");
    ring(Format::V031).text("0.0.2", "3").refused("__metadata__.0.0.3", "3, the offset", "4");
    ring(Format::V032).int("0.2", 3).refused("0.5", "3, the offset", "4");
    let packed = |format| Draft::new(format, &[kv(3, 3), parent(vec![quantized()])]);
    packed(Format::V032).int("1.0.0.4", 8).refused("1.0.0.0", "8 bits", "[1, 1, 3, 8]");
    packed(Format::V031).text("0.1.1.0.2", "8").refused("1.0.0", "8 bits", "[1, 1, 3, 8]");
    packed(Format::V031).text("0.1.1.0.2", "7").refused("__metadata__.0.1.1.0.2", "among [1, 2", "7");
    packed(Format::V031).text("0.1.1.0.0", "4").refused("__metadata__.0.1.1.0.0", "at most 3 rows", "4");
    for format in BOTH {
        let draft = Draft::new(format, &[kv(3, 3)]).array("0.1", Dtype::Bf16, &[1, 1, 2, 4]);
        draft.refused("0.1", "[1, 1, 3] as in keys", "[1, 1, 2]");
        let draft = Draft::new(format, &[all()[7].clone()]).array("0.3", Dtype::I32, &[2]);
        draft.refused("0.3", "sequences", "2");
    }
    let empty = Draft::new(Format::V031, &[all_empty()[8].clone()]).array("0.2", Dtype::I32, &[3]);
    empty.refused("0.2", "left_padding", "3");
}

#[test]
fn wrong_slots_of_format_031_are_refused() {
    let draft = || Draft::new(Format::V031, &[arrays(vec![slot(), State::None])]);
    for mask in ["1", "101", "1x", "x", "-"] {
        draft().text("0.0", mask).load().unwrap_err();
    }
    draft().text("0.0", "01").refused("0.0", "the slot is empty", "[1, 2]");
    draft().no_text("0.0").refused("__metadata__.0.0", "0 or 1 for each of 2 slots", "nothing");
    Draft::new(Format::V031, &[arrays(vec![])]).no_tensor("0.0").refused("0.0", "without elements", "none");
}

#[test]
fn cache_lists_are_read_to_a_limited_depth() {
    let nested = |depth| (0..depth).fold(kv(3, 3), |child, _| parent(vec![child]));
    for format in BOTH {
        let deepest = nested(MAX_DEPTH);
        assert_eq!(Draft::new(format, std::slice::from_ref(&deepest)).load().unwrap(), [deepest]);
        assert!(wire::encode(format, vec![nested(MAX_DEPTH + 1)], &user()).is_err());
    }
    // Format 0.31 names classes in strings alone, so a file of any depth is short.
    let mut deep = Draft::new(Format::V031, &[kv(3, 3)]).text("2.0", "CacheList");
    let mut texts = "0.0".to_owned();
    for _ in 0..3000 {
        deep = deep.text(&format!("{texts}.0.0"), "CacheList");
        texts.push_str(".1.0");
    }
    let error = deep.load().unwrap_err().to_string();
    assert!(error.contains("at most 8 CacheLists in each other"), "{error}");
}

#[test]
fn an_error_of_the_reader_is_passed_on() {
    let bytes = save(Format::V032, &[kv(3, 3)], &user()).unwrap();
    let (header, _) = mlxrs_py::persist::header::parse_file(&bytes).unwrap();
    let error =
        wire::decode(Path::new(NAME), &header, &mut |_| Err(Error::value("read", "a disk", "none"))).unwrap_err();
    assert!(matches!(error, Error::Value { op: "read", .. }));
    let error = wire::decode(Path::new(NAME), &header, &mut |_| Ok(vec![0; 3])).unwrap_err();
    assert!(error.to_string().contains("0.2: expected 4 bytes, got 3 bytes"), "{error}");
}
