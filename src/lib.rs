//! Prompt caches for language models on [MLX](https://github.com/ml-explore/mlx): every KV cache of mlx-lm,
//! chunked prefill with a memory barrier per chunk, and atomic, durable cache files.
//!
//! The layers, each using only those before it:
//! `ffi` → [`array`] → [`cache`] → [`prefill`] → [`persist`] → [`prompt`], [`store`] → `python`.
//!
//! Without the feature `python` this is a Rust library over libmlx; set `MLXRS_MLX_DIR` to the folder that
//! holds MLX's `include/` and `lib/` when no Python has MLX installed. `examples/rust_prefill.rs` runs a model.

// Bindgen's names and the handles over them; the one layer, beside the bridge, that may be unsafe.
#[expect(unsafe_code, reason = "calls mlx-c")]
mod ffi;

#[forbid(unsafe_code)]
pub mod array;
#[forbid(unsafe_code)]
pub mod cache;
#[forbid(unsafe_code)]
pub mod error;
#[forbid(unsafe_code)]
pub mod persist;
#[forbid(unsafe_code)]
pub mod prefill;
#[forbid(unsafe_code)]
pub mod prompt;
#[cfg(feature = "python")]
mod python;
#[forbid(unsafe_code)]
pub mod store;

pub use error::{Error, Result};

/// Number of array handles alive now, for leak tests. Counted in debug builds only; else always 0.
#[doc(hidden)]
pub fn live_handles() -> usize {
    ffi::live_handles()
}

/// Version of the MLX that the process loaded.
pub fn mlx_version() -> String {
    ffi::mlx_version()
}

/// Version of this crate and of the Python package.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
