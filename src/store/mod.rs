//! L5: many prompts in one place. [`Radix`], [`Lru`] and [`Prompts`] are pure: which tokens were stored, what is nearest to a
//! query, which entry goes next. [`prompt_store`] keeps bytes by tokens, in memory and in a folder that processes share;
//! [`view`] cuts the caches of a model into such bytes, and puts them together again.

mod lru;
pub mod prompt_store;
mod prompts;
mod radix;
pub mod view;

pub use lru::{Kind, Lru};
pub use prompts::{Found, Gone, Limits, Nearest, Prompts};
pub use radix::{Key, Match, Radix};
