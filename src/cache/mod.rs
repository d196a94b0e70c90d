//! L2: the caches, one file each. All cache logic of the project stands here.

mod arrays;
pub mod batch;
mod chunked;
mod concatenate;
mod dense;
mod list;
pub mod mask;
pub mod plan;
mod quantized;
mod rotating;
pub mod schema;
mod scheme;
mod standard;
pub mod state;
mod tensor;
mod token_buffer;
mod token_rows;
mod traits;

pub use arrays::ArraysCache;
pub use batch::{BatchCache, BatchKvCache, BatchRotatingKvCache};
pub use chunked::ChunkedKvCache;
pub use concatenate::ConcatenateKvCache;
pub use list::{ListCache, Member, cannot_trim, trim_all};
pub use mask::MaskMode;
pub use quantized::QuantizedKvCache;
pub use rotating::RotatingKvCache;
pub use scheme::Scheme;
pub use standard::StandardKvCache;
pub use state::{CacheState, State};
pub use tensor::KvTensor;
pub(crate) use tensor::zero_rows;
pub use token_buffer::TokenBuffer;
pub use token_rows::{Boundary, Lookback, Run};
pub use traits::{Checkpoint, KvCache, LayerCache};
use traits::{CheckpointKind, settle};

use crate::array::{Array, Dtype};
use crate::error::{Error, Result};

/// Rows by which buffers grow: MLX's fast decode attention wants slices of a buffer padded to this.
pub const STEP: usize = 256;

/// Any of the caches.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Cache {
    /// A buffer that grows.
    Standard(StandardKvCache),
    /// The newest tokens, in a ring.
    Rotating(RotatingKvCache),
    /// A growing buffer of affine-quantized rows.
    Quantized(QuantizedKvCache),
    /// Exactly the rows, joined anew at each update.
    Concatenate(ConcatenateKvCache),
    /// A growing buffer whose oldest rows are dropped.
    Chunked(ChunkedKvCache),
    /// Recurrent states.
    Arrays(ArraysCache),
    /// Several caches of one layer.
    List(ListCache),
    /// Growing buffers of several sequences, quantized or not.
    Batch(BatchKvCache),
    /// The newest tokens of several sequences, in a ring.
    BatchRotating(BatchRotatingKvCache),
}

impl Cache {
    /// What every cache can do.
    pub fn as_dyn(&self) -> &(dyn LayerCache + 'static) {
        match self {
            Self::Standard(cache) => cache,
            Self::Rotating(cache) => cache,
            Self::Quantized(cache) => cache,
            Self::Concatenate(cache) => cache,
            Self::Chunked(cache) => cache,
            Self::Arrays(cache) => cache,
            Self::List(cache) => cache,
            Self::Batch(cache) => cache,
            Self::BatchRotating(cache) => cache,
        }
    }

    /// What every cache can do, to change it.
    pub fn as_dyn_mut(&mut self) -> &mut (dyn LayerCache + 'static) {
        match self {
            Self::Standard(cache) => cache,
            Self::Rotating(cache) => cache,
            Self::Quantized(cache) => cache,
            Self::Concatenate(cache) => cache,
            Self::Chunked(cache) => cache,
            Self::Arrays(cache) => cache,
            Self::List(cache) => cache,
            Self::Batch(cache) => cache,
            Self::BatchRotating(cache) => cache,
        }
    }

    /// The keys and values.
    ///
    /// # Errors
    /// [`Error::Type`] if the cache holds something else.
    pub fn as_kv(&self) -> Result<&(dyn KvCache + 'static)> {
        Ok(match self {
            Self::Standard(cache) => cache,
            Self::Rotating(cache) => cache,
            Self::Quantized(cache) => cache,
            Self::Concatenate(cache) => cache,
            Self::Chunked(cache) => cache,
            Self::Arrays(_) | Self::List(_) => return Err(no_keys(self)),
            Self::Batch(cache) => cache,
            Self::BatchRotating(cache) => cache,
        })
    }

    /// The keys and values, to change them.
    ///
    /// # Errors
    /// [`Error::Type`] if the cache holds something else.
    pub fn as_kv_mut(&mut self) -> Result<&mut (dyn KvCache + 'static)> {
        Ok(match self {
            Self::Standard(cache) => cache,
            Self::Rotating(cache) => cache,
            Self::Quantized(cache) => cache,
            Self::Concatenate(cache) => cache,
            Self::Chunked(cache) => cache,
            Self::Arrays(_) | Self::List(_) => return Err(no_keys(self)),
            Self::Batch(cache) => cache,
            Self::BatchRotating(cache) => cache,
        })
    }

    /// The sequences of a batch.
    ///
    /// # Errors
    /// [`Error::Type`] if the cache is none.
    pub fn as_batch(&self) -> Result<&(dyn BatchCache + 'static)> {
        match self {
            Self::Batch(cache) => Ok(cache),
            Self::BatchRotating(cache) => Ok(cache),
            other => Err(no_batch(other)),
        }
    }

    /// The sequences of a batch, to change them.
    ///
    /// # Errors
    /// [`Error::Type`] if the cache is none.
    pub fn as_batch_mut(&mut self) -> Result<&mut (dyn BatchCache + 'static)> {
        match self {
            Self::Batch(cache) => Ok(cache),
            Self::BatchRotating(cache) => Ok(cache),
            other => Err(no_batch(other)),
        }
    }

    /// Rows by which the buffers grow.
    pub const fn step(&self) -> usize {
        match self {
            Self::Standard(cache) => cache.step,
            Self::Rotating(cache) => cache.step,
            Self::Quantized(cache) => cache.step,
            Self::Chunked(cache) => cache.step,
            Self::Batch(cache) => cache.step,
            Self::BatchRotating(cache) => cache.step,
            Self::Concatenate(_) | Self::Arrays(_) | Self::List(_) => STEP,
        }
    }

    /// Sets the rows by which the buffers grow; at least 1. A cache without padding ignores it.
    pub fn set_step(&mut self, step: usize) {
        let step = step.max(1);
        match self {
            Self::Standard(cache) => cache.step = step,
            Self::Rotating(cache) => cache.step = step,
            Self::Quantized(cache) => cache.step = step,
            Self::Chunked(cache) => cache.step = step,
            Self::Batch(cache) => cache.step = step,
            Self::BatchRotating(cache) => cache.step = step,
            Self::Concatenate(_) | Self::Arrays(_) | Self::List(_) => {}
        }
    }

    /// An empty cache of the mlx-lm class `name`, to be given a state; None for a class that this crate lacks.
    pub fn of_class(name: &str) -> Option<Self> {
        Some(match name {
            "KVCache" => Self::Standard(StandardKvCache::default()),
            "RotatingKVCache" => Self::Rotating(RotatingKvCache::unset(None)),
            "QuantizedRotatingKVCache" => Self::Rotating(RotatingKvCache::unset(Some(Scheme::default()))),
            "QuantizedKVCache" => Self::Quantized(QuantizedKvCache::default()),
            "ConcatenateKVCache" => Self::Concatenate(ConcatenateKvCache::default()),
            "ChunkedKVCache" => Self::Chunked(ChunkedKvCache::unset()),
            "ArraysCache" => Self::Arrays(ArraysCache::default()),
            "CacheList" => Self::List(ListCache::default()),
            "BatchKVCache" => Self::Batch(BatchKvCache::unset(None)),
            "BatchQuantizedKVCache" => Self::Batch(BatchKvCache::unset(Some(Scheme::default()))),
            "BatchRotatingKVCache" => Self::BatchRotating(BatchRotatingKvCache::unset()),
            _ => return None,
        })
    }

    /// Class name and state, as files know them.
    pub fn cache_state(&self) -> CacheState<Array> {
        CacheState { class: self.as_dyn().reference_class_name().to_owned(), state: self.as_dyn().state() }
    }

    /// A cache with the state of a file or of another implementation.
    ///
    /// # Errors
    /// [`Error::Value`] if the class is unknown or the state does not fit it.
    pub fn from_state(state: CacheState<Array>) -> Result<Self> {
        let op = "from_state";
        let cache = Self::of_class(&state.class);
        let mut cache = cache.ok_or_else(|| Error::value(op, "a class of this crate", &state.class))?;
        cache.as_dyn_mut().set_state(state.state)?;
        Ok(cache)
    }
}

/// How a model's caches are made when the model does not make them itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheConfig {
    /// Layers, and so caches.
    pub num_hidden_layers: usize,
    /// Tokens that a layer looks back; None for all.
    pub sliding_window: Option<usize>,
}

/// One fresh cache per layer: rotating with `keep` 0 if there is a sliding window, else growing.
///
/// # Errors
/// [`Error::Value`] for a window of 0.
pub fn make_prompt_cache(config: &CacheConfig) -> Result<Vec<Cache>> {
    let one = match config.sliding_window {
        Some(window) => Cache::Rotating(RotatingKvCache::new(window, 0)?),
        None => Cache::Standard(StandardKvCache::default()),
    };
    Ok(vec![one; config.num_hidden_layers])
}

/// True if every cache can take back tokens.
pub fn can_trim_prompt_cache(caches: &[Cache]) -> bool {
    caches.iter().all(|cache| cache.as_dyn().is_trimmable())
}

/// Checks a state against the class `name`, for [`LayerCache::set_state`]; gives its fields.
fn checked_fields(name: &'static str, state: State<Array>) -> Result<Vec<State<Array>>> {
    let whole = CacheState { class: name.to_owned(), state };
    schema::check(&whole)
        .map_err(|fault| Error::value("state", format!("{}: {}", fault.key, fault.expected), fault.got))?;
    match whole.state {
        State::List(fields) => Ok(fields),
        other => Err(Error::value("state", "a tuple", other.kind())),
    }
}

/// The error of asking a cache for keys and values that it does not have.
fn no_keys(cache: &Cache) -> Error {
    let got = cache.as_dyn().reference_class_name().to_owned();
    Error::Type { op: "keys and values", expected: "a cache that has them".to_owned(), got }
}

/// The error of asking a cache of one sequence for what a batch has.
fn no_batch(cache: &Cache) -> Error {
    Error::type_("batch", "a cache of several sequences", cache.as_dyn().reference_class_name())
}

/// The error of asking an empty cache for its rows.
fn nothing_yet() -> Error {
    Error::value("keys_and_values", "a cache with tokens", "an empty one")
}

/// An optional array of a checked state.
fn array_field(field: State<Array>) -> Option<Array> {
    if let State::Array(array) = field { Some(array) } else { None }
}

/// A count of a checked state; the check made it an integer that is not negative.
fn count_field(field: &State<Array>) -> usize {
    if let State::Int(value) = field { usize::try_from(*value).unwrap_or(0) } else { 0 }
}

/// An optional array as a state.
fn array_state(array: Option<&Array>) -> State<Array> {
    array.map_or(State::None, |array| State::Array(array.clone()))
}

impl schema::Described for Array {
    fn shape(&self) -> Vec<usize> {
        Self::shape(self).iter().map(|&dim| dim as usize).collect()
    }

    fn dtype(&self) -> Dtype {
        Self::dtype(self)
    }
}
