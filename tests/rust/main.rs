//! All Rust tests outside the sources, in one binary: one module per layer.
#![allow(missing_docs, clippy::unwrap_used, clippy::pedantic)]

mod array;
mod atomic;
mod caches;
mod convert;
mod damage;
mod fabricate;
mod files;
mod fuzz;
mod header;
mod kill;
mod layers;
mod mock;
mod prefill;
mod prompt;
mod prompt_store;
mod recast;
mod restore;
mod revive;
mod schema;
mod states;
mod store;
mod wire;
