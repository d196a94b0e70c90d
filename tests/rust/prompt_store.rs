//! The prompt store: what was put comes back with its very bytes, or not at all.

mod basics;
mod common;
mod flips;
mod model;
mod packed;
mod processes;
mod sharing;
