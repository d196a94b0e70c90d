//! One model's view of a store: caches are cut into records, and put together from them again.

mod capture;
mod layout;
mod plan;
mod restore;

pub use capture::{Cuts, Located, Recorder};
pub use restore::{Lookup, Restored};

use crate::cache::{Cache, Lookback};
use crate::error::{Error, Result};
use crate::store::prompt_store::{PromptStore, Space};
use std::sync::Arc;

/// The version of what records hold; it changes only when bits or layout change.
const VERSION: u32 = 1;

/// The records of one model, adapter, quantization and namespace.
#[derive(Clone, Debug)]
pub struct View {
    store: Arc<PromptStore>,
    /// Fresh caches without children, in the model's order: what is restored has their classes and parameters.
    leaves: Vec<Cache>,
    space: Space,
}

impl View {
    /// `fingerprint`: all but the tokens that rows depend on. `leaves`: fresh caches, the children of lists in place of
    /// the lists.
    ///
    /// # Errors
    /// [`Error::Value`] if there are none, or one that cannot be cut, such as a batch.
    pub fn new(store: Arc<PromptStore>, fingerprint: &[u8], leaves: Vec<Cache>) -> Result<Self> {
        let op = "PromptStore.view";
        if leaves.is_empty() {
            return Err(Error::value(op, "at least one cache", "none"));
        }
        if let Some(other) = leaves.iter().find(|leaf| leaf.lookback().is_none()) {
            return Err(Error::value(op, "caches of one sequence", other.as_dyn().reference_class_name()));
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"mlxrs_py prompt store").update(&VERSION.to_le_bytes());
        hasher.update(&(fingerprint.len() as u64).to_le_bytes()).update(fingerprint);
        for leaf in &leaves {
            hasher.update(leaf.signature().as_bytes()).update(b"\n");
        }
        let space = Space(*hasher.finalize().as_bytes());
        Ok(Self { store, leaves, space })
    }

    /// A view of the same model whose caches are now `leaves`: those that were quantized have rows of their own.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// The store.
    pub const fn store(&self) -> &Arc<PromptStore> {
        &self.store
    }

    /// Fails unless `leaves` are caches as this view restores them.
    ///
    /// # Errors
    /// [`Error::Value`] that names the first cache that differs.
    pub fn check(&self, op: &'static str, leaves: &[Cache]) -> Result<()> {
        if leaves.len() != self.leaves.len() {
            return Err(Error::value(op, format!("{} caches", self.leaves.len()), leaves.len()));
        }
        for (at, (ours, theirs)) in self.leaves.iter().zip(leaves).enumerate() {
            let (expected, got) = (ours.signature(), theirs.signature());
            if expected != got {
                return Err(Error::value(op, format!("cache {at} like {expected}"), got));
            }
        }
        Ok(())
    }

    /// True if some layer keeps a state that cannot be cut.
    fn has_states(&self) -> bool {
        self.leaves.iter().any(|leaf| leaf.lookback() == Some(Lookback::Whole))
    }

    /// The longest window, and whether any layer keeps first rows.
    fn windows(&self) -> (usize, bool) {
        let windows = self.leaves.iter().filter_map(|leaf| match leaf.lookback() {
            Some(Lookback::Window { keep, n }) => Some((n, keep > 0)),
            _ => None,
        });
        windows.fold((0, false), |(longest, keeps), (n, keep)| (longest.max(n), keeps || keep))
    }
}
