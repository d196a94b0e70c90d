//! Host time of cache updates.
fn main() {}
