//! Whether a state is one that the class can reach: kinds, shapes, dtypes, and numbers against each other.

use super::{Class, Described, Fault, Kind, MAX_DEPTH, MAX_LEVELS, MAX_STATE_TEXT, Rule, count};
use crate::array::Dtype;
use crate::cache::scheme::{BITS, GROUP_SIZES};
use crate::cache::state::{CacheState, State};

/// Largest offset: MLX counts positions in int32.
pub const MAX_OFFSET: i64 = i32::MAX as i64;

/// Checks that the class can have this state. Keys of faults are dotted places in the state.
///
/// # Errors
/// The first fault.
pub fn check<T: Described>(cache: &CacheState<T>) -> Result<(), Fault> {
    check_state(&cache.class, &cache.state, "", "class", 0)
}

/// Checks all caches of a model. Keys of faults begin with the layer, as in files of format 0.32.
///
/// # Errors
/// The first fault.
pub fn check_layers<T: Described>(layers: &[CacheState<T>]) -> Result<(), Fault> {
    for (layer, cache) in layers.iter().enumerate() {
        let key = layer.to_string();
        check_state(&cache.class, &cache.state, &key, &key, 0)?;
    }
    Ok(())
}

/// `at` below `key`.
fn join(key: &str, at: usize) -> String {
    if key.is_empty() { at.to_string() } else { format!("{key}.{at}") }
}

fn check_state<T: Described>(
    name: &str,
    state: &State<T>,
    key: &str,
    name_key: &str,
    depth: usize,
) -> Result<(), Fault> {
    let class = Class::named(name, name_key)?;
    let whole = if key.is_empty() { "state" } else { key };
    if class.rule == Rule::Any {
        return check_any(state, whole, 0);
    }
    let State::List(items) = state else {
        return Err(Fault::new(whole, format!("the state of a {name}, a tuple"), describe(state)));
    };
    if class.rule == Rule::Children {
        return check_children(items, key, depth);
    }
    if items.len() != class.fields.len() {
        let expected = format!("{} entries of a {name}", class.fields.len());
        return Err(Fault::new(whole, expected, format!("{} entries", items.len())));
    }
    for (at, (field, item)) in class.fields.iter().zip(items).enumerate() {
        check_kind(field.kind, item).map_err(|(expected, got)| {
            Fault::new(&join(key, at), format!("{} of a {name}, {expected}", field.name), got)
        })?;
    }
    let checked = Checked { class, items, key };
    if class.has_rows() { checked.check_rows() } else { Ok(()) }
}

/// Checks any state of a registered class.
fn check_any<T>(state: &State<T>, key: &str, level: usize) -> Result<(), Fault> {
    match state {
        State::List(_) if level == MAX_LEVELS => {
            Err(Fault::new(key, format!("at most {MAX_LEVELS} lists in each other"), "one more"))
        }
        State::List(items) => {
            items.iter().enumerate().try_for_each(|(at, item)| check_any(item, &join(key, at), level + 1))
        }
        State::Str(text) if text.chars().nth(MAX_STATE_TEXT).is_some() => {
            Err(Fault::new(key, format!("a text of at most {MAX_STATE_TEXT}"), format!("{} bytes", text.len())))
        }
        _ => Ok(()),
    }
}

fn check_children<T: Described>(children: &[State<T>], key: &str, depth: usize) -> Result<(), Fault> {
    if depth == MAX_DEPTH {
        return Err(Fault::new(key, format!("at most {MAX_DEPTH} CacheLists in each other"), "one more"));
    }
    for (at, child) in children.iter().enumerate() {
        let key = join(key, at);
        match child {
            State::List(parts) if parts.len() == 2 => {
                let (state_key, name_key) = (join(&key, 0), join(&key, 1));
                let State::Str(name) = &parts[1] else {
                    return Err(Fault::new(&name_key, "the class name of a child", describe(&parts[1])));
                };
                check_state(name, &parts[0], &state_key, &name_key, depth + 1)?;
            }
            other => return Err(Fault::new(&key, "a child's state and its class name", describe(other))),
        }
    }
    Ok(())
}

/// What a value is, for error texts.
fn describe<T: Described>(item: &State<T>) -> String {
    match item {
        State::Array(array) => format!("an array {} {:?}", array.dtype().safetensors_name(), array.shape()),
        State::Int(value) => value.to_string(),
        State::List(items) => format!("a list of {}", items.len()),
        other => other.kind().to_owned(),
    }
}

/// Checks one entry by itself; else what was expected and what is there.
fn check_kind<T: Described>(kind: Kind, item: &State<T>) -> Result<(), (&'static str, String)> {
    let is_array = |item: &State<T>| matches!(item, State::Array(_));
    let none = matches!(item, State::None);
    let is_array_or_none = |item: &State<T>| matches!(item, State::Array(_) | State::None);
    let (expected, fits) = match kind {
        Kind::Rows => ("an array or none", is_array_or_none(item)),
        Kind::Packed => (
            "three arrays or none",
            none || matches!(item, State::List(parts) if parts.len() == 3 && parts.iter().all(is_array)),
        ),
        Kind::Count => ("an integer that is not negative", matches!(item, State::Int(0..))),
        Kind::Flag => ("a bool", matches!(item, State::Bool(_))),
        Kind::PerSequence => ("an integer array (B,)", is_per_sequence(item)),
        Kind::MaybePerSequence => ("an integer array (B,) or none", none || is_per_sequence(item)),
        Kind::Slots => {
            ("a list of arrays or none", matches!(item, State::List(slots) if slots.iter().all(is_array_or_none)))
        }
    };
    if fits { Ok(()) } else { Err((expected, describe(item))) }
}

/// mlx-lm's arrays of no sequences are floats: an empty Python list has no other type.
fn is_per_sequence<T: Described>(item: &State<T>) -> bool {
    let State::Array(array) = item else { return false };
    let (shape, dtype) = (array.shape(), array.dtype());
    shape.len() == 1 && (matches!(dtype, Dtype::I32 | Dtype::I64) || shape[0] == 0)
}

/// The entries of a class with keys and values, each of the right kind.
struct Checked<'a, T> {
    class: &'static Class,
    items: &'a [State<T>],
    key: &'a str,
}

impl<T: Described> Checked<'_, T> {
    /// A fault of the entry at `at`.
    fn fault(&self, at: usize, expected: impl AsRef<str>, got: impl AsRef<str>) -> Fault {
        let name = self.class.fields.get(at).map_or("entry", |field| field.name);
        let expected = format!("{name} of a {}, {}", self.class.name, expected.as_ref());
        Fault::new(&join(self.key, at), expected, got)
    }

    fn check_rows(&self) -> Result<(), Fault> {
        if self.class.fields[0].kind == Kind::Packed {
            self.among("group_size", &GROUP_SIZES)?;
            self.among("bits", &BITS)?;
        }
        let sizes = match (&self.items[0], &self.items[1]) {
            (State::None, State::None) => None,
            (State::None, _) => return Err(self.fault(0, "an array, as there are values", "none")),
            (_, State::None) => return Err(self.fault(1, "an array, as there are keys", "none")),
            _ => Some(self.common_sizes()?),
        };
        self.check_sequences(sizes.map(|sizes| sizes[0]))?;
        let len = sizes.map(|sizes| sizes[2] as i64);
        match self.class.rule {
            Rule::First(at) => self.at_most(at, len.unwrap_or(0), "rows"),
            Rule::Chunk => self.check_chunk(len.unwrap_or(0)),
            Rule::Ring => self.check_ring(len),
            Rule::BatchRing => self.check_batch_ring(len),
            Rule::All | Rule::Slots | Rule::Children | Rule::Any => Ok(()),
        }
    }

    /// The number called `name`; 0 if the class has none.
    fn named(&self, name: &str) -> i64 {
        self.class.place(name).map_or(0, |at| count(self.items, at))
    }

    fn among(&self, name: &str, known: &[usize]) -> Result<(), Fault> {
        let got = self.named(name);
        if known.contains(&(got as usize)) {
            return Ok(());
        }
        let at = self.class.place(name).unwrap_or(self.class.fields.len());
        Err(self.fault(at, format!("among {known:?}"), got.to_string()))
    }

    fn at_most(&self, at: usize, limit: i64, what: &str) -> Result<(), Fault> {
        let got = count(self.items, at);
        if got <= limit {
            return Ok(());
        }
        Err(self.fault(at, format!("at most {limit} {what}"), got.to_string()))
    }

    /// B, H and rows, on which keys and values agree.
    fn common_sizes(&self) -> Result<[usize; 3], Fault> {
        let (keys, values) = (self.sizes(0)?, self.sizes(1)?);
        if keys == values {
            return Ok(keys);
        }
        Err(self.fault(1, format!("[B, H, rows] {keys:?} as in keys"), format!("{values:?}")))
    }

    /// B, H and rows of keys or values.
    fn sizes(&self, at: usize) -> Result<[usize; 3], Fault> {
        match &self.items[at] {
            State::Array(array) => {
                let [b, h, rows, _] = self.four(at, "", array, Dtype::is_float, "float")?;
                Ok([b, h, rows])
            }
            State::List(parts) => self.packed_sizes(at, parts),
            other => Err(self.fault(at, "an array", describe(other))),
        }
    }

    /// The shape of an array `(B, H, L, D)` of the right type.
    fn four(
        &self,
        at: usize,
        part: &str,
        array: &T,
        fits: impl Fn(Dtype) -> bool,
        types: &str,
    ) -> Result<[usize; 4], Fault> {
        match <[usize; 4]>::try_from(array.shape()) {
            Ok(shape) if fits(array.dtype()) => Ok(shape),
            _ => {
                let got = format!("{} {:?}", array.dtype().safetensors_name(), array.shape());
                let mut fault = self.fault(at, format!("a {types} array (B, H, L, D)"), got);
                fault.key.push_str(part);
                Err(fault)
            }
        }
    }

    /// Packed words `(B, H, L, D * bits / 32)`, scales and biases `(B, H, L, D / group_size)`.
    fn packed_sizes(&self, at: usize, parts: &[State<T>]) -> Result<[usize; 3], Fault> {
        let [State::Array(words), State::Array(scales), State::Array(biases)] = parts else {
            return Err(self.fault(at, "three arrays", format!("{} entries", parts.len())));
        };
        let group_size = self.named("group_size") as usize;
        let bits = self.named("bits") as usize;
        let shape = self.four(at, ".0", words, |dtype| dtype == Dtype::U32, "U32")?;
        let scales_shape = self.four(at, ".1", scales, Dtype::is_float, "float")?;
        let biases_shape = self.four(at, ".2", biases, Dtype::is_float, "float")?;
        let [b, h, rows, n_groups] = scales_shape;
        // Whole groups of 32, 64 or 128 elements always fill whole words.
        let n_words = n_groups.checked_mul(group_size / 32 * bits);
        if Some(shape) != n_words.map(|n_words| [b, h, rows, n_words]) {
            let expected = format!("words for scales {scales_shape:?} at {bits} bits and group size {group_size}");
            return Err(self.fault(at, expected, format!("{shape:?}")));
        }
        if biases_shape != scales_shape || biases.dtype() != scales.dtype() {
            let form = |shape, dtype: Dtype| format!("{} {shape:?}", dtype.safetensors_name());
            let expected = format!("biases as the scales, {}", form(scales_shape, scales.dtype()));
            return Err(self.fault(at, expected, form(biases_shape, biases.dtype())));
        }
        Ok([b, h, rows])
    }

    /// Arrays `(n,)` agree with each other; there are rows of as many sequences, or of more, as mlx-lm allows.
    fn check_sequences(&self, n_rows: Option<usize>) -> Result<(), Fault> {
        let mut agreed = None;
        for (at, field) in self.class.fields.iter().enumerate() {
            if let (Kind::PerSequence, State::Array(array)) = (field.kind, &self.items[at]) {
                let n = array.shape().first().copied().unwrap_or(0);
                let expected = *agreed.get_or_insert(n);
                if n != expected {
                    return Err(self.fault(at, format!("{expected} sequences"), n.to_string()));
                }
                if let Some(n_rows) = n_rows.filter(|&n_rows| n > n_rows) {
                    return Err(self.fault(at, format!("at most {n_rows} sequences"), n.to_string()));
                }
            }
        }
        Ok(())
    }

    fn check_chunk(&self, len: i64) -> Result<(), Fault> {
        let [offset, chunk_size, start] = [2, 3, 4].map(|at| count(self.items, at));
        self.at_most(2, MAX_OFFSET, "tokens")?;
        if chunk_size == 0 {
            return Err(self.fault(3, "at least 1", "0"));
        }
        self.at_most(4, offset, "(offset)")?;
        if offset - start > len {
            return Err(self.fault(
                2,
                format!("at most start_position + {len} rows"),
                format!("{start} + {}", offset - start),
            ));
        }
        Ok(())
    }

    fn check_ring(&self, len: Option<i64>) -> Result<(), Fault> {
        let [offset, keep, max_size, index] = [2, 3, 4, 5].map(|at| count(self.items, at));
        if keep >= max_size {
            let at = if max_size == 0 { 4 } else { 3 };
            return Err(self.fault(at, "0 <= keep < max_size", format!("keep {keep}, max_size {max_size}")));
        }
        self.at_most(2, MAX_OFFSET, "tokens")?;
        self.check_fill(2, 5, len, max_size)?;
        // A full ring wraps to `keep`; each row written since then is a token beyond max_size.
        let wrapped = len == Some(max_size) && index < max_size;
        if offset >= max_size && wrapped && (index <= keep || offset < max_size + index - keep) {
            let got = format!("_idx {index}, keep {keep}, offset {offset}");
            return Err(self.fault(5, format!("a place that a ring of {max_size} rows reaches"), got));
        }
        if offset >= max_size && !wrapped && Some(index) != len {
            return Err(self.fault(5, "the end of the rows", index.to_string()));
        }
        Ok(())
    }

    fn check_batch_ring(&self, len: Option<i64>) -> Result<(), Fault> {
        let [max_size, offset, index] = [4, 5, 6].map(|at| count(self.items, at));
        let rotated = matches!(self.items[7], State::Bool(true));
        if max_size == 0 {
            return Err(self.fault(4, "at least 1", "0"));
        }
        self.at_most(5, MAX_OFFSET, "tokens")?;
        if rotated && (len != Some(max_size) || offset < max_size) {
            let got = format!("{} rows, _offset {offset}", len.unwrap_or(0));
            return Err(self.fault(7, format!("false, or a full ring of {max_size} rows"), got));
        }
        self.check_fill(5, 6, len, max_size)?;
        if rotated && (index == 0 || index > max_size || offset < max_size + index) {
            let got = format!("_idx {index}, _offset {offset}");
            return Err(self.fault(6, format!("a place that a ring of {max_size} rows reaches"), got));
        }
        if offset >= max_size && !rotated && Some(index) != len {
            return Err(self.fault(6, "the end of the rows", index.to_string()));
        }
        Ok(())
    }

    /// A ring that is not full has `_idx` = offset and at most `max_size` rows; a full one at least `max_size`, and
    /// no row that was never written. A long prompt may leave more rows than `max_size`.
    fn check_fill(&self, offset_at: usize, index_at: usize, len: Option<i64>, max_size: i64) -> Result<(), Fault> {
        let (offset, index) = (count(self.items, offset_at), count(self.items, index_at));
        let rows = len.unwrap_or(0);
        if offset < max_size {
            self.at_most(offset_at, rows, "rows")?;
            if index != offset {
                return Err(self.fault(
                    index_at,
                    format!("{offset}, the offset of a ring that is not full"),
                    index.to_string(),
                ));
            }
            if rows > max_size {
                let expected = format!("at most {max_size} rows, as the ring is not full");
                return Err(self.fault(0, expected, rows.to_string()));
            }
        } else if rows < max_size || rows > offset {
            return Err(self.fault(0, format!("{max_size} to {offset} rows, as the ring is full"), rows.to_string()));
        }
        Ok(())
    }
}
