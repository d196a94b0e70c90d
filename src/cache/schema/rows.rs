//! Walks over states that knows which arrays have rows, and how many of those hold tokens.

use super::{Class, Described, Rule};
use crate::cache::state::{CacheState, State};

/// What [`map_arrays`] says of an array whose axis 2 is rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Rows that hold tokens; they are the first ones.
    pub valid: usize,
    /// See [`Class::is_padded`].
    pub padded: bool,
}

/// The same caches with every array replaced by what `f` makes of it, which is told of rows: to cut the padding off
/// before a save, or to round it up after a load. The state is one that [`check`](super::check) accepts.
///
/// # Errors
/// The first error of `f`.
pub fn map_arrays<T: Described, U, E>(
    cache: CacheState<T>,
    f: &mut impl FnMut(T, Option<Rows>) -> Result<U, E>,
) -> Result<CacheState<U>, E> {
    let state = map_class(&cache.class, cache.state, f)?;
    Ok(CacheState { class: cache.class, state })
}

fn map_class<T: Described, U, E>(
    name: &str,
    state: State<T>,
    f: &mut impl FnMut(T, Option<Rows>) -> Result<U, E>,
) -> Result<State<U>, E> {
    let (class, items) = match (Class::find(name), state) {
        (Some(class), State::List(items)) => (class, items),
        (_, other) => return other.try_map(&mut |array| f(array, None)),
    };
    if class.rule == Rule::Children {
        return items.into_iter().map(|child| map_child(child, f)).collect::<Result<_, E>>().map(State::List);
    }
    let rows = items
        .first()
        .filter(|_| class.has_rows())
        .and_then(n_rows)
        .map(|len| Rows { valid: class.valid_rows(&items, len), padded: class.is_padded() });
    let mapped = items.into_iter().enumerate().map(|(at, item)| {
        let rows = rows.filter(|_| at < 2);
        item.try_map(&mut |array| f(array, rows))
    });
    mapped.collect::<Result<_, E>>().map(State::List)
}

/// A pair of a child's state and its class name.
fn map_child<T: Described, U, E>(
    child: State<T>,
    f: &mut impl FnMut(T, Option<Rows>) -> Result<U, E>,
) -> Result<State<U>, E> {
    match child {
        State::List(mut parts) if matches!(parts.as_slice(), [_, State::Str(_)]) => {
            let (Some(State::Str(name)), Some(state)) = (parts.pop(), parts.pop()) else {
                return Ok(State::None);
            };
            Ok(State::List(vec![map_class(&name, state, f)?, State::Str(name)]))
        }
        other => other.try_map(&mut |array| f(array, None)),
    }
}

/// Rows of keys or values: of the array, or of the packed words.
pub fn n_rows<T: Described>(item: &State<T>) -> Option<usize> {
    match item {
        State::Array(array) => array.shape().get(2).copied(),
        State::List(parts) => parts.first().and_then(n_rows),
        _ => None,
    }
}
