//! Integers only: how buffers grow, where rings write, what may be trimmed, where sequences of a batch begin. No array, no file.

mod batch_ring;
mod growth;
mod ring;
mod sequences;

pub use batch_ring::{BatchPlace, BatchRing};
pub use growth::{Growth, round_up};
pub use ring::{Append, Place, Ring, Segment};
pub use sequences::{Sequences, choose};
