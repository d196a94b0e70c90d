//! Format 0.31: the arrays under dotted keys `layer.entry…`, cut to the valid rows, and the numbers as strings.
//!
//! Metadata: `0.<layer>…` the numbers, in an order of their own (`meta_state`); `1.<key>` the user's strings;
//! `2.<layer>` class names. A `CacheList` keeps the class names of its children in `0.<layer>.0.<child>` and their
//! numbers in `0.<layer>.1.<child>…`.
//!
//! Some counts are not stored. The offset of a `KVCache` and the `_idx` of a `BatchKVCache` are the number of rows;
//! the offset of a `ChunkedKVCache` is `start_position` + rows. (mlx-lm 0.31 counts padding into `start_position`
//! when it cuts the front, so that the offset of such a cache cannot be known.)
//!
//! mlx-lm 0.31 cannot write caches that are empty in whole or part. Here a tensor without elements stands for what is
//! missing, in a place where mlx-lm's reader refuses the file instead of dropping or misreading the layer:
//! - an empty cache: one such tensor in place of keys and values;
//! - a `CacheList` without children: one such tensor, and the empty string as its numbers;
//! - an `ArraysCache` with empty slots: one such tensor for each, and as its numbers a `0` or `1` per slot; without
//!   any slot: one such tensor and `-`.
//!
//! An `ArraysCache` with `left_padding` or `lengths` cannot be written.

use super::super::header::TensorInfo;
use super::source::{Source, metadata_key};
use super::{Encoded, Leaf, SAVE};
use crate::cache::schema::{Class, Described, Field, Kind, Rule, V031, n_rows};
use crate::cache::state::{CacheState, State};
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// The numbers of an `ArraysCache` without slots.
const NO_SLOTS: &str = "-";

/// Where a cache stands: the key of its tensors, and that of its numbers in group 0.
struct Place {
    tensors: String,
    texts: String,
}

impl Place {
    fn layer(layer: usize) -> Self {
        Self { tensors: layer.to_string(), texts: format!("0.{layer}") }
    }

    fn child(&self, child: usize) -> Self {
        Self { tensors: format!("{}.{child}", self.tensors), texts: format!("{}.1.{child}", self.texts) }
    }

    fn child_name(&self, child: usize) -> String {
        format!("{}.0.{child}", self.texts)
    }

    fn tensor(&self, at: usize) -> String {
        format!("{}.{at}", self.tensors)
    }

    fn text(&self, at: usize) -> String {
        format!("{}.{at}", self.texts)
    }
}

pub(super) fn encode<T: Described>(layers: Vec<CacheState<T>>, user: &BTreeMap<String, String>) -> Result<Encoded<T>> {
    let mut encoded = Encoded::new();
    encoded.metadata.extend(user.iter().map(|(key, text)| (format!("1.{key}"), text.clone())));
    for (layer, cache) in layers.into_iter().enumerate() {
        encoded.put_cache(&Place::layer(layer), &cache.class, cache.state)?;
        encoded.metadata.insert(format!("2.{layer}"), cache.class);
    }
    Ok(encoded)
}

impl<T: Described> Encoded<T> {
    fn put_cache(&mut self, place: &Place, name: &str, state: State<T>) -> Result<()> {
        let class = Class::find(name).filter(|class| class.in_v031).ok_or_else(|| {
            Error::value(SAVE, format!("layer {}: a class that format 0.31 has, or format 0.32", place.tensors), name)
        })?;
        // The schema has checked the states; what is no list here has no entries.
        let State::List(items) = state else { return Ok(()) };
        match class.rule {
            Rule::Children => self.put_children(place, items),
            Rule::Slots => self.put_slots(place, items),
            _ => self.put_fields(place, class, items),
        }
    }

    fn put_children(&mut self, place: &Place, children: Vec<State<T>>) -> Result<()> {
        if children.is_empty() {
            self.tensors.push((place.tensor(0), Leaf::nothing()));
            self.metadata.insert(place.texts.clone(), String::new());
        }
        for (at, child) in children.into_iter().enumerate() {
            let State::List(mut parts) = child else { continue };
            if let (Some(State::Str(name)), Some(state)) = (parts.pop(), parts.pop()) {
                self.put_cache(&place.child(at), &name, state)?;
                self.metadata.insert(place.child_name(at), name);
            }
        }
        Ok(())
    }

    fn put_slots(&mut self, place: &Place, fields: Vec<State<T>>) -> Result<()> {
        let mut fields = fields.into_iter();
        let slots = if let Some(State::List(slots)) = fields.next() { slots } else { Vec::new() };
        if fields.any(|field| !matches!(field, State::None)) {
            let expected = format!("layer {}: no left_padding and no lengths in format 0.31", place.tensors);
            return Err(Error::value(SAVE, expected, "an ArraysCache with one of them"));
        }
        let mut mask: String = slots.iter().map(|slot| if matches!(slot, State::None) { '0' } else { '1' }).collect();
        if slots.is_empty() {
            mask.push_str(NO_SLOTS);
            self.tensors.push((place.tensor(0), Leaf::nothing()));
        } else if !mask.contains('0') {
            mask.clear();
        }
        self.metadata.insert(place.texts.clone(), mask);
        for (at, slot) in slots.into_iter().enumerate() {
            let leaf = if let State::Array(array) = slot { Leaf::Array(array) } else { Leaf::nothing() };
            self.tensors.push((place.tensor(at), leaf));
        }
        Ok(())
    }

    fn put_fields(&mut self, place: &Place, class: &Class, items: Vec<State<T>>) -> Result<()> {
        let len = items.first().and_then(n_rows);
        let valid = class.valid_rows(&items, len.unwrap_or(0));
        if class.is_padded() && Some(valid) != len.or(Some(0)) {
            let expected = format!("layer {}: {valid} rows, the valid ones", place.tensors);
            return Err(Error::value(SAVE, expected, format!("{} rows", len.unwrap_or(0))));
        }
        if class.n_texts() == 0 {
            self.metadata.insert(place.texts.clone(), String::new());
        }
        let mut n_tensors = 0;
        if len.is_none() {
            self.tensors.push((place.tensor(0), Leaf::nothing()));
            n_tensors = 1;
        }
        for (field, item) in class.fields.iter().zip(items) {
            match (field.v031, item) {
                (V031::Text(at), item) => {
                    self.metadata.insert(place.text(at), text_of(&item));
                }
                (V031::Tensor, State::None) | (V031::Absent, _) => {}
                (V031::Tensor, item) => {
                    self.put_arrays(place.tensor(n_tensors), item);
                    n_tensors += 1;
                }
            }
        }
        Ok(())
    }

    /// An array, or the three of quantized rows.
    fn put_arrays(&mut self, key: String, item: State<T>) {
        match item {
            State::Array(array) => self.tensors.push((key, Leaf::Array(array))),
            State::List(parts) => {
                for (at, part) in parts.into_iter().enumerate() {
                    self.put_arrays(format!("{key}.{at}"), part);
                }
            }
            _ => {}
        }
    }
}

/// A number as Python's `str` writes it.
fn text_of<T>(item: &State<T>) -> String {
    match item {
        State::Int(value) => value.to_string(),
        State::Bool(true) => "True".into(),
        _ => "False".into(),
    }
}

pub(super) fn decode(source: &mut Source<'_>) -> Result<Vec<CacheState<TensorInfo>>> {
    let mut layers = Vec::new();
    loop {
        let name_key = format!("2.{}", layers.len());
        let Some(name) = source.take_text(&name_key) else { return Ok(layers) };
        let class = source.class(name, &metadata_key(&name_key))?;
        let state = cache(source, &Place::layer(layers.len()), class, 0)?;
        layers.push(CacheState { class: name.to_owned(), state });
    }
}

fn cache(source: &mut Source<'_>, place: &Place, class: &Class, depth: usize) -> Result<State<TensorInfo>> {
    if !class.in_v031 {
        return Err(source.refuse(&place.tensors, "a class that format 0.31 has", class.name));
    }
    match class.rule {
        Rule::Children => children(source, place, depth),
        Rule::Slots => slots(source, place),
        _ => fields(source, place, class),
    }
}

fn children(source: &mut Source<'_>, place: &Place, depth: usize) -> Result<State<TensorInfo>> {
    source.check_depth(&place.tensors, depth)?;
    let mut children = Vec::new();
    loop {
        let name_key = place.child_name(children.len());
        let Some(name) = source.take_text(&name_key) else { break };
        let class = source.class(name, &metadata_key(&name_key))?;
        let state = cache(source, &place.child(children.len()), class, depth + 1)?;
        children.push(State::List(vec![state, State::Str(name.to_owned())]));
    }
    // mlx-lm leaves no trace of an empty CacheList.
    if children.is_empty() && take_nothing(source, &place.tensor(0)) {
        no_texts(source, place)?;
    }
    Ok(State::List(children))
}

fn slots(source: &mut Source<'_>, place: &Place) -> Result<State<TensorInfo>> {
    let mask = source.take_text(&place.texts);
    let mut slots = Vec::new();
    if mask == Some(NO_SLOTS) && !take_nothing(source, &place.tensor(0)) {
        return Err(source.refuse(&place.tensor(0), "a tensor without elements", "another or none"));
    }
    while let Some(info) = source.take(&place.tensor(slots.len())) {
        let empty = mask.and_then(|mask| mask.as_bytes().get(slots.len())) == Some(&b'0');
        if empty && info.n_bytes() > 0 {
            return Err(source.refuse(&info.name, "no elements, as the slot is empty", format!("{:?}", info.shape)));
        }
        slots.push(if empty { State::None } else { State::Array(info.clone()) });
    }
    match mask {
        Some("" | NO_SLOTS) => {}
        Some(mask) if mask.len() == slots.len() && mask.bytes().all(|slot| matches!(slot, b'0' | b'1')) => {}
        _ => {
            return Err(source.refuse_text(
                &place.texts,
                format!("'', or 0 or 1 for each of {} slots", slots.len()),
                mask,
            ));
        }
    }
    Ok(State::List(vec![State::List(slots), State::None, State::None]))
}

fn fields(source: &mut Source<'_>, place: &Place, class: &Class) -> Result<State<TensorInfo>> {
    if class.n_texts() == 0 {
        no_texts(source, place)?;
    }
    let empty = take_nothing(source, &place.tensor(0));
    let mut n_tensors = usize::from(empty);
    let mut items = Vec::with_capacity(class.fields.len());
    for field in class.fields {
        items.push(match field.v031 {
            V031::Tensor if empty && matches!(field.kind, Kind::Rows | Kind::Packed) => State::None,
            V031::Tensor => {
                n_tensors += 1;
                let key = place.tensor(n_tensors - 1);
                arrays(source, &key, field.kind).ok_or_else(|| source.missing(&key, field.name, class))?
            }
            V031::Text(at) => number(source, &place.text(at), field)?,
            V031::Absent => State::Int(0),
        });
    }
    let len = items.first().and_then(n_rows).unwrap_or(0);
    let count = class.count_of(&items, len);
    for (field, item) in class.fields.iter().zip(&mut items) {
        if field.v031 == V031::Absent {
            *item = State::Int(count);
        }
    }
    Ok(State::List(items))
}

/// Takes the tensor that stands for what is missing, if it is there.
fn take_nothing(source: &mut Source<'_>, key: &str) -> bool {
    source.peek(key).is_some_and(|info| info.shape == [0]) && source.take(key).is_some()
}

/// Takes the empty string that stands for no numbers.
fn no_texts(source: &mut Source<'_>, place: &Place) -> Result<()> {
    match source.take_text(&place.texts) {
        Some("") => Ok(()),
        other => Err(source.refuse_text(&place.texts, "''", other)),
    }
}

/// The array at `key`, or the three of quantized rows.
fn arrays(source: &mut Source<'_>, key: &str, kind: Kind) -> Option<State<TensorInfo>> {
    if kind != Kind::Packed {
        return source.take(key).map(|info| State::Array(info.clone()));
    }
    let parts = (0..3).map_while(|at| source.take(&format!("{key}.{at}")));
    let parts: Vec<_> = parts.map(|info| State::Array(info.clone())).collect();
    (!parts.is_empty()).then_some(State::List(parts))
}

/// A number, written exactly as Python's `str` writes it.
fn number(source: &mut Source<'_>, key: &str, field: &Field) -> Result<State<TensorInfo>> {
    let text = source.take_text(key);
    let state = match (field.kind, text) {
        (Kind::Flag, Some("True")) => Some(State::Bool(true)),
        (Kind::Flag, Some("False")) => Some(State::Bool(false)),
        (Kind::Flag, _) | (_, None) => None,
        (_, Some(text)) => text.parse().ok().filter(|value: &i64| value.to_string() == text).map(State::Int),
    };
    let expected = if field.kind == Kind::Flag { "'True' or 'False'" } else { "an integer" };
    state.ok_or_else(|| source.refuse_text(key, format!("{}, {expected}", field.name), text))
}

/// What this format calls the entry that format 0.32 calls `key`, which begins with the layer.
pub(super) fn key_of<T>(layers: &[CacheState<T>], key: &str) -> String {
    let mut path = key.split('.').map_while(|part| part.parse::<usize>().ok());
    let Some((layer, cache)) = path.next().and_then(|layer| Some((layer, layers.get(layer)?))) else {
        return key.to_owned();
    };
    let (mut place, mut name, mut state) = (Place::layer(layer), &cache.class, &cache.state);
    while let (Some(class), State::List(items), Some(at)) = (Class::find(name), state, path.next()) {
        if class.rule != Rule::Children {
            return key_of_field(&place, class, items, at);
        }
        match (items.get(at), path.next()) {
            (Some(State::List(parts)), Some(0)) if matches!(parts.as_slice(), [_, State::Str(_)]) => {
                if let [child, State::Str(child_name)] = parts.as_slice() {
                    (place, name, state) = (place.child(at), child_name, child);
                }
            }
            (_, Some(1)) => return metadata_key(&place.child_name(at)),
            _ => return place.tensor(at),
        }
    }
    place.tensors
}

fn key_of_field<T>(place: &Place, class: &Class, items: &[State<T>], at: usize) -> String {
    match class.fields.get(at).map(|field| field.v031) {
        Some(V031::Text(text)) => metadata_key(&place.text(text)),
        Some(V031::Tensor) if class.has_rows() => {
            // In an empty cache one tensor stands for two.
            let shift = usize::from(at > 1 && matches!(items.first(), Some(State::None)));
            let before = class.fields[..at].iter().filter(|field| field.v031 == V031::Tensor).count();
            place.tensor(before - shift)
        }
        _ => place.tensors.clone(),
    }
}
