//! Names of temporary files: `.<target>.<process id>.<16 hex>.tmp.safetensors`.

use std::ffi::{OsStr, OsString};
use std::hash::{BuildHasher, RandomState};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Longest file name, in bytes, on the file systems in use.
const MAX_NAME_BYTES: usize = 255;
const SUFFIX: &[u8] = b".tmp.safetensors";
const HEX_DIGITS: usize = 16;

/// A new name, most likely unused, for a temporary file of `target`, whose part is cut so that 255 bytes hold.
pub(super) fn fresh(target: &OsStr) -> OsString {
    // Each hasher has new random keys, which is all the randomness that an exclusively created name needs.
    let random = RandomState::new().hash_one(());
    let tail = format!(".{}.{random:0HEX_DIGITS$x}", std::process::id());
    let mut name = vec![b'.'];
    name.extend_from_slice(cut(target.as_bytes(), MAX_NAME_BYTES - 1 - tail.len() - SUFFIX.len()));
    name.extend_from_slice(tail.as_bytes());
    name.extend_from_slice(SUFFIX);
    OsString::from_vec(name)
}

/// Whether `name` is one that [`fresh`] makes.
pub(super) fn matches(name: &[u8]) -> bool {
    parse(name).is_some()
}

fn parse(name: &[u8]) -> Option<()> {
    let rest = name.strip_prefix(b".")?.strip_suffix(SUFFIX)?;
    let (rest, hex) = split_last(rest)?;
    let (target, process) = split_last(rest)?;
    let is_hex = hex.len() == HEX_DIGITS && hex.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let is_process = (1..=10).contains(&process.len()) && process.iter().all(u8::is_ascii_digit);
    (is_hex && is_process && !target.is_empty()).then_some(())
}

fn split_last(name: &[u8]) -> Option<(&[u8], &[u8])> {
    let dot = name.iter().rposition(|&byte| byte == b'.')?;
    Some((&name[..dot], &name[dot + 1..]))
}

/// At most `max` bytes of `name`, ending where a UTF-8 character ends: some file systems take nothing else.
fn cut(name: &[u8], max: usize) -> &[u8] {
    if name.len() <= max {
        return name;
    }
    let mut end = max;
    while end > max - 3 && name[end] & 0xC0 == 0x80 {
        end -= 1;
    }
    &name[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_fresh_name_fits_matches_and_begins_with_its_target(target in "[^/\\x00]{1,90}") {
            let name = fresh(OsStr::new(&target));
            prop_assert!(name.len() <= MAX_NAME_BYTES && matches(name.as_bytes()));
            let name = name.to_str().expect("characters are whole");
            let kept = name[1..].rsplitn(5, '.').last().expect("five parts");
            prop_assert!(target.starts_with(kept));
            prop_assert!(kept == target || name.len() > MAX_NAME_BYTES - 4);
        }

        #[test]
        fn names_of_any_bytes_are_cut_only_as_far_as_needed(target in prop::collection::vec(1..=255_u8, 1..255)) {
            let name = fresh(OsStr::from_bytes(&target));
            prop_assert!(name.len() <= MAX_NAME_BYTES && matches(name.as_bytes()));
        }

        #[test]
        fn one_changed_byte_of_the_fixed_parts_is_no_match(at in 0..34_usize, byte in b'g'..=b'z') {
            let mut name = b".x.12.0123456789abcdef.tmp.safetensors".to_vec();
            prop_assert!(matches(&name));
            let at = if at == 0 { 0 } else { at + 4 - 1 };
            prop_assume!(name[at] != byte);
            name[at] = byte;
            prop_assert!(!matches(&name));
        }
    }

    #[test]
    fn two_fresh_names_differ() {
        assert_ne!(fresh(OsStr::new("x")), fresh(OsStr::new("x")));
    }
}
