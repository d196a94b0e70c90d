//! Classes beyond the table, which programs add by name: files may hold any state of theirs.

use super::{CLASSES, Class, Rule};
use crate::error::{Error, Result};
use std::sync::{PoisonError, RwLock};

/// Letters of the longest name.
pub const MAX_NAME: usize = 64;

/// Entries live as long as the process: states refer to them.
static REGISTERED: RwLock<Vec<&'static Class>> = RwLock::new(Vec::new());

/// Lets files hold states of a class called `name`, whatever they consist of. Doing it again changes nothing.
///
/// # Errors
/// [`Error::Value`] for a name that is longer than [`MAX_NAME`], no plain word, or that of a class in [`CLASSES`].
pub fn register(name: &str) -> Result<()> {
    let is_word = name.chars().all(|c| c.is_alphanumeric() || c == '_') && !name.is_empty();
    if !is_word || name.chars().count() > MAX_NAME {
        return Err(Error::value(
            "register",
            format!("a class name of at most {MAX_NAME} letters"),
            format!("{name:?}"),
        ));
    }
    if CLASSES.iter().any(|class| class.name == name) {
        return Err(Error::value("register", "a name that no class of mlx-lm or of ours has", name));
    }
    // A panic elsewhere cannot leave the list half changed.
    let mut registered = REGISTERED.write().unwrap_or_else(PoisonError::into_inner);
    if registered.iter().all(|class| class.name != name) {
        let name = String::leak(name.to_owned());
        registered.push(Box::leak(Box::new(Class { name, in_v031: false, fields: &[], rule: Rule::Any })));
    }
    Ok(())
}

pub(super) fn find(name: &str) -> Option<&'static Class> {
    let registered = REGISTERED.read().unwrap_or_else(PoisonError::into_inner);
    registered.iter().copied().find(|class| class.name == name)
}
