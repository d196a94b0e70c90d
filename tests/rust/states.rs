//! States of every class, for the tests of what may be in them.

use crate::fabricate::{Form, array, int, list};
use mlxrs_py::array::Dtype;
use mlxrs_py::cache::schema::check;
use mlxrs_py::cache::state::{CacheState, State};

/// Keys or values of 2 sequences, 1 head and `rows` rows.
pub fn rows(rows: usize) -> State<Form> {
    array(Dtype::F16, &[2, 1, rows, 4])
}

/// Packed words, scales and biases of head size 64 at 4 bits and group size 32.
pub fn packed(rows: usize) -> State<Form> {
    let groups = array(Dtype::F16, &[2, 1, rows, 2]);
    State::List(vec![array(Dtype::U32, &[2, 1, rows, 8]), groups.clone(), groups])
}

pub fn sequences(n: usize) -> State<Form> {
    array(Dtype::I32, &[n])
}

pub fn kv(keys: State<Form>, values: State<Form>, offset: State<Form>) -> CacheState<Form> {
    list("KVCache", vec![keys, values, offset])
}

pub fn rotating(len: Option<usize>, offset: usize, keep: usize, max_size: usize, index: usize) -> CacheState<Form> {
    let both = len.map_or(State::None, rows);
    list("RotatingKVCache", vec![both.clone(), both, int(offset), int(keep), int(max_size), int(index)])
}

pub fn quantized(keys: State<Form>, offset: usize, group_size: usize, bits: usize) -> CacheState<Form> {
    let values = if keys == State::None { State::None } else { packed(8) };
    list("QuantizedKVCache", vec![keys, values, int(offset), int(group_size), int(bits)])
}

pub fn chunked(len: Option<usize>, offset: usize, chunk_size: usize, start: usize) -> CacheState<Form> {
    let both = len.map_or(State::None, rows);
    list("ChunkedKVCache", vec![both.clone(), both, int(offset), int(chunk_size), int(start)])
}

pub fn batch_rotating(
    len: Option<usize>,
    max_size: usize,
    offset: usize,
    index: usize,
    rotated: bool,
) -> CacheState<Form> {
    let both = len.map_or(State::None, rows);
    let numbers = vec![int(max_size), int(offset), int(index), State::Bool(rotated)];
    list("BatchRotatingKVCache", [vec![both.clone(), both, sequences(2), sequences(2)], numbers].concat())
}

pub fn quantized_rotating(len: Option<usize>, ring: [usize; 4], group_size: usize, bits: usize) -> CacheState<Form> {
    let both = len.map_or(State::None, packed);
    let numbers = [&ring[..], &[group_size, bits]].concat().into_iter().map(int);
    list("QuantizedRotatingKVCache", [vec![both.clone(), both], numbers.collect()].concat())
}

pub fn batch_quantized(len: Option<usize>, index: usize, group_size: usize, bits: usize) -> CacheState<Form> {
    let both = len.map_or(State::None, packed);
    let numbers = [index, group_size, bits].map(int);
    list("BatchQuantizedKVCache", [vec![both.clone(), both, sequences(2), sequences(2)], numbers.into()].concat())
}

pub fn parent(children: Vec<CacheState<Form>>) -> CacheState<Form> {
    let pair = |child: CacheState<Form>| State::List(vec![child.state, State::Str(child.class)]);
    list("CacheList", children.into_iter().map(pair).collect())
}

#[track_caller]
pub fn refused(cache: &CacheState<Form>, key: &str, expected: &str, got: &str) {
    let fault = check(cache).expect_err("a fault");
    assert_eq!(fault.key, key, "{fault:?}");
    assert!(fault.expected.contains(expected), "{fault:?}");
    assert!(fault.got.contains(got), "{fault:?}");
}

/// The place of a number in a state, replaced.
pub fn with(mut cache: CacheState<Form>, at: usize, item: State<Form>) -> CacheState<Form> {
    if let State::List(items) = &mut cache.state {
        items[at] = item;
    }
    cache
}

/// One good cache of every class.
pub fn good() -> Vec<CacheState<Form>> {
    vec![
        kv(rows(8), rows(8), int(5)),
        rotating(Some(8), 11, 2, 8, 5),
        quantized(packed(8), 5, 32, 4),
        list("ConcatenateKVCache", vec![rows(8), rows(8)]),
        chunked(Some(8), 11, 4, 5),
        list(
            "ArraysCache",
            vec![State::List(vec![array(Dtype::F32, &[2, 3]), State::None]), sequences(2), State::None],
        ),
        parent(vec![kv(rows(8), rows(8), int(5)), parent(vec![rotating(None, 0, 0, 8, 0)])]),
        list("BatchKVCache", vec![rows(8), rows(8), sequences(2), sequences(2), int(5)]),
        batch_rotating(Some(8), 8, 11, 3, true),
        quantized_rotating(Some(8), [11, 2, 8, 5], 32, 4),
        batch_quantized(Some(8), 5, 32, 4),
    ]
}
