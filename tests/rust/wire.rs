//! The two layouts of a file: what is written, what is read back, and what is refused.

mod read;
mod reference;
mod refused;
mod registered;
pub mod samples;
mod written;
