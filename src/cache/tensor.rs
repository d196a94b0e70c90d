//! What an update hands back, and the checks that every update makes before it changes anything.

use super::schema::MAX_OFFSET;
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
