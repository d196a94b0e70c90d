//! Caches and files made out of choices, without any array: for round trips and for fuzzing.

use mlxrs_py::array::Dtype;
use mlxrs_py::cache::schema::{self, Described};
use mlxrs_py::cache::state::{CacheState, State};
use mlxrs_py::persist::header::{self, Header, TensorInfo};
use mlxrs_py::persist::wire::{self, Decoded, Encoded, Format, Leaf};
use std::collections::BTreeMap;
use std::path::Path;

/// Stands for an array.
#[derive(Clone, Debug, PartialEq)]
pub struct Form {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Described for Form {
    fn shape(&self) -> Vec<usize> {
        self.shape.clone()
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }
}

impl From<TensorInfo> for Form {
    fn from(info: TensorInfo) -> Self {
        Self { dtype: info.dtype, shape: info.shape }
    }
}

/// Where choices come from.
pub trait Choose {
    /// A number below `n`; 0 is the simplest choice.
    fn below(&mut self, n: usize) -> usize;

    fn flip(&mut self) -> bool {
        self.below(2) == 1
    }

    fn within(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }
}

/// Choices out of a list, then the simplest ones: shorter lists make simpler caches, so that proptest can shrink.
pub struct Listed(std::vec::IntoIter<u16>);

impl Listed {
    pub fn new(choices: Vec<u16>) -> Self {
        Self(choices.into_iter())
    }
}

impl Choose for Listed {
    fn below(&mut self, n: usize) -> usize {
        self.0.next().map_or(0, |choice| usize::from(choice) % n)
    }
}

/// The same endless choices for the same seed.
pub struct Xorshift(pub u64);

impl Choose for Xorshift {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

pub fn array(dtype: Dtype, shape: &[usize]) -> State<Form> {
    State::Array(Form { dtype, shape: shape.to_vec() })
}

pub fn int(value: usize) -> State<Form> {
    State::Int(value as i64)
}

pub fn list(class: &str, items: Vec<State<Form>>) -> CacheState<Form> {
    CacheState { class: class.into(), state: State::List(items) }
}

/// What the caches of [`layers`] are made for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Padding {
    /// Buffers may be longer than the valid rows.
    Kept,
    /// Only valid rows, and only what format 0.31 can say.
    Cut,
}

/// Up to four caches of any class.
pub fn layers(choose: &mut dyn Choose, padding: Padding) -> Vec<CacheState<Form>> {
    (0..choose.below(5)).map(|_| cache(choose, padding, 0)).collect()
}

/// Up to two strings.
pub fn metadata(choose: &mut dyn Choose) -> BTreeMap<String, String> {
    let names = ["model", "tokenizer_config", "two words", "ключ"];
    (0..choose.below(3)).map(|_| (names[choose.below(4)].to_owned(), "{\"a\": \"ü\"}".to_owned())).collect()
}

/// B, H and the two head sizes.
struct Sizes {
    batch: usize,
    heads: usize,
    dims: [usize; 2],
    dtype: Dtype,
}

impl Sizes {
    fn choose(choose: &mut dyn Choose) -> Self {
        let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16][choose.below(3)];
        Self {
            batch: choose.within(1, 3),
            heads: choose.within(1, 2),
            dims: [choose.within(1, 4), choose.below(4)],
            dtype,
        }
    }

    /// Keys and values of `rows` rows; none of either for None.
    fn pair(&self, rows: Option<usize>) -> Vec<State<Form>> {
        let one = |dim| rows.map_or(State::None, |rows| array(self.dtype, &[self.batch, self.heads, rows, dim]));
        self.dims.map(one).into()
    }

    fn packed(&self, rows: Option<usize>, group_size: usize, bits: usize) -> Vec<State<Form>> {
        let one = |n_groups: usize| {
            rows.map_or(State::None, |rows| {
                let groups = array(self.dtype, &[self.batch, self.heads, rows, n_groups]);
                let words = array(Dtype::U32, &[self.batch, self.heads, rows, n_groups * group_size * bits / 32]);
                State::List(vec![words, groups.clone(), groups])
            })
        };
        self.dims.map(one).into()
    }
}

/// Any cache of any class.
pub fn cache(choose: &mut dyn Choose, padding: Padding, depth: usize) -> CacheState<Form> {
    let sizes = Sizes::choose(choose);
    let used = choose.below(7);
    let spare = if padding == Padding::Kept { choose.below(3) * 4 } else { 0 };
    // One in five is empty.
    let rows = (choose.below(5) != 4).then_some(used + spare);
    let used = rows.map_or(0, |_| used);
    let sequences = || vec![array(Dtype::I32, &[sizes.batch]), array(Dtype::I32, &[sizes.batch])];
    // Only format 0.32 has the last three; lists are not nested without end.
    let kinds = if padding == Padding::Kept { 12 } else { 9 };
    match choose.below(kinds) {
        0 => list("KVCache", [sizes.pair(rows), vec![int(used)]].concat()),
        1 => {
            let ring = ring(choose, padding);
            let keep = choose.below(ring.index.clamp(1, ring.max_size));
            let numbers = [ring.offset, keep, ring.max_size, ring.index].map(int);
            list("RotatingKVCache", [sizes.pair(ring.rows), numbers.into()].concat())
        }
        2 => {
            let (group_size, bits) = packing(choose);
            let numbers = [used, group_size, bits].map(int);
            list("QuantizedKVCache", [sizes.packed(rows, group_size, bits), numbers.into()].concat())
        }
        3 => list("ConcatenateKVCache", sizes.pair(rows)),
        4 => {
            let start = rows.map_or(0, |_| choose.below(9));
            let numbers = [used + start, choose.within(1, 9), start].map(int);
            list("ChunkedKVCache", [sizes.pair(rows), numbers.into()].concat())
        }
        5 => {
            let slot = |choose: &mut dyn Choose| match choose.below(3) {
                0 => State::None,
                n => array(sizes.dtype, &[sizes.batch, 3, n][..=n]),
            };
            let slots = (0..choose.below(4)).map(|_| slot(choose)).collect();
            let mut maybe = || match padding {
                Padding::Kept if choose.flip() => array(Dtype::I32, &[sizes.batch]),
                _ => State::None,
            };
            list("ArraysCache", vec![State::List(slots), maybe(), maybe()])
        }
        6 => list("BatchKVCache", [sizes.pair(rows), sequences(), vec![int(used)]].concat()),
        7 => {
            let ring = ring(choose, padding);
            let rotated = ring.offset >= ring.max_size + ring.index && ring.rows == Some(ring.max_size);
            let index = if !rotated && ring.offset >= ring.max_size { ring.rows.unwrap_or(0) } else { ring.index };
            let numbers = vec![int(ring.max_size), int(ring.offset), int(index), State::Bool(rotated)];
            list("BatchRotatingKVCache", [sizes.pair(ring.rows), sequences(), numbers].concat())
        }
        9 => {
            let ring = ring(choose, padding);
            let keep = choose.below(ring.index.clamp(1, ring.max_size));
            let (group_size, bits) = packing(choose);
            let numbers = [ring.offset, keep, ring.max_size, ring.index, group_size, bits].map(int);
            list("QuantizedRotatingKVCache", [sizes.packed(ring.rows, group_size, bits), numbers.into()].concat())
        }
        10 => {
            let (group_size, bits) = packing(choose);
            let numbers = [used, group_size, bits].map(int);
            let packed = sizes.packed(rows, group_size, bits);
            list("BatchQuantizedKVCache", [packed, sequences(), numbers.into()].concat())
        }
        11 => {
            schema::register(REGISTERED).expect("a free name");
            CacheState { class: REGISTERED.into(), state: tree(choose, 0) }
        }
        _ if depth == 3 => list("ConcatenateKVCache", sizes.pair(rows)),
        _ => {
            let child = |child: CacheState<Form>| State::List(vec![child.state, State::Str(child.class)]);
            let children = (0..choose.below(3)).map(|_| child(cache(choose, padding, depth + 1))).collect();
            list("CacheList", children)
        }
    }
}

/// The name of a registered class.
pub const REGISTERED: &str = "Registered";

/// Any state of a registered class.
fn tree(choose: &mut dyn Choose, level: usize) -> State<Form> {
    match choose.below(if level < 3 { 8 } else { 6 }) {
        0 => State::None,
        1 => array([Dtype::F32, Dtype::I32][choose.below(2)], &[2, 0, 3][..choose.below(4)]),
        2 => int(choose.below(1 << 40)),
        3 => State::Bool(choose.flip()),
        4 => State::Float(choose.below(9) as f32 / 4.0),
        5 => State::Str(["", "ü 漢字", "KVCache"][choose.below(3)].into()),
        _ => State::List((0..choose.below(4)).map(|_| tree(choose, level + 1)).collect()),
    }
}

/// Group size and bits.
fn packing(choose: &mut dyn Choose) -> (usize, usize) {
    ([32, 64, 128][choose.below(3)], [1, 2, 3, 4, 5, 6, 8][choose.below(7)])
}

struct Ring {
    rows: Option<usize>,
    max_size: usize,
    offset: usize,
    index: usize,
}

/// A ring that is empty, filling, full, or too long after a prompt.
fn ring(choose: &mut dyn Choose, padding: Padding) -> Ring {
    let (max_size, more) = (choose.within(1, 6), choose.below(20));
    match choose.below(4) {
        0 => Ring { rows: None, max_size, offset: 0, index: 0 },
        1 => {
            let offset = choose.below(max_size);
            let rows = if padding == Padding::Kept { choose.within(offset, max_size) } else { offset };
            Ring { rows: Some(rows), max_size, offset, index: offset }
        }
        2 => {
            let index = choose.within(1, max_size);
            let beyond = if index < max_size { index } else { 0 };
            Ring { rows: Some(max_size), max_size, offset: max_size + beyond + more, index }
        }
        _ => {
            let rows = max_size + choose.within(1, 9);
            Ring { rows: Some(rows), max_size, offset: rows + more, index: rows }
        }
    }
}

/// The bytes of a file; elements of float arrays are different in every row, others are zero.
pub fn file(encoded: &Encoded<Form>) -> Vec<u8> {
    file_of(encoded, |form| {
        let n_bytes = form.shape.iter().product::<usize>() * form.dtype.size();
        (0..n_bytes).map(|at| if form.dtype.is_float() { (at % 61 + n_bytes % 7) as u8 } else { 0 }).collect()
    })
}

/// The bytes of a file; `bytes` gives those of an array.
pub fn file_of<T: Described>(encoded: &Encoded<T>, bytes: impl Fn(&T) -> Vec<u8>) -> Vec<u8> {
    let mut file = header::build(&encoded.tensors, &encoded.metadata).expect("a short header");
    for (_, leaf) in &encoded.tensors {
        match leaf {
            Leaf::Array(array) => file.extend(bytes(array)),
            Leaf::Scalar { bytes, .. } => file.extend_from_slice(bytes),
        }
    }
    file
}

/// Encodes caches into the bytes of a file.
pub fn save(format: Format, layers: &[CacheState<Form>], user: &BTreeMap<String, String>) -> mlxrs_py::Result<Vec<u8>> {
    wire::encode(format, layers.to_vec(), user).map(|encoded| file(&encoded))
}

/// The name that errors of [`load`] bear.
pub const NAME: &str = "cache.safetensors";

/// Decodes the bytes of a file; numbers and names are read out of them.
pub fn load(file: &[u8]) -> mlxrs_py::Result<Decoded> {
    let (header, data) = header::parse_file(file).map_err(|fault| fault.in_file(Path::new(NAME)))?;
    decode(file, &header, data)
}

/// Decodes the bytes of a file whose header has been read, and whose data begins at `data`.
pub fn decode(file: &[u8], header: &Header, data: usize) -> mlxrs_py::Result<Decoded> {
    wire::decode(Path::new(NAME), header, &mut |info| {
        assert!(info.n_bytes() <= 8 * schema::MAX_STATE_TEXT as u64, "only small tensors are read: {info:?}");
        Ok(file[data + info.start as usize..data + info.end as usize].to_vec())
    })
}

/// The caches of a file, without the places of their tensors.
pub fn forms(decoded: Decoded) -> Vec<CacheState<Form>> {
    let form = |state: State<TensorInfo>| state.try_map(&mut |info| Ok::<_, ()>(Form::from(info))).expect("no error");
    decoded.layers.into_iter().map(|cache| CacheState { class: cache.class, state: form(cache.state) }).collect()
}
