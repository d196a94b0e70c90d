//! Files that mlx-lm itself wrote; `tests/data` holds them and the scripts that made them.

use crate::fabricate::{Form, forms, load};
use mlxrs_py::cache::schema::{self, Class, Kind, Rule};
use mlxrs_py::cache::state::State;
use mlxrs_py::persist::wire::Format;
use std::collections::BTreeMap;
use std::path::Path;

/// Class, attributes and valid rows of a cache as the JSON beside the files lists them.
fn listed(class: &str, state: &State<Form>) -> serde_json::Value {
    let State::List(items) = state else { panic!("a list") };
    let mut layer = serde_json::json!({ "class": class });
    let class = Class::find(class).expect("a known class");
    if class.rule == Rule::Children {
        let child = |child: &State<Form>| match child {
            State::List(parts) => match parts.as_slice() {
                [state, State::Str(name)] => listed(name, state),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        };
        layer["caches"] = items.iter().map(child).collect();
        return layer;
    }
    let rows = schema::n_rows(&items[0]).map(|len| class.valid_rows(items, len));
    for (at, (field, item)) in class.fields.iter().zip(items).enumerate() {
        let rows = rows.filter(|_| at < 2 && class.has_rows());
        let value = form_of(item, rows);
        match field.kind {
            Kind::Count | Kind::Flag => layer["attributes"][field.name] = value,
            // Elements are for those who read them.
            Kind::PerSequence | Kind::MaybePerSequence => {}
            Kind::Rows | Kind::Packed | Kind::Slots => layer[field.name] = value,
        }
    }
    layer
}

fn form_of(item: &State<Form>, rows: Option<usize>) -> serde_json::Value {
    match item {
        State::Int(value) => (*value).into(),
        State::Bool(value) => (*value).into(),
        State::List(items) => items.iter().map(|item| form_of(item, rows)).collect(),
        State::Array(form) => {
            let mut shape = form.shape.clone();
            if let Some(rows) = rows {
                shape[2] = rows;
            }
            serde_json::json!([form.dtype.safetensors_name(), shape])
        }
        _ => serde_json::Value::Null,
    }
}

/// The JSON as [`listed`] gives it: arrays as type and shape, no numbers per sequence, no empty maps.
fn reduced(mut expected: serde_json::Value, own: &serde_json::Value) -> serde_json::Value {
    if let Some(dtype) = expected.get("dtype") {
        let names = [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32"), ("uint32", "U32")];
        let name = names.iter().find(|name| dtype == name.0).expect("a dtype").1;
        return serde_json::json!([name, expected["shape"]]);
    }
    match &mut expected {
        serde_json::Value::Object(map) => {
            // What the class has as an attribute but not in its state: the offset of a ConcatenateKVCache.
            map.retain(|key, value| !value.is_array() || own.get(key).is_some());
            map.retain(|key, _| own.get(key).is_some() || key == "class");
            map.iter_mut().for_each(|(key, value)| *value = reduced(value.take(), &own[key]));
        }
        serde_json::Value::Array(list) => {
            list.iter_mut().enumerate().for_each(|(at, value)| *value = reduced(value.take(), &own[at]));
        }
        _ => {}
    }
    expected
}

#[test]
fn files_of_both_versions_of_mlx_lm_are_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let mut n_layers = 0;
    for (format, tag) in [(Format::V031, "v031"), (Format::V032, "v032")] {
        let json = std::fs::read(folder.join(format!("expected_{tag}.json"))).unwrap();
        let json: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&json).unwrap();
        for (name, expected) in json {
            let decoded = load(&std::fs::read(folder.join(&name)).unwrap()).unwrap();
            assert_eq!(decoded.format, format, "{name}");
            assert_eq!(serde_json::json!(decoded.metadata), expected["metadata"], "{name}");
            let layers = expected["layers"].as_array().unwrap();
            assert_eq!(decoded.layers.len(), layers.len(), "{name}");
            for (cache, expected) in forms(decoded).into_iter().zip(layers) {
                let own = listed(&cache.class, &cache.state);
                assert_eq!(own, reduced(expected.clone(), &own), "{name}");
                n_layers += 1;
            }
        }
    }
    assert_eq!(n_layers, 59);
}
