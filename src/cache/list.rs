//! `CacheList`: the caches of a layer that has several.

use super::{Cache, CacheState, Checkpoint, CheckpointKind, LayerCache, State, checked_fields};
use crate::array::Array;
use crate::error::{Error, Result};

/// One of several caches that must stay at one token. It may be Rust's or Python's.
pub trait Member {
    /// The error of the member's world.
    type Error;

    /// As [`LayerCache::is_trimmable`].
    ///
    /// # Errors
    /// If the member cannot tell.
    fn is_trimmable(&self) -> Result<bool, Self::Error>;

    /// As [`LayerCache::n_held`].
    ///
    /// # Errors
    /// If the member cannot tell.
    fn n_held(&self) -> Result<usize, Self::Error>;

    /// Takes back `n` of the newest tokens, which it holds.
    ///
    /// # Errors
    /// If it fails.
    fn trim(&mut self, n: usize) -> Result<(), Self::Error>;
}

/// Takes back up to `n` of the newest tokens of all members: the same number for all, limited by the one that holds the
/// fewest. Gives that number; None if one cannot be trimmed.
///
/// # Errors
/// The first error of a member.
pub fn trim_all<M: Member>(members: &mut [M], n: usize) -> Result<Option<usize>, M::Error> {
    let mut least = if members.is_empty() { 0 } else { n };
    for member in members.iter() {
        if !member.is_trimmable()? {
            return Ok(None);
        }
        least = least.min(member.n_held()?);
    }
    members.iter_mut().try_for_each(|member| member.trim(least))?;
    Ok(Some(least))
}

impl Member for Cache {
    type Error = Error;

    fn is_trimmable(&self) -> Result<bool> {
        Ok(self.as_dyn().is_trimmable())
    }

    fn n_held(&self) -> Result<usize> {
        Ok(self.as_dyn().n_held())
    }

    fn trim(&mut self, n: usize) -> Result<()> {
        self.as_dyn_mut().trim(n).map(|_| ())
    }
}

/// The error of trimming a list of which one cannot be trimmed.
pub fn cannot_trim(n: usize) -> Error {
    Error::value("CacheList.trim", "caches that can all be trimmed, or 0 tokens", n)
}

/// Caches of one layer, in the order in which the model uses them.
#[derive(Clone, Debug, Default)]
pub struct ListCache {
    /// The caches.
    pub children: Vec<Cache>,
}

impl ListCache {
    fn each(&self) -> impl Iterator<Item = &dyn LayerCache> {
        self.children.iter().map(|child| child.as_dyn() as &dyn LayerCache)
    }
}

/// A child of a checked state.
fn child(pair: State<Array>) -> Result<Cache> {
    let parts = if let State::List(parts) = pair { parts } else { Vec::new() };
    match <[_; 2]>::try_from(parts) {
        Ok([state, State::Str(class)]) => Cache::from_state(CacheState { class, state }),
        _ => Err(Error::value("state", "a child's state and its class name", "something else")),
    }
}

impl LayerCache for ListCache {
    fn reference_class_name(&self) -> &'static str {
        "CacheList"
    }

    fn state(&self) -> State<Array> {
        let pair = |child: &dyn LayerCache| {
            State::List(vec![child.state(), State::Str(child.reference_class_name().to_owned())])
        };
        State::List(self.each().map(pair).collect())
    }

    fn set_state(&mut self, state: State<Array>) -> Result<()> {
        let children = checked_fields(self.reference_class_name(), state)?;
        self.children = children.into_iter().map(child).collect::<Result<_>>()?;
        Ok(())
    }

    fn buffers(&self) -> Vec<&Array> {
        self.children.iter().flat_map(|child| child.as_dyn().buffers()).collect()
    }

    fn nbytes(&self) -> usize {
        self.each().map(LayerCache::nbytes).sum()
    }

    /// The first child's answer, as in mlx-lm; True without children.
    fn is_empty(&self) -> bool {
        self.each().next().is_none_or(LayerCache::is_empty)
    }

    /// The largest of the children's.
    fn size(&self) -> usize {
        self.each().map(LayerCache::size).max().unwrap_or(0)
    }

    fn n_held(&self) -> usize {
        self.each().map(LayerCache::n_held).min().unwrap_or(usize::MAX)
    }

    fn is_trimmable(&self) -> bool {
        self.each().all(LayerCache::is_trimmable)
    }

    fn trim(&mut self, n: usize) -> Result<usize> {
        let mut children = self.children.clone();
        match trim_all(&mut children, n)? {
            Some(trimmed) => {
                self.children = children;
                Ok(trimmed)
            }
            None if n == 0 => Ok(0),
            None => Err(cannot_trim(n)),
        }
    }

    fn checkpoint(&self, n_tokens: usize) -> Checkpoint {
        Checkpoint(CheckpointKind::Children(self.each().map(|child| child.checkpoint(n_tokens)).collect()))
    }

    fn rollback(&mut self, checkpoint: Checkpoint) {
        if let CheckpointKind::Children(checkpoints) = checkpoint.0 {
            for (child, checkpoint) in self.children.iter_mut().zip(checkpoints) {
                child.as_dyn_mut().rollback(checkpoint);
            }
        }
    }

    fn copy(&self) -> Cache {
        Cache::List(self.clone())
    }
}
