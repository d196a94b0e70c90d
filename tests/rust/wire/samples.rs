//! Caches to write, and files that can be damaged before they are written.

use crate::fabricate::{Form, NAME, array, file, forms, int, list, load};
use mlxrs_py::array::Dtype;
use mlxrs_py::cache::state::{CacheState, State};
use mlxrs_py::persist::wire::{self, Encoded, Format, Leaf};
use mlxrs_py::{Error, Result};
use std::collections::BTreeMap;

pub const BOTH: [Format; 2] = [Format::V031, Format::V032];

pub fn rows(rows: usize) -> State<Form> {
    array(Dtype::Bf16, &[1, 1, rows, 4])
}

pub fn kv(rows_held: usize, offset: usize) -> CacheState<Form> {
    list("KVCache", vec![rows(rows_held), rows(rows_held), int(offset)])
}

pub fn rotating() -> CacheState<Form> {
    list("RotatingKVCache", vec![rows(8), rows(8), int(10), int(2), int(8), int(4)])
}

/// Packed words, scales and biases of 4 bits and group size 32.
fn packed(rows: usize) -> State<Form> {
    let groups = array(Dtype::F16, &[1, 1, rows, 2]);
    State::List(vec![array(Dtype::U32, &[1, 1, rows, 8]), groups.clone(), groups])
}

pub fn quantized() -> CacheState<Form> {
    list("QuantizedKVCache", vec![packed(3), packed(3), int(3), int(32), int(4)])
}

pub fn arrays(slots: Vec<State<Form>>) -> CacheState<Form> {
    list("ArraysCache", vec![State::List(slots), State::None, State::None])
}

pub fn slot() -> State<Form> {
    array(Dtype::F32, &[1, 2])
}

pub fn parent(children: Vec<CacheState<Form>>) -> CacheState<Form> {
    let pair = |child: CacheState<Form>| State::List(vec![child.state, State::Str(child.class)]);
    list("CacheList", children.into_iter().map(pair).collect())
}

/// One cache of every class that both formats can say.
pub fn all() -> Vec<CacheState<Form>> {
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

/// Caches that only format 0.32 can say.
pub fn only_v032() -> Vec<CacheState<Form>> {
    let (none, sequences) = (|| State::None, || array(Dtype::I32, &[1]));
    let ring = |rows: State<Form>, [offset, index]: [usize; 2]| {
        let numbers = [offset, 2, 8, index, 32, 4].map(int);
        list("QuantizedRotatingKVCache", [vec![rows.clone(), rows], numbers.into()].concat())
    };
    let batch = |rows: State<Form>, index: usize| {
        let numbers = [index, 32, 4].map(int);
        list("BatchQuantizedKVCache", [vec![rows.clone(), rows, sequences(), sequences()], numbers.into()].concat())
    };
    vec![
        list("ArraysCache", vec![State::List(vec![slot(), none()]), sequences(), sequences()]),
        ring(packed(8), [10, 4]),
        ring(none(), [0, 0]),
        batch(packed(3), 3),
        batch(none(), 0),
    ]
}

/// A cache of every class that holds nothing yet.
pub fn all_empty() -> Vec<CacheState<Form>> {
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

pub fn user() -> BTreeMap<String, String> {
    BTreeMap::from([("model".to_owned(), "m".to_owned())])
}

/// A file that can be damaged before it is written.
pub struct Draft(pub Encoded<Form>);

impl Draft {
    pub fn new(format: Format, layers: &[CacheState<Form>]) -> Self {
        Self(wire::encode(format, layers.to_vec(), &user()).expect("good caches"))
    }

    pub fn text(mut self, key: &str, text: &str) -> Self {
        self.0.metadata.insert(key.into(), text.into());
        self
    }

    pub fn no_text(mut self, key: &str) -> Self {
        assert!(self.0.metadata.remove(key).is_some(), "{key}");
        self
    }

    pub fn no_tensor(mut self, key: &str) -> Self {
        let n = self.0.tensors.len();
        self.0.tensors.retain(|(name, _)| name != key);
        assert_eq!(self.0.tensors.len(), n - 1, "{key}");
        self
    }

    pub fn tensor(mut self, key: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Self {
        self.0.tensors.retain(|(name, _)| name != key);
        let leaf = Leaf::Scalar { dtype, shape: shape.to_vec(), bytes: bytes.to_vec() };
        self.0.tensors.push((key.into(), leaf));
        self
    }

    /// An array of zeros.
    pub fn array(self, key: &str, dtype: Dtype, shape: &[usize]) -> Self {
        let n_bytes = shape.iter().product::<usize>() * dtype.size();
        self.tensor(key, dtype, shape, &vec![0; n_bytes])
    }

    /// A number of format 0.32.
    pub fn int(self, key: &str, value: i32) -> Self {
        self.tensor(key, Dtype::I32, &[], &value.to_le_bytes())
    }

    pub fn load(&self) -> Result<Vec<CacheState<Form>>> {
        load(&file(&self.0)).map(forms)
    }

    #[track_caller]
    pub fn refused(&self, key: &str, expected: &str, got: &str) {
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
