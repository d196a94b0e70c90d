//! All that files may know of a cache: a class name and a tree of arrays and scalars.
//!
//! The tree is generic over what an array is: a real [`Array`](crate::array::Array) in memory, a
//! header entry while a file is being checked.

/// One value of a cache's state, in the order of mlx-lm 0.32.2's `state`.
#[derive(Clone, Debug, PartialEq)]
pub enum State<T> {
    /// An array, or what stands for one.
    Array(T),
    /// A whole number: offset, keep, bits …
    Int(i64),
    /// A truth value: `rotated`.
    Bool(bool),
    /// A float; no class of mlx-lm has one, a foreign class may.
    Float(f32),
    /// A text: the class name of a child.
    Str(String),
    /// Nothing yet: keys of an empty cache, an empty slot.
    None,
    /// A tuple or list.
    List(Vec<State<T>>),
}

/// A cache as a file sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheState<T> {
    /// Name of the mlx-lm class that this state belongs to.
    pub class: String,
    /// The state of that class, as mlx-lm 0.32.2 orders it.
    pub state: State<T>,
}

impl<T> State<T> {
    /// What this value is, for error texts.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Array(_) => "an array",
            Self::Int(_) => "an integer",
            Self::Bool(_) => "a bool",
            Self::Float(_) => "a float",
            Self::Str(_) => "a string",
            Self::None => "none",
            Self::List(_) => "a list",
        }
    }

    /// The same tree with every array replaced by what `f` makes of it.
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn try_map<U, E>(self, f: &mut impl FnMut(T) -> Result<U, E>) -> Result<State<U>, E> {
        Ok(match self {
            Self::Array(array) => State::Array(f(array)?),
            Self::Int(value) => State::Int(value),
            Self::Bool(value) => State::Bool(value),
            Self::Float(value) => State::Float(value),
            Self::Str(value) => State::Str(value),
            Self::None => State::None,
            Self::List(items) => State::List(items.into_iter().map(|item| item.try_map(f)).collect::<Result<_, _>>()?),
        })
    }

    /// Calls `f` with every array, in order.
    pub fn for_each_array<'a>(&'a self, f: &mut impl FnMut(&'a T)) {
        match self {
            Self::Array(array) => f(array),
            Self::List(items) => items.iter().for_each(|item| item.for_each_array(f)),
            _ => {}
        }
    }
}
