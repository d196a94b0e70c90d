//! The two layouts of a file: what is written, what is read back, and what is refused.

use crate::fabricate::{Form, Listed, NAME, Padding, array, file, forms, int, layers, list, load, metadata, save};
use mlxrs_py::array::Dtype;
use mlxrs_py::cache::schema::{CLASSES, Described, MAX_DEPTH};
use mlxrs_py::cache::state::{CacheState, State};
use mlxrs_py::persist::wire::{self, Encoded, Format, Leaf, MAX_TEXT};
use mlxrs_py::{Error, Result};
use proptest::prelude::*;
use std::collections::BTreeMap;

const BOTH: [Format; 2] = [Format::V031, Format::V032];

fn rows(rows: usize) -> State<Form> {
    array(Dtype::Bf16, &[1, 1, rows, 4])
}

fn kv(rows_held: usize, offset: usize) -> CacheState<Form> {
    list("KVCache", vec![rows(rows_held), rows(rows_held), int(offset)])
}

fn rotating() -> CacheState<Form> {
    list("RotatingKVCache", vec![rows(8), rows(8), int(10), int(2), int(8), int(4)])
}

fn quantized() -> CacheState<Form> {
    let groups = array(Dtype::F16, &[1, 1, 3, 2]);
    let triple = State::List(vec![array(Dtype::U32, &[1, 1, 3, 8]), groups.clone(), groups]);
    list("QuantizedKVCache", vec![triple.clone(), triple, int(3), int(32), int(4)])
}

fn arrays(slots: Vec<State<Form>>) -> CacheState<Form> {
    list("ArraysCache", vec![State::List(slots), State::None, State::None])
}

fn slot() -> State<Form> {
    array(Dtype::F32, &[1, 2])
}

fn parent(children: Vec<CacheState<Form>>) -> CacheState<Form> {
    let pair = |child: CacheState<Form>| State::List(vec![child.state, State::Str(child.class)]);
    list("CacheList", children.into_iter().map(pair).collect())
}

/// One cache of every class that both formats can say.
fn all() -> Vec<CacheState<Form>> {
    let sequences = || array(Dtype::I32, &[1]);
    vec![
        kv(3, 3),
        rotating(),
        quantized(),
        list("ConcatenateKVCache", vec![rows(3), rows(3)]),
        list("ChunkedKVCache", vec![rows(3), rows(3), int(7), int(8), int(4)]),
        arrays(vec![slot(), slot()]),
        parent(vec![kv(3, 3), arrays(vec![slot()]), parent(vec![rotating()])]),
        list("BatchKVCache", vec![rows(3), rows(3), sequences(), sequences(), int(3)]),
        list(
            "BatchRotatingKVCache",
            vec![rows(4), rows(4), sequences(), sequences(), int(4), int(7), int(2), State::Bool(true)],
        ),
    ]
}

/// A cache of every class that holds nothing yet.
fn all_empty() -> Vec<CacheState<Form>> {
    let none = || State::None;
    let sequences = || array(Dtype::I32, &[2]);
    vec![
        list("KVCache", vec![none(), none(), int(0)]),
        list("RotatingKVCache", vec![none(), none(), int(0), int(2), int(8), int(0)]),
        list("QuantizedKVCache", vec![none(), none(), int(0), int(32), int(4)]),
        list("ConcatenateKVCache", vec![none(), none()]),
        list("ChunkedKVCache", vec![none(), none(), int(0), int(8), int(0)]),
        arrays(vec![none(), none()]),
        arrays(vec![]),
        parent(vec![]),
        list("BatchKVCache", vec![none(), none(), sequences(), sequences(), int(0)]),
        list(
            "BatchRotatingKVCache",
            vec![none(), none(), sequences(), sequences(), int(4), int(0), int(0), State::Bool(false)],
        ),
    ]
}

fn user() -> BTreeMap<String, String> {
    BTreeMap::from([("model".to_owned(), "m".to_owned())])
}

/// A file that can be damaged before it is written.
struct Draft(Encoded<Form>);

impl Draft {
    fn new(format: Format, layers: &[CacheState<Form>]) -> Self {
        Self(wire::encode(format, layers.to_vec(), &user()).expect("good caches"))
    }

    fn text(mut self, key: &str, text: &str) -> Self {
        self.0.metadata.insert(key.into(), text.into());
        self
    }

    fn no_text(mut self, key: &str) -> Self {
        assert!(self.0.metadata.remove(key).is_some(), "{key}");
        self
    }

    fn no_tensor(mut self, key: &str) -> Self {
        let n = self.0.tensors.len();
        self.0.tensors.retain(|(name, _)| name != key);
        assert_eq!(self.0.tensors.len(), n - 1, "{key}");
        self
    }

    fn tensor(mut self, key: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Self {
        self.0.tensors.retain(|(name, _)| name != key);
        let leaf = Leaf::Scalar { dtype, shape: shape.to_vec(), bytes: bytes.to_vec() };
        self.0.tensors.push((key.into(), leaf));
        self
    }

    /// An array of zeros.
    fn array(self, key: &str, dtype: Dtype, shape: &[usize]) -> Self {
        let n_bytes = shape.iter().product::<usize>() * dtype.size();
        self.tensor(key, dtype, shape, &vec![0; n_bytes])
    }

    /// A number of format 0.32.
    fn int(self, key: &str, value: i32) -> Self {
        self.tensor(key, Dtype::I32, &[], &value.to_le_bytes())
    }

    fn load(&self) -> Result<Vec<CacheState<Form>>> {
        load(&file(&self.0)).map(forms)
    }

    #[track_caller]
    fn refused(&self, key: &str, expected: &str, got: &str) {
        match self.load().expect_err("an error") {
            Error::Format { path, key: k, expected: e, got: g } => {
                let all = format!("{k}: expected {e}, got {g}");
                assert_eq!(path.to_str(), Some(NAME));
                assert_eq!(k, key, "{all}");
                assert!(e.contains(expected), "{all}");
                assert!(g.contains(got), "{all}");
            }
            other => panic!("{other}"),
        }
    }
}

fn tensors(encoded: &Encoded<Form>) -> BTreeMap<&str, (&str, Vec<usize>)> {
    encoded.tensors.iter().map(|(key, leaf)| (key.as_str(), (leaf.dtype().safetensors_name(), leaf.shape()))).collect()
}

fn texts(encoded: &Encoded<Form>) -> Vec<(&str, &str)> {
    encoded.metadata.iter().map(|(key, text)| (key.as_str(), text.as_str())).collect()
}

// What is written.

#[test]
fn format_032_of_a_kv_cache_is_that_of_mlx_lm() {
    let encoded = wire::encode(Format::V032, vec![kv(256, 3)], &user()).unwrap();
    assert_eq!(texts(&encoded), [("0.model", "m"), ("1.0", "KVCache"), ("2.0", ""), ("2.1.0", "0.2"), ("2.1.1", "scalar")]);
    let buffer = ("BF16", vec![1, 1, 256, 4]);
    assert_eq!(tensors(&encoded), BTreeMap::from([("0.0", buffer.clone()), ("0.1", buffer), ("0.2", ("I32", vec![]))]));
}

#[test]
fn format_032_of_empty_slots_and_of_children_is_that_of_mlx_lm() {
    let padded = list("ArraysCache", vec![State::List(vec![slot(), State::None]), array(Dtype::I32, &[1]), State::None]);
    let encoded = wire::encode(Format::V032, vec![padded], &BTreeMap::new()).unwrap();
    let none = ("F32", vec![0]);
    assert_eq!(
        tensors(&encoded),
        BTreeMap::from([("0.0.0", ("F32", vec![1, 2])), ("0.0.1", none.clone()), ("0.1", ("I32", vec![1])), ("0.2", none.clone())])
    );
    assert_eq!(texts(&encoded)[2..], [("2.1.0", "0.0.1"), ("2.1.1", "none"), ("2.2.0", "0.2"), ("2.2.1", "none")]);

    let encoded = wire::encode(Format::V032, vec![parent(vec![kv(256, 2), arrays(vec![slot()])])], &BTreeMap::new()).unwrap();
    let table: Vec<_> = texts(&encoded).into_iter().filter(|(key, _)| key.starts_with("2.")).map(|(_, text)| text).collect();
    assert_eq!(table, ["", "0.0.0.2", "scalar", "0.0.1", "string", "0.1.0.1", "none", "0.1.0.2", "none", "0.1.1", "string"]);
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

    let encoded = wire::encode(Format::V031, vec![parent(vec![parent(vec![kv(2, 2)]), kv(2, 2)])], &BTreeMap::new()).unwrap();
    let expected = [("0.0.0.0", "CacheList"), ("0.0.0.1", "KVCache"), ("0.0.1.0.0.0", "KVCache"), ("0.0.1.0.1.0", ""), ("0.0.1.1", ""), ("2.0", "CacheList")];
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
        assert_eq!(forms(load(&save(format, &[huge.clone()], &user()).unwrap()).unwrap()), [huge.clone()]);
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

// What is read back.

#[test]
fn every_class_comes_back_from_both_formats() {
    for format in BOTH {
        for caches in [all(), all_empty()] {
            let decoded = load(&save(format, &caches, &user()).unwrap()).unwrap();
            assert_eq!((decoded.format, &decoded.metadata), (format, &user()));
            assert_eq!(forms(decoded), caches);
        }
    }
}

#[test]
fn every_class_comes_back_as_the_only_layer_and_as_a_child() {
    for format in BOTH {
        for cache in all().into_iter().chain(all_empty()) {
            for caches in [vec![cache.clone()], vec![parent(vec![cache.clone()])], vec![parent(vec![parent(vec![]), cache, parent(vec![])])]] {
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
        for (dtype, size) in [(Dtype::I64, 8), (Dtype::U64, 8), (Dtype::U32, 4), (Dtype::I16, 2), (Dtype::U16, 2), (Dtype::I8, 1), (Dtype::U8, 1)] {
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
        list("BatchRotatingKVCache", vec![rows(4), rows(4), sequences(), sequences(), int(4), int(offset), int(index), State::Bool(rotated)])
    };
    for cache in [batch(false, 4, 4), batch(true, 7, 2)] {
        assert_eq!(Draft::new(Format::V031, &[cache.clone()]).load().unwrap(), [cache]);
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

// What is refused: one test per kind of damage.

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
    Draft::new(Format::V031, &[kv(3, 3), kv(3, 3)]).no_text("2.1").refused("__metadata__.0.1", "only keys of the format", "");
}

#[test]
fn unknown_classes_are_refused() {
    for name in ["Nope", "_BaseCache", "mx", "copy", "Any", "LRUPromptCache", "__builtins__", "KVCache "] {
        Draft::new(Format::V032, &[kv(3, 3)]).text("1.0", name).refused("__metadata__.1.0", "a class among KVCache", name);
        Draft::new(Format::V031, &[kv(3, 3)]).text("2.0", name).refused("__metadata__.2.0", "a class among KVCache", name);
        Draft::new(Format::V031, &[parent(vec![kv(3, 3)])])
            .text("0.0.0.0", name)
            .refused("__metadata__.0.0.0.0", "a class among KVCache", name);
    }
    let points: Vec<u8> = "_BaseCache".bytes().flat_map(|byte| [byte, 0, 0, 0]).collect();
    Draft::new(Format::V032, &[parent(vec![kv(3, 3)])])
        .tensor("0.0.1", Dtype::I32, &[10], &points)
        .refused("0.0.1", "a class among KVCache", "_BaseCache");
}

#[test]
fn a_swapped_class_is_refused() {
    for (format, group) in [(Format::V032, 1), (Format::V031, 2)] {
        for cache in all() {
            for class in CLASSES.iter().filter(|class| class.name != cache.class) {
                let draft = Draft::new(format, &[cache.clone()]).text(&format!("{group}.0"), class.name);
                let loaded = draft.load();
                // Format 0.31 writes classes without numbers alike, and slots may hold anything.
                let same = format == Format::V031
                    && ["KVCache", "ConcatenateKVCache", "BatchKVCache"].contains(&cache.class.as_str())
                    && ["KVCache", "ConcatenateKVCache", "ArraysCache"].contains(&class.name);
                assert!(loaded.is_err() || same, "{} as {} in {format}", cache.class, class.name);
            }
        }
    }
    Draft::new(Format::V032, &[kv(3, 3)]).text("1.0", "RotatingKVCache").refused("0.3", "keep of a RotatingKVCache", "nothing");
    Draft::new(Format::V032, &[kv(3, 3)]).text("1.0", "ConcatenateKVCache").refused("0.2", "only tensors of the classes", "I32 []");
    Draft::new(Format::V032, &[kv(3, 3)]).text("1.0", "ArraysCache").refused("0.0", "cache of a ArraysCache", "an array");
}

#[test]
fn layers_and_classes_of_different_number_are_refused() {
    let two = [kv(3, 3), kv(3, 3)];
    Draft::new(Format::V032, &two[..1]).text("1.1", "KVCache").refused("1.0", "keys of a KVCache", "nothing");
    Draft::new(Format::V032, &two).no_text("1.1").refused("1.0", "only tensors of the classes", "BF16");
    Draft::new(Format::V031, &two[..1]).text("2.1", "KVCache").refused("__metadata__.0.1", "''", "nothing");
    Draft::new(Format::V031, &two[..1]).text("2.1", "KVCache").text("0.1", "").refused("1.0", "keys of a KVCache", "nothing");
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
    Draft::new(Format::V032, &[kv(3, 3)]).text("1.3000000", "KVCache").refused("__metadata__.1.3000000", "without gaps", "");
    Draft::new(Format::V031, &[kv(3, 3)]).text("2.3000000", "KVCache").refused("__metadata__.2.3000000", "without gaps", "");
    let error = Draft::new(Format::V032, &[kv(3, 3)]).text(&deep.replacen('0', "2", 1), "x").load().unwrap_err();
    assert!(error.to_string().contains("only keys of the format"), "{error}");
}

#[test]
fn keys_that_are_no_plain_numbers_are_refused() {
    for format in BOTH {
        for key in ["a", "0.a", "00.0", "0.00", "+0.0", "0.-1", "0. 1", "", ".", "0.", ".0", "0..0", "0.0 "] {
            Draft::new(format, &[kv(3, 3)]).array(key, Dtype::F32, &[1]).refused(key, "only tensors of the classes", "");
        }
    }
}

#[test]
fn a_tensor_and_a_subtree_at_one_key_are_refused() {
    for format in BOTH {
        Draft::new(format, &[kv(3, 3)]).array("0.0.0", Dtype::F32, &[1]).refused("0.0.0", "only tensors of the classes", "");
        Draft::new(format, &[quantized()]).array("0.0", Dtype::F32, &[1, 1, 3, 4]).load().unwrap_err();
        Draft::new(format, &[parent(vec![kv(3, 3)])]).array("0.0", Dtype::F32, &[1]).refused("0.0", "only tensors of the classes", "");
    }
    Draft::new(Format::V032, &[arrays(vec![slot()])]).array("0.0", Dtype::F32, &[1]).refused("0.0.0", "only tensors of the classes", "");
    Draft::new(Format::V032, &[parent(vec![kv(3, 3)])]).array("0", Dtype::F32, &[1]).refused("0", "the children of a CacheList", "an array");
}

#[test]
fn missing_tensors_are_refused() {
    for format in BOTH {
        Draft::new(format, &[kv(3, 3)]).no_tensor("0.1").refused("0.1", "values of a KVCache", "nothing");
        Draft::new(format, &[rotating()]).no_tensor("0.0").refused("0.0", "keys of a RotatingKVCache", "nothing");
        Draft::new(format, &[quantized()]).no_tensor("0.1.2").refused("0.1", "values of a QuantizedKVCache, three arrays", "a list of 2");
        Draft::new(format, &[quantized()]).no_tensor("0.0.0").load().unwrap_err();
        Draft::new(format, &[all()[7].clone()]).no_tensor("0.3").refused("0.3", "left_padding of a BatchKVCache", "nothing");
    }
    let draft = Draft::new(Format::V032, &[kv(3, 3)]).no_tensor("0.2");
    draft.refused("__metadata__.2.1.0", "the key of a tensor", "'0.2'");
    Draft::new(Format::V032, &[kv(3, 3)]).no_tensor("0.2").no_text("2.1.0").no_text("2.1.1").refused("0.2", "offset of a KVCache", "nothing");
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
    Draft::new(Format::V031, &[rotating()]).text("0.0", "").refused("__metadata__.0.0", "only keys of the format", "''");
    Draft::new(Format::V031, &[rotating()]).text("0.0.4", "1").refused("__metadata__.0.0.4", "only keys of the format", "'1'");
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
    draft().text("2.1.1", "string").tensor("0.2", Dtype::I32, &[1], &[51, 0, 0, 0]).refused("0.2", "an integer", "a string");
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
        Draft::new(Format::V031, &[rotating()]).text("0.0.0", text).refused("__metadata__.0.0.0", "keep, an integer", text);
    }
    Draft::new(Format::V031, &[rotating()]).no_text("0.0.2").refused("__metadata__.0.0.2", "offset, an integer", "nothing");
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
        assert_eq!(Draft::new(format, &[deepest.clone()]).load().unwrap(), [deepest]);
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
    let error = wire::decode(std::path::Path::new(NAME), &header, &mut |_| Err(Error::value("read", "a disk", "none"))).unwrap_err();
    assert!(matches!(error, Error::Value { op: "read", .. }));
    let error = wire::decode(std::path::Path::new(NAME), &header, &mut |_| Ok(vec![0; 3])).unwrap_err();
    assert!(error.to_string().contains("0.2: expected 4 bytes, got 3 bytes"), "{error}");
}
