//! Classes that a program has registered.

use super::samples::{Draft, kv, parent, user};
use crate::fabricate::{Form, REGISTERED, array, forms, int, load, save};
use mlxrs_py::array::Dtype;
use mlxrs_py::cache::schema::{self, CLASSES, MAX_LEVELS, MAX_STATE_TEXT};
use mlxrs_py::cache::state::{CacheState, State};
use mlxrs_py::persist::wire::Format;

fn cache(state: State<Form>) -> CacheState<Form> {
    schema::register(REGISTERED).unwrap();
    CacheState { class: REGISTERED.into(), state }
}

fn nested(levels: usize) -> State<Form> {
    (0..levels).fold(int(1), |state, _| State::List(vec![state]))
}

#[test]
fn any_state_comes_back_from_format_032() {
    let list = State::List;
    let text = |text: &str| State::Str(text.into());
    for state in [
        array(Dtype::F32, &[2, 3]),
        int(3),
        State::None,
        text(""),
        list(vec![]),
        list(vec![list(vec![]), text(""), text("KVCache"), State::Bool(true), State::Float(0.5), list(vec![int(7)])]),
        nested(MAX_LEVELS),
        text(&"x".repeat(1000)),
    ] {
        for caches in [vec![cache(state.clone()), kv(3, 3)], vec![parent(vec![kv(3, 3), cache(state)])]] {
            assert_eq!(forms(load(&save(Format::V032, &caches, &user()).unwrap()).unwrap()), caches);
        }
    }
}

#[test]
fn format_031_has_no_form_for_them() {
    let error = save(Format::V031, &[cache(int(1))], &user()).unwrap_err().to_string();
    assert!(error.contains("layer 0: a class that format 0.31 has, or format 0.32, got Registered"), "{error}");
    schema::register(REGISTERED).unwrap();
    Draft::new(Format::V031, &[kv(3, 3)]).text("2.0", REGISTERED).refused("0", "a class that format 0.31 has", "");
}

#[test]
fn states_without_end_are_refused() {
    let refused = |state: State<Form>, expected: &str| {
        let error = save(Format::V032, &[cache(state)], &user()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    refused(nested(MAX_LEVELS + 1), "at most 64 lists in each other");
    refused(State::Str("x".repeat(MAX_STATE_TEXT + 1)), "a text of at most 1048576");
    let draft = || Draft::new(Format::V032, &[cache(State::List(vec![int(1)]))]);
    draft().array(&format!("0.1{}", ".0".repeat(3000)), Dtype::F32, &[1]).refused(
        &format!("0.1{}", ".0".repeat(63)),
        "at most 64 lists",
        "one more",
    );
    draft().array("0.3000000", Dtype::F32, &[1]).refused("0.3000000", "without gaps", "F32 [1]");
    draft().array("0.0.0", Dtype::F32, &[1]).refused("0.0.0", "without gaps", "F32 [1]");
    draft().no_tensor("0.0").no_text("2.1.0").no_text("2.1.1").refused("0", "state of a Registered", "nothing");
}

#[test]
fn names_of_the_table_and_names_that_are_no_words_are_refused() {
    for class in &CLASSES {
        assert!(schema::register(class.name).is_err());
    }
    for name in ["", "a b", "a.b", "\n", "a-b", &"x".repeat(65)] {
        assert!(schema::register(name).is_err(), "{name:?}");
    }
    let unknown = CacheState { class: "NotRegistered".into(), state: int(1) };
    let error = save(Format::V032, &[unknown], &user()).unwrap_err().to_string();
    assert!(error.contains("a class among KVCache"), "{error}");
}
