//! What a cache can do: [`LayerCache`] for every cache, [`KvCache`] for those with keys and values.

use super::{Cache, KvTensor, MaskMode, State};
use crate::array::{self, Array};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;

/// The state that one layer of a model keeps between tokens, whatever it holds: what prefill, files and budgets need.
pub trait LayerCache {
    /// The mlx-lm class that this cache stands for, as files name it.
    fn reference_class_name(&self) -> &'static str;

    /// The state in the order of mlx-lm 0.32.2, whole buffers included.
    fn state(&self) -> State<Array>;

    /// Replaces the state; checked as a whole before anything changes.
    ///
    /// # Errors
    /// [`Error::Value`] if the state does not fit the class.
    fn set_state(&mut self, state: State<Array>) -> Result<()>;

    /// The stored buffers themselves.
    fn buffers(&self) -> Vec<&Array>;

    /// Evaluates the stored buffers, not slices of them: the memory barrier of a chunk.
    ///
    /// # Errors
    /// [`Error::Mlx`] if a computation fails.
    fn materialize(&self) -> Result<()> {
        array::eval("materialize", self.buffers())
    }

    /// Bytes of the stored buffers, padding included; 0 when empty.
    fn nbytes(&self) -> usize {
        self.buffers().into_iter().map(Array::n_bytes).sum()
    }

    /// True before the first update.
    fn is_empty(&self) -> bool {
        self.buffers().is_empty()
    }

    /// Tokens whose rows are held; 0 for a cache that holds no rows.
    fn size(&self) -> usize;

    /// Tokens that [`trim`](Self::trim) could take back, if the cache is trimmable.
    fn n_held(&self) -> usize {
        self.size()
    }

    /// True if the newest tokens can be taken back.
    fn is_trimmable(&self) -> bool {
        true
    }

    /// Takes back up to `n` of the newest tokens and gives how many.
    ///
    /// # Errors
    /// [`Error::Value`] if the rows that would be newest are gone, or if the cache has none.
    fn trim(&mut self, n: usize) -> Result<usize>;

    /// What [`rollback`](Self::rollback) needs to undo `n_tokens` more. Holds no array that an update would write in
    /// place, if it can: MLX would have to copy it.
    fn checkpoint(&self, n_tokens: usize) -> Checkpoint;

    /// Goes back to a checkpoint of this cache.
    fn rollback(&mut self, checkpoint: Checkpoint);

    /// An independent cache; the arrays are shared until one of the two writes.
    fn copy(&self) -> Cache;
}

/// The keys and values of one attention layer.
///
/// Shapes: keys `(B, H, S, D)`, values `(B, H, S, Dv)`; S is the number of new tokens.
pub trait KvCache: LayerCache {
    /// Tokens seen so far: the position of the next one. In a batch, the columns seen so far.
    fn offset(&self) -> usize;

    /// Takes the keys and values of new tokens and gives all that attention shall see. Lazy.
    ///
    /// # Errors
    /// [`Error::Value`] if the shapes do not fit, [`Error::Mlx`] if MLX fails; the cache is then as before.
    fn update(&mut self, keys: &Array, values: &Array) -> Result<(KvTensor, KvTensor)>;

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

    /// Tells that a prompt brings `n_tokens` more, so that buffers grow by longer steps; 0: nothing is known any more.
    fn expect_tokens(&mut self, _n_tokens: usize) {}

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

    /// The mask for `n_tokens` that are about to be updated.
    ///
    /// # Errors
    /// [`Error::Mlx`] if MLX fails.
    fn make_mask(&self, n_tokens: usize, window: Option<usize>, return_array: bool) -> Result<MaskMode>;

    /// Rows that the cache holds at most; None if it grows.
    fn max_size(&self) -> Option<usize> {
        None
    }
}

/// The way back to where a cache stood; see [`LayerCache::checkpoint`].
#[derive(Debug)]
pub struct Checkpoint(pub(super) CheckpointKind);

#[derive(Debug)]
pub(super) enum CheckpointKind {
    /// The rows before this offset outlive the update. What was not computed of it is taken off the buffers.
    Offset(usize),
    /// The update replaces rows: the cache as it was.
    Whole(Box<Cache>),
    /// A list: each child's own.
    Children(Vec<Checkpoint>),
}

impl Checkpoint {
    /// Everything that `cache` is now; its arrays are shared.
    pub(super) fn whole(cache: &dyn LayerCache) -> Self {
        Self(CheckpointKind::Whole(Box::new(cache.copy())))
    }

    /// The offset alone if the rows before it outlive an update, which `overwrites` none of them; else everything.
    pub(super) fn at_offset(cache: &dyn KvCache, overwrites: bool) -> Self {
        let buffers = cache.buffers();
        if overwrites || buffers.is_empty() || !buffers.iter().all(|buffer| buffer.is_scheduled()) {
            return Self(CheckpointKind::Whole(Box::new(cache.copy())));
        }
        Self(CheckpointKind::Offset(cache.offset()))
    }

    /// Puts back a `cache` that was kept whole, if `of` finds it to be of this class; else gives the offset to go back to.
    pub(super) fn put_back<C>(self, cache: &mut C, of: impl FnOnce(Cache) -> Option<C>) -> Option<usize> {
        match self.0 {
            CheckpointKind::Offset(offset) => return Some(offset),
            CheckpointKind::Whole(whole) => {
                if let Some(whole) = of(*whole) {
                    *cache = whole;
                }
            }
            CheckpointKind::Children(_) => {}
        }
        None
    }
}

/// Takes updates that were never computed off the buffers: these may hold on to what failed. If some buffers had grown
/// already, all are cut to the shortest.
pub(super) fn settle<'a>(buffers: impl IntoIterator<Item = &'a mut Array>) {
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
