//! Records whose bytes follow from what they cover, so that anything wrong that is served shows.

use mlxrs_py::array::Dtype;
use mlxrs_py::store::prompt_store::{
    Found, NewRecord, NewTensor, OpenRecord, Options, PromptStore, RecordInfo, RecordKind, Space, Step, checksum,
    set_probe,
};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

/// Tokens of a block in these tests.
pub const BLOCK: usize = 8;

pub fn space(n: u8) -> Space {
    Space([n; 32])
}

pub fn options(path: Option<&Path>) -> Options {
    Options {
        path: path.map(Path::to_owned),
        ram_bytes: 64 << 20,
        disk_bytes: Some(64 << 20),
        block_tokens: BLOCK,
        ..Options::default()
    }
}

pub fn open(path: &Path) -> PromptStore {
    PromptStore::open(options(Some(path))).unwrap()
}

/// Bytes that belong to the tokens up to `end`, and to nothing else.
pub fn content(space: &Space, tokens: &[u32], kind: RecordKind, start: usize, end: usize, n_bytes: usize) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&space.0).update(&[kind as u8]).update(&(start as u64).to_le_bytes());
    for token in &tokens[..end] {
        hasher.update(&token.to_le_bytes());
    }
    let mut bytes = vec![0; n_bytes];
    hasher.finalize_xof().fill(&mut bytes);
    // Noise could not be made smaller.
    bytes.iter_mut().for_each(|byte| *byte &= 0x3f);
    bytes
}

pub fn record(space: &Space, tokens: &[u32], kind: RecordKind, start: usize, end: usize, size: usize) -> NewRecord {
    let bytes = content(space, tokens, kind, start, end, size / 2 * 4 + size);
    let (wide, narrow) = bytes.split_at(size / 2 * 4);
    let tensor = |name: &str, dtype, shape: Vec<usize>, bytes: &[u8]| NewTensor {
        name: name.into(),
        dtype,
        shape,
        bytes: bytes.to_vec(),
    };
    NewRecord {
        kind,
        start,
        end,
        grid: 0,
        complete_from: start,
        keep: false,
        layout: format!("{{\"size\":{size}}}"),
        tensors: vec![
            tensor("0.narrow", Dtype::U8, vec![1, size], narrow),
            tensor("0.wide", Dtype::F32, vec![size / 2], wide),
        ],
    }
}

/// Blocks and tail of `tokens` from `from` on.
pub fn rows(space: &Space, tokens: &[u32], from: usize, size: usize) -> Vec<NewRecord> {
    let starts = (from / BLOCK * BLOCK..tokens.len()).step_by(BLOCK);
    let end = |start: usize| (start + BLOCK).min(tokens.len());
    starts.map(|start| record(space, tokens, RecordKind::Rows, start, end(start), size)).collect()
}

pub fn put(store: &PromptStore, space: &Space, tokens: &[u32], records: Vec<NewRecord>) {
    let report = store.put(space, tokens, records).wait(Some(Duration::from_secs(60))).unwrap();
    assert!(report.is_some(), "no outcome in a minute");
}

/// Checks one open record against what its tokens say; false if its bytes do not match its checksums.
pub fn check(space: &Space, tokens: &[u32], info: &RecordInfo, open: &OpenRecord) -> bool {
    let size: usize = open.layout.trim_start_matches("{\"size\":").trim_end_matches('}').parse().unwrap();
    let mut covered = tokens[..info.start].to_vec();
    covered.extend_from_slice(info.tokens());
    let expected = content(space, &covered, info.kind, info.start, info.end, size / 2 * 4 + size);
    let mut read = Vec::new();
    for name in ["0.wide", "0.narrow"] {
        let tensor = &open.tensors[name];
        let Ok(bytes) = open.read(tensor) else { return false };
        if checksum(&bytes) != tensor.checksum {
            return false;
        }
        read.extend(bytes);
    }
    assert_eq!(read, expected, "a wrong hit");
    true
}

/// What a restore of all rows takes, in the order of tokens, and the states.
pub fn all(found: &Found) -> Vec<RecordInfo> {
    found.blocks.iter().chain(found.partials.first()).chain(&found.states).cloned().collect()
}

/// Finds, opens and reads as a restore does: gives the number of tokens whose rows came back, and the deepest state. What is
/// damaged is put aside, and asked for again: what it hid is then found.
pub fn restore(store: &PromptStore, space: &Space, tokens: &[u32]) -> (usize, usize) {
    loop {
        if let Some(found) = try_restore(store, space, tokens) {
            return found;
        }
    }
}

/// None if something was damaged.
fn try_restore(store: &PromptStore, space: &Space, tokens: &[u32]) -> Option<(usize, usize)> {
    let found = store.find(space, tokens);
    for (at, block) in found.blocks.iter().enumerate() {
        assert_eq!((block.start, block.end, block.n_common), (at * BLOCK, (at + 1) * BLOCK, BLOCK));
        assert_eq!(block.tokens(), &tokens[block.start..block.end], "a wrong hit");
    }
    for state in &found.states {
        assert_eq!(state.tokens(), &tokens[state.start..state.end], "a wrong hit");
    }
    let records = all(&found);
    let opened = store.open_records(&records);
    assert_eq!(opened.len(), records.len());
    let (mut n, mut is_damaged, mut deepest) = (0, false, 0);
    for (info, open) in records.iter().zip(&opened) {
        let is_good = open.as_ref().is_some_and(|open| check(space, tokens, info, open));
        if !is_good {
            if open.is_some() {
                store.quarantine(info, "damaged bytes");
            }
            is_damaged = true;
        } else if info.kind == RecordKind::State {
            deepest = deepest.max(info.end);
        } else if !is_damaged {
            assert_eq!(info.start, n, "a gap");
            assert_eq!(&info.tokens()[..info.n_common], &tokens[n..n + info.n_common], "a wrong hit");
            n += info.n_common;
        }
    }
    (!is_damaged).then_some((n, deepest))
}

/// Bytes that a folder takes.
pub fn folder_size(path: &Path) -> u64 {
    std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| size_of(&entry.path())).sum()
}

/// Bytes that a file takes, or all that lie in a folder; 0 for what is not there any more.
pub fn size_of(path: &Path) -> u64 {
    let Ok(meta) = std::fs::symlink_metadata(path) else { return 0 };
    if meta.is_dir() { folder_size(path) } else { meta.len().next_multiple_of(4096) }
}

/// A sequence of tokens, of which the first ones are shared by all with the same `branch` down to there.
pub fn tokens(branches: &[(u32, usize)]) -> Vec<u32> {
    branches.iter().flat_map(|&(branch, n)| (0..n as u32).map(move |at| branch * 1000 + at)).collect()
}

/// A step at which the store in a folder is to fail: after how many passes, and with which error.
type Plan = (Step, u32, i32);

static PLANS: Mutex<BTreeMap<PathBuf, Plan>> = Mutex::new(BTreeMap::new());

fn fail_as_planned(step: Step, root: &Path) -> io::Result<()> {
    let mut plans = PLANS.lock().unwrap();
    let Some((planned, passes, errno)) = plans.get_mut(root) else { return Ok(()) };
    if *planned != step {
        return Ok(());
    }
    if *passes > 0 {
        *passes -= 1;
        return Ok(());
    }
    Err(io::Error::from_raw_os_error(*errno))
}

/// Makes the store in `root` fail at a step, from the pass after `passes` on; None: no more.
pub fn plan(root: &Path, plan: Option<Plan>) {
    let _ = set_probe(fail_as_planned);
    let root = root.canonicalize().unwrap();
    let mut plans = PLANS.lock().unwrap();
    match plan {
        Some(plan) => drop(plans.insert(root, plan)),
        None => drop(plans.remove(&root)),
    }
}

/// Splitmix64: small, and the same on every machine.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

pub fn env_number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}
