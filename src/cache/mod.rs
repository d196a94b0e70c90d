//! L2: the caches, one file each. All cache logic of the project stands here.

mod concatenate;
pub mod mask;
pub mod plan;
mod quantized;
mod rotating;
pub mod schema;
mod standard;
pub mod state;
mod tensor;

pub use concatenate::ConcatenateKvCache;
pub use mask::MaskMode;
pub use quantized::QuantizedKvCache;
pub use rotating::RotatingKvCache;
pub use standard::StandardKvCache;
pub use state::{CacheState, State};
pub use tensor::KvTensor;
pub(crate) use tensor::zero_rows;

use crate::array::{self, Array, Dtype};
use crate::error::{Error, Result};

/// Rows by which buffers grow: MLX's fast decode attention wants slices of a buffer padded to this.
pub const STEP: usize = 256;

/// The keys and values of one attention layer.
///
/// Shapes: keys `(B, H, S, D)`, values `(B, H, S, Dv)`; S is the number of new tokens.
pub trait KvCache {
    /// The mlx-lm class that this cache stands for, as files name it.
    fn reference_class_name(&self) -> &'static str;

    /// Tokens seen so far: the position of the next one.
    fn offset(&self) -> usize;

    /// Takes the keys and values of new tokens and gives all that attention shall see. Lazy.
    ///
    /// # Errors
    /// [`Error::Value`] if the shapes do not fit, [`Error::Mlx`] if MLX fails; the cache is then as before.
    fn update(&mut self, keys: &Array, values: &Array) -> Result<(KvTensor, KvTensor)>;

    /// The state in the order of mlx-lm 0.32.2, whole buffers included.
    fn state(&self) -> State<Array>;

    /// Replaces the state; checked as a whole before anything changes.
    ///
    /// # Errors
    /// [`Error::Value`] if the state does not fit the class.
    fn set_state(&mut self, state: State<Array>) -> Result<()>;

    /// Assigns the buffer of the keys; [`update`](Self::update) checks that it fits the rest.
    ///
    /// # Errors
    /// [`Error::Value`] if the class stores its keys in another form.
    fn set_keys(&mut self, keys: Option<KvTensor>) -> Result<()>;

    /// Assigns the buffer of the values, as [`set_keys`](Self::set_keys).
    ///
    /// # Errors
    /// [`Error::Value`] if the class stores its values in another form.
    fn set_values(&mut self, values: Option<KvTensor>) -> Result<()>;

    /// The buffer of the keys.
    fn keys(&self) -> Option<KvTensor>;

    /// The buffer of the values.
    fn values(&self) -> Option<KvTensor>;

    /// The valid rows of keys and values.
    ///
    /// # Errors
    /// [`Error::Value`] when empty, [`Error::Mlx`] if MLX fails.
    fn keys_and_values(&self) -> Result<(KvTensor, KvTensor)>;

    /// Assigns the count of tokens; [`update`](Self::update) checks that the buffers hold them.
    ///
    /// # Errors
    /// [`Error::Value`] if the class counts its rows instead.
    fn set_offset(&mut self, offset: usize) -> Result<()>;

    /// The stored buffers themselves.
    fn buffers(&self) -> Vec<&Array>;

    /// Evaluates the stored buffers, not slices of them: the memory barrier of a chunk.
    ///
    /// # Errors
    /// [`Error::Mlx`] if a computation fails.
    fn materialize(&self) -> Result<()> {
        array::eval("materialize", self.buffers())
    }

    /// The mask for `n_tokens` that are about to be updated.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    fn make_mask(&self, n_tokens: usize, window: Option<usize>, return_array: bool) -> Result<MaskMode>;

    /// Bytes of the stored buffers, padding included; 0 when empty.
    fn nbytes(&self) -> usize {
        self.buffers().into_iter().map(Array::n_bytes).sum()
    }

    /// True before the first update.
    fn is_empty(&self) -> bool {
        self.buffers().is_empty()
    }

    /// Tokens whose rows are held.
    fn size(&self) -> usize {
        self.offset()
    }

    /// True if the newest tokens can be taken back.
    fn is_trimmable(&self) -> bool {
        true
    }

    /// Takes back up to `n` of the newest tokens and gives how many.
    ///
    /// # Errors
    /// [`Error::Value`] if the rows that would be newest are gone.
    fn trim(&mut self, n: usize) -> Result<usize>;

    /// Rows that the cache holds at most; None if it grows.
    fn max_size(&self) -> Option<usize> {
        None
    }

    /// What [`rollback`](Self::rollback) needs to undo `n_tokens` more. Holds no array that an update would write in
    /// place, if it can: MLX would have to copy it.
    fn checkpoint(&self, n_tokens: usize) -> Checkpoint;

    /// Goes back to a checkpoint of this cache.
    fn rollback(&mut self, checkpoint: Checkpoint);

    /// An independent cache; the arrays are shared until one of the two writes.
    fn copy(&self) -> Cache;
}

/// The way back to where a cache stood; see [`KvCache::checkpoint`].
#[derive(Debug)]
pub struct Checkpoint(CheckpointKind);

#[derive(Debug)]
enum CheckpointKind {
    /// The rows before this offset outlive the update. What was not computed of it is taken off the buffers.
    Offset(usize),
    /// The update replaces rows: the cache as it was.
    Whole(Box<Cache>),
}

/// Takes updates that were never computed off the buffers: these may hold on to what failed. If some buffers had grown
/// already, all are cut to the shortest.
fn settle<'a>(buffers: impl IntoIterator<Item = &'a mut Array>) {
    let mut buffers: Vec<_> = buffers.into_iter().collect();
    for buffer in &mut buffers {
        **buffer = buffer.before_unscheduled_updates();
    }
    let shortest = buffers.iter().map(|buffer| buffer.dim(2)).min().unwrap_or(0);
    for buffer in buffers {
        match buffer.rows(0, shortest) {
            Ok(cut) => *buffer = cut,
            Err(error) => tracing::error!(%error, "a buffer could not be cut"),
        }
    }
}

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
}

impl Cache {
    /// The cache behind the trait.
    pub fn as_dyn(&self) -> &(dyn KvCache + 'static) {
        match self {
            Self::Standard(cache) => cache,
            Self::Rotating(cache) => cache,
            Self::Quantized(cache) => cache,
            Self::Concatenate(cache) => cache,
        }
    }

    /// The cache behind the trait, to change.
    pub fn as_dyn_mut(&mut self) -> &mut (dyn KvCache + 'static) {
        match self {
            Self::Standard(cache) => cache,
            Self::Rotating(cache) => cache,
            Self::Quantized(cache) => cache,
            Self::Concatenate(cache) => cache,
        }
    }

    /// Rows by which the buffers grow.
    pub const fn step(&self) -> usize {
        match self {
            Self::Standard(cache) => cache.step,
            Self::Rotating(cache) => cache.step,
            Self::Quantized(cache) => cache.step,
            Self::Concatenate(_) => STEP,
        }
    }

    /// Sets the rows by which the buffers grow; at least 1. A cache without padding ignores it.
    pub fn set_step(&mut self, step: usize) {
        let step = step.max(1);
        match self {
            Self::Standard(cache) => cache.step = step,
            Self::Rotating(cache) => cache.step = step,
            Self::Quantized(cache) => cache.step = step,
            Self::Concatenate(_) => {}
        }
    }

    /// An empty cache of the mlx-lm class `name`, to be given a state; None for a class that this crate lacks.
    pub fn of_class(name: &str) -> Option<Self> {
        Some(match name {
            "KVCache" => Self::Standard(StandardKvCache::default()),
            "RotatingKVCache" => Self::Rotating(RotatingKvCache::unset()),
            "QuantizedKVCache" => Self::Quantized(QuantizedKvCache::default()),
            "ConcatenateKVCache" => Self::Concatenate(ConcatenateKvCache::default()),
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
        let mut cache = Self::of_class(&state.class).ok_or_else(|| {
            Error::value(op, "KVCache, RotatingKVCache, QuantizedKVCache or ConcatenateKVCache", &state.class)
        })?;
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

/// Checks a state against the class `name`, for [`KvCache::set_state`]; gives its fields.
fn checked_fields(name: &'static str, state: State<Array>) -> Result<Vec<State<Array>>> {
    let whole = CacheState { class: name.to_owned(), state };
    schema::check(&whole)
        .map_err(|fault| Error::value("state", format!("{}: {}", fault.key, fault.expected), fault.got))?;
    match whole.state {
        State::List(fields) => Ok(fields),
        other => Err(Error::value("state", "a tuple", other.kind())),
    }
}

/// The error of asking an empty cache for its rows.
fn nothing_yet() -> Error {
    Error::value("keys_and_values", "a cache with tokens", "an empty one")
}

/// A dense buffer `(B, H, L, D)` that is being assigned.
fn dense(op: &'static str, tensor: Option<KvTensor>) -> Result<Option<Array>> {
    match tensor {
        None => Ok(None),
        Some(KvTensor::Dense(array)) if array.shape().len() == 4 => Ok(Some(array)),
        Some(KvTensor::Dense(array)) => Err(Error::value(op, "an array (B, H, L, D)", format!("{:?}", array.shape()))),
        Some(KvTensor::Quantized(_)) => {
            Err(Error::value(op, "one array (B, H, L, D)", "packed words, scales and biases"))
        }
    }
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
