#![allow(missing_docs, clippy::all, clippy::pedantic)]
use crate::array::Dtype;
use crate::error::Result;
use crate::persist::Source;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
pub struct Options {
    pub path: Option<PathBuf>,
    pub ram_bytes: u64,
    pub disk_bytes: u64,
    pub block_tokens: usize,
    pub write_bytes_per_day: Option<u64>,
    pub read_only: bool,
    pub allow_network_fs: bool,
}
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Space([u8; 32]);
impl Space {
    pub fn new(b: [u8; 32]) -> Self {
        Self(b)
    }
}
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecordKind {
    Rows,
    State,
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    Ram,
    Disk,
}
#[derive(Clone, Debug)]
pub struct Wanted {
    pub kind: RecordKind,
    pub start: usize,
    pub end: usize,
    pub grid: u32,
    pub complete_from: usize,
}
pub struct NewTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}
pub struct NewRecord {
    pub kind: RecordKind,
    pub start: usize,
    pub end: usize,
    pub grid: u32,
    pub complete_from: usize,
    pub keep: bool,
    pub layout: String,
    pub tensors: Vec<NewTensor>,
}
type Key = (Space, RecordKind, Vec<u32>);
#[derive(Clone, Debug)]
pub struct RecordInfo {
    key: Key,
    pub kind: RecordKind,
    pub start: usize,
    pub end: usize,
    pub n_bytes: u64,
    pub grid: u32,
    pub complete_from: usize,
    pub tier: Tier,
    pub n_common: usize,
}
#[derive(Default)]
pub struct StoreFound {
    pub blocks: Vec<RecordInfo>,
    pub partial: Option<RecordInfo>,
    pub states: Vec<RecordInfo>,
}
#[derive(Clone)]
pub struct RecordTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub start: u64,
    pub n_bytes: u64,
    pub checksum: u64,
}
#[derive(Clone)]
pub struct OpenRecord {
    pub layout: String,
    pub tensors: BTreeMap<String, RecordTensor>,
    bytes: Arc<Vec<u8>>,
}
impl Source for OpenRecord {
    fn bytes(&self, at: u64, n: usize) -> Option<&[u8]> {
        self.bytes.get(at as usize..at as usize + n)
    }
    fn read(&self, b: &mut [u8], at: u64) -> Result<()> {
        b.copy_from_slice(&self.bytes[at as usize..at as usize + b.len()]);
        Ok(())
    }
}
#[derive(Debug)]
pub struct PutHandle(usize, u64);
pub struct PutReport {
    pub n_written: usize,
    pub n_bytes: u64,
}
impl PutHandle {
    pub fn wait(&self, _t: Option<Duration>) -> Result<Option<PutReport>> {
        Ok(Some(PutReport { n_written: self.0, n_bytes: self.1 }))
    }
    pub fn is_done(&self) -> bool {
        true
    }
}
pub fn checksum(b: &[u8]) -> u64 {
    b.iter().fold(7u64, |a, &x| a.wrapping_mul(31).wrapping_add(x as u64))
}
struct Stored {
    info: RecordInfo,
    open: OpenRecord,
}
pub struct PromptStore {
    block: usize,
    map: Mutex<HashMap<Key, Stored>>,
}
impl std::fmt::Debug for PromptStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PromptStore")
    }
}
impl PromptStore {
    pub fn open(o: Options) -> Result<Self> {
        Ok(Self { block: o.block_tokens, map: Mutex::default() })
    }
    pub fn close(&self) {}
    pub fn block_tokens(&self) -> usize {
        self.block
    }
    pub fn rate(&self, _: &str) -> Option<f64> {
        None
    }
    pub fn note_rate(&self, _: &str, _: f64) {}
    pub fn quarantine(&self, r: &RecordInfo, why: &str) {
        eprintln!("quarantine {} {} {why}", r.start, r.end);
        self.map.lock().unwrap().remove(&r.key);
    }
    pub fn pin(&self, _: &Space, _: &[u32]) -> Result<usize> {
        Ok(0)
    }
    pub fn unpin(&self, _: &Space, _: &[u32]) -> Result<usize> {
        Ok(0)
    }
    pub fn missing(&self, s: &Space, t: &[u32], w: &[Wanted]) -> Vec<bool> {
        let m = self.map.lock().unwrap();
        w.iter()
            .map(|w| {
                m.get(&(s.clone(), w.kind, t[..w.end].to_vec()))
                    .is_none_or(|r| (r.info.grid == 0 && w.grid != 0) || r.info.complete_from > w.complete_from)
            })
            .collect()
    }
    pub fn put(&self, s: &Space, t: &[u32], rs: Vec<NewRecord>) -> PutHandle {
        let mut m = self.map.lock().unwrap();
        let n = rs.len();
        let mut total = 0;
        for r in rs {
            let mut bytes = Vec::new();
            let mut tensors = BTreeMap::new();
            for x in r.tensors {
                tensors.insert(
                    x.name,
                    RecordTensor {
                        dtype: x.dtype,
                        shape: x.shape,
                        start: bytes.len() as u64,
                        n_bytes: x.bytes.len() as u64,
                        checksum: checksum(&x.bytes),
                    },
                );
                bytes.extend(x.bytes);
            }
            total += bytes.len() as u64;
            let key = (s.clone(), r.kind, t[..r.end].to_vec());
            let info = RecordInfo {
                key: key.clone(),
                kind: r.kind,
                start: r.start,
                end: r.end,
                n_bytes: bytes.len() as u64,
                grid: r.grid,
                complete_from: r.complete_from,
                tier: Tier::Ram,
                n_common: 0,
            };
            m.insert(key, Stored { info, open: OpenRecord { layout: r.layout, tensors, bytes: Arc::new(bytes) } });
        }
        PutHandle(n, total)
    }
    pub fn find(&self, s: &Space, t: &[u32]) -> StoreFound {
        let m = self.map.lock().unwrap();
        let mut f = StoreFound::default();
        let mut at = 0;
        while at + self.block <= t.len() {
            match m.get(&(s.clone(), RecordKind::Rows, t[..at + self.block].to_vec())) {
                Some(r) => {
                    let mut i = r.info.clone();
                    i.n_common = self.block;
                    f.blocks.push(i);
                    at += self.block
                }
                None => break,
            }
        }
        for (k, r) in m.iter() {
            if k.0 == *s && k.1 == RecordKind::Rows && r.info.start == at && k.2[..at] == t[..at] {
                let n = k.2[at..].iter().zip(&t[at..]).take_while(|(a, b)| a == b).count();
                if n > 0 && f.partial.as_ref().is_none_or(|p| p.n_common < n) {
                    let mut i = r.info.clone();
                    i.n_common = n;
                    f.partial = Some(i);
                }
            }
            if k.0 == *s && k.1 == RecordKind::State && k.2.len() <= t.len() && k.2[..] == t[..k.2.len()] {
                f.states.push(r.info.clone());
            }
        }
        f.states.sort_by_key(|r| std::cmp::Reverse(r.end));
        f
    }
    pub fn open_records(&self, rs: &[RecordInfo]) -> Vec<Option<OpenRecord>> {
        let m = self.map.lock().unwrap();
        rs.iter().map(|r| m.get(&r.key).map(|s| s.open.clone())).collect()
    }
}
