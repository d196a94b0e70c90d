//! Integers only: how buffers grow, where rings write, what may be trimmed. No array, no file.

mod growth;
mod ring;

pub use growth::{Growth, round_up};
pub use ring::{Append, Place, Ring, Segment};
