//! What an update hands back, and the checks that every update makes before it changes anything.

use super::schema::MAX_OFFSET;
use super::state::State;
use crate::array::{Array, Dtype};
use crate::error::{Error, Result};

/// Keys or values as attention takes them.
#[derive(Clone, Debug)]
pub enum KvTensor {
    /// `(B, H, L, D)`, in the dtype of the buffer.
    Dense(Array),
    /// Packed words `(B, H, L, D * bits / 32)` uint32, scales and biases `(B, H, L, D / group_size)`.
    Quantized([Array; 3]),
}

impl KvTensor {
    /// The arrays of which this consists.
    pub fn arrays(&self) -> &[Array] {
        match self {
            Self::Dense(array) => std::slice::from_ref(array),
            Self::Quantized(arrays) => arrays,
        }
    }

    /// The arrays, to change them.
    pub(super) fn arrays_mut(&mut self) -> &mut [Array] {
        match self {
            Self::Dense(array) => std::slice::from_mut(array),
            Self::Quantized(arrays) => arrays,
        }
    }

    /// A buffer as a state has it.
    pub(super) fn to_state(rows: Option<&Self>) -> State<Array> {
        match rows {
            None => State::None,
            Some(Self::Dense(array)) => State::Array(array.clone()),
            Some(Self::Quantized(arrays)) => State::List(arrays.iter().cloned().map(State::Array).collect()),
        }
    }

    /// A buffer of a checked state.
    pub(super) fn from_state(field: State<Array>) -> Option<Self> {
        match field {
            State::Array(array) => Some(Self::Dense(array)),
            State::List(items) => {
                let arrays: Vec<_> = items.into_iter().filter_map(super::array_field).collect();
                arrays.try_into().ok().map(Self::Quantized)
            }
            _ => None,
        }
    }

    /// A buffer that is being assigned to a cache whose rows are quantized, or not.
    pub(super) fn assigned(op: &'static str, rows: Option<Self>, quantized: bool) -> Result<Option<Self>> {
        let Some(rows) = rows else { return Ok(None) };
        let all_four = rows.arrays().iter().all(|array| array.shape().len() == 4);
        if all_four && matches!(rows, Self::Quantized(_)) == quantized {
            return Ok(Some(rows));
        }
        let expected = if quantized {
            "packed words, scales and biases, each (B, H, L, n)"
        } else {
            "an array (B, H, L, D), not quantized"
        };
        Err(Error::value(op, expected, format!("{:?}", rows.arrays())))
    }

    /// Checks that the last axes of `new` are those of this buffer.
    pub(super) fn check_widths(&self, op: &'static str, new: &Self) -> Result<()> {
        for (buffer, new) in self.arrays().iter().zip(new.arrays()) {
            if buffer.shape().last() != new.shape().last() {
                let expected = format!("a head size that fits the cache's {:?}", buffer.shape());
                return Err(Error::value(op, expected, format!("{:?}", new.shape())));
            }
        }
        Ok(())
    }

    /// What `f` makes of each array.
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn try_map(&self, mut f: impl FnMut(&Array) -> Result<Array>) -> Result<Self> {
        Ok(match self {
            Self::Dense(array) => Self::Dense(f(array)?),
            Self::Quantized([words, scales, biases]) => Self::Quantized([f(words)?, f(scales)?, f(biases)?]),
        })
    }

    /// What `f` makes of each array and its counterpart in `other`.
    ///
    /// # Errors
    /// [`Error::Value`] if one of the two is quantized and the other is not, or the first error of `f`.
    pub fn try_zip(&self, other: &Self, mut f: impl FnMut(&Array, &Array) -> Result<Array>) -> Result<Self> {
        Ok(match (self, other) {
            (Self::Dense(a), Self::Dense(b)) => Self::Dense(f(a, b)?),
            (Self::Quantized(a), Self::Quantized(b)) => {
                Self::Quantized([f(&a[0], &b[0])?, f(&a[1], &b[1])?, f(&a[2], &b[2])?])
            }
            _ => return Err(Error::value("rows", "both quantized, or neither", "one quantized, one not")),
        })
    }

    /// Rows `from .. to` of axis 2.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    pub fn rows(&self, from: usize, to: usize) -> Result<Self> {
        self.try_map(|array| array.rows(from, to))
    }

    /// Rows of axis 2 (L).
    pub fn len(&self) -> usize {
        self.arrays()[0].dim(2)
    }

    /// True if there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// This with `new` written over rows `from ..`, cast to this one's dtypes.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the shapes do not fit.
    pub fn with_rows(&self, new: &Self, from: usize) -> Result<Self> {
        self.try_zip(new, |buffer, new| buffer.with_rows(new, from))
    }

    /// This followed by `rows` rows of zeros of `like`'s sizes and dtypes.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the shapes do not fit.
    pub fn padded(&self, rows: usize, like: &Self) -> Result<Self> {
        self.try_zip(like, |buffer, like| Array::concatenate(&[buffer, &zero_rows(like, rows, like.dtype())?], 2))
    }

    /// `rows` rows of zeros of this one's sizes and dtypes.
    ///
    /// # Errors
    /// [`Error::Mlx`] if memory is short.
    pub fn zeros_like(&self, rows: usize) -> Result<Self> {
        self.try_map(|like| zero_rows(like, rows, like.dtype()))
    }
}

/// The sizes on which an update agrees with its buffers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Update {
    /// Tokens that the update brings (S).
    pub n_tokens: usize,
    /// Rows of the buffers, if there are any (L).
    pub len: Option<usize>,
}

/// Checks new keys and values against each other and against the buffers.
///
/// `keys` and `values` are `(B, H, S, D)` with equal B, H and S; the two head sizes may differ. `packed` buffers have
/// another last axis than the update, which is then not compared. `offset` tokens have been seen, `used` rows hold some.
pub(super) fn check_update(
    op: &'static str,
    new: [&Array; 2],
    buffers: [Option<&Array>; 2],
    (offset, used): (usize, usize),
    packed: bool,
) -> Result<Update> {
    let [keys, values] = new.map(Array::shape);
    if keys.len() != 4 || values.len() != 4 || keys[..3] != values[..3] {
        let got = format!("keys {keys:?} and values {values:?}");
        return Err(Error::value(op, "keys (B, H, S, D) and values (B, H, S, Dv)", got));
    }
    let n_tokens = keys[2] as usize;
    let room = MAX_OFFSET as usize - offset.min(MAX_OFFSET as usize);
    if n_tokens > room {
        return Err(Error::value(op, format!("at most {room} tokens more: positions are 32-bit"), n_tokens));
    }
    let (key_buffer, value_buffer) = match buffers {
        [None, None] if used == 0 => return Ok(Update { n_tokens, len: None }),
        [Some(key_buffer), Some(value_buffer)] => (key_buffer.shape(), value_buffer.shape()),
        [None, None] => return Err(Error::value(op, "a buffer, since the offset is not 0", "none")),
        _ => return Err(Error::value(op, "keys and values both set, or neither", "one of them")),
    };
    for (name, new, buffer) in [("keys", keys, key_buffer), ("values", values, value_buffer)] {
        if buffer.len() != 4 || new[..2] != buffer[..2] || (!packed && new[3] != buffer[3]) {
            let expected = format!("{name} that fit the cache's {buffer:?} in all axes but 2");
            return Err(Error::value(op, expected, format!("{new:?}")));
        }
    }
    if key_buffer[2] != value_buffer[2] || used > key_buffer[2] as usize {
        let got = format!("key buffer {key_buffer:?}, value buffer {value_buffer:?}");
        return Err(Error::value(op, format!("buffers of one length, at least {used} rows"), got));
    }
    Ok(Update { n_tokens, len: Some(key_buffer[2] as usize) })
}

/// Zeros shaped like `like` but with `rows` rows.
pub(crate) fn zero_rows(like: &Array, rows: usize, dtype: Dtype) -> Result<Array> {
    let shape = like.shape();
    Array::zeros(&[shape[0], shape[1], rows as i32, shape[3]], dtype)
}
