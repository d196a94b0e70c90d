//! L5: many prompts in one place. In memory of one process: which tokens were stored, what is nearest to a query, which
//! entry goes next (pure). On disk: [`PromptStore`], and a model's [`View`](view::View) of it.

mod lru;
mod prompt_store;
mod prompts;
mod radix;
pub mod view;

pub use lru::{Kind, Lru};
#[doc(hidden)]
pub use prompt_store::fail_after;
pub use prompt_store::{
    FORMAT, Listed, NewRecord, NewTensor, OpenRecord, Options, PromptStore, PutHandle, PutReport, RecordInfo,
    RecordKind, RecordTensor, Space, Stats, StoreFound, Tier, Verified, Wanted, checksum,
};
pub use prompts::{Found, Gone, Limits, Nearest, Prompts};
pub use radix::{Key, Match, Radix};
