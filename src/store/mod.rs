//! L5: many prompts in one place. [`Radix`], [`Lru`] and [`Prompts`] are pure: which tokens were stored, what is nearest to a
//! query, which entry goes next. [`prompt_store`] keeps bytes by tokens, in memory and in a folder that processes share.
//! Nothing here knows arrays or Python.

mod lru;
pub mod prompt_store;
mod prompts;
mod radix;

pub use lru::{Kind, Lru};
pub use prompts::{Found, Gone, Limits, Nearest, Prompts};
pub use radix::{Key, Match, Radix};
