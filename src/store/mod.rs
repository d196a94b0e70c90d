//! L5: many prompts in one place: which tokens were stored, what is nearest to a query, which entry goes next. Pure:
//! it knows neither arrays nor files nor Python.

mod lru;
pub mod prompt_store;
mod prompts;
mod radix;

pub use lru::{Kind, Lru};
pub use prompts::{Found, Gone, Limits, Nearest, Prompts};
pub use radix::{Key, Match, Radix};
