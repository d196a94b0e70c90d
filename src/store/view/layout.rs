//! What a record says of the caches whose rows it holds: the text that the store keeps and does not read.

use crate::cache::Cache;
use serde_json::{Value, json};

/// One cache without children, in a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    /// First token whose rows the record holds; its end if it holds none.
    pub from: usize,
    /// See [`Boundary::phase`](crate::cache::Boundary); of the record's end.
    pub phase: Option<usize>,
}

/// The text of a record of these leaves.
pub fn to_text(leaves: &[Leaf]) -> String {
    let leaf = |leaf: &Leaf| json!({"from": leaf.from, "phase": leaf.phase});
    Value::Array(leaves.iter().map(leaf).collect()).to_string()
}

/// The leaves of a text; None if it is no text of `n_leaves`.
pub fn from_text(text: &str, n_leaves: usize) -> Option<Vec<Leaf>> {
    let Ok(Value::Array(leaves)) = serde_json::from_str(text) else { return None };
    let count = |value: &Value| usize::try_from(value.as_u64()?).ok();
    let leaf = |leaf: &Value| {
        let phase = leaf.get("phase")?;
        let phase = if phase.is_null() { None } else { Some(count(phase)?) };
        Some(Leaf { from: count(leaf.get("from")?)?, phase })
    };
    let leaves = leaves.iter().map(leaf).collect::<Option<Vec<_>>>()?;
    (leaves.len() == n_leaves).then_some(leaves)
}

/// Names of the tensors of a leaf with rows: each of the parts of keys, then of values.
pub fn row_names(leaf: usize, cache: &Cache) -> Vec<String> {
    let is_quantized = match cache {
        Cache::Quantized(_) => true,
        Cache::Rotating(cache) => cache.scheme().is_some(),
        _ => false,
    };
    let parts: &[&str] = if is_quantized { &["", ".scales", ".biases"] } else { &[""] };
    ["keys", "values"].iter().flat_map(|name| parts.iter().map(move |part| format!("{leaf}.{name}{part}"))).collect()
}

/// Name of the tensor of a slot.
pub fn slot_name(leaf: usize, slot: usize) -> String {
    format!("{leaf}.{slot}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_nothing_else() {
        let leaves = [Leaf { from: 512, phase: None }, Leaf { from: 700, phase: Some(3) }];
        let text = to_text(&leaves);
        assert_eq!(from_text(&text, 2), Some(leaves.to_vec()));
        for (text, n_leaves) in [(text.as_str(), 3), ("[{\"from\": -1, \"phase\": null}]", 1), ("{}", 0), ("[", 1)] {
            assert_eq!(from_text(text, n_leaves), None);
        }
    }
}
