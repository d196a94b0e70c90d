//! L4: cache files. Reading and writing; which model filled the caches is not known here.

pub mod atomic;
pub mod background;
mod convert;
mod gather;
pub mod header;
mod layout;
mod reader;
mod restore;
mod save;
mod threads;
pub mod wire;
mod writer;

use std::collections::BTreeMap;

/// The user's strings in a file.
pub type Metadata = BTreeMap<String, String>;

pub use atomic::effective_safetensors_path;
pub use convert::{CutTensor, convert, recast};
pub use gather::Gathering;
pub use header::TensorInfo;
pub use reader::{CacheFile, load_prompt_cache};
pub use restore::assemble::{Assembly, Damage, Piece, Source, assemble};
pub use wire::{Format, check_metadata};
pub use writer::{SaveOptions, Saved, save_prompt_cache, write_states};
