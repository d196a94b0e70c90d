//! Random operations and faults beside a model of what must be there.
//!
//! `MLXRS_STORE_OPERATIONS` sets how many, `MLXRS_SEED` which ones.

mod faults;

use super::common::*;
use mlxrs_py::store::prompt_store::{
    Compression, Listed, NewRecord, Options, PromptStore, PutHandle, RecordKind, Step, Tier,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::tempdir;

const LIMIT: u64 = 4 << 20;
const SIZE: usize = 6_000;

/// A record by all that tells it from others.
type Key = (u8, RecordKind, Vec<u32>);

/// What must be found: acknowledged, and neither damaged, evicted nor pruned since.
#[derive(Default)]
struct Model {
    certain: BTreeSet<Key>,
    /// All that was ever put.
    all: BTreeSet<Key>,
    /// Damaged files that nobody has met yet, with the records that they may be.
    damaged: Vec<(PathBuf, Key)>,
}

impl Model {
    /// Takes a put that was acknowledged.
    fn add(&mut self, space: u8, tokens: &[u32], records: &[(RecordKind, usize, usize)]) {
        for &(kind, start, end) in records {
            let covered = &tokens[..end];
            // Tails that it goes on from may go, and states that stand close together.
            self.certain.retain(|(other, other_kind, stored)| {
                let is_on_way = *other == space && *other_kind == kind && covered.starts_with(stored);
                let is_tail = stored.len() > start && stored.len() < end;
                !(is_on_way && (kind == RecordKind::State || is_tail))
            });
            let key = (space, kind, covered.to_vec());
            self.all.insert(key.clone());
            self.certain.insert(key);
        }
        // What lies damaged on the disk counts as stored, until somebody reads it.
        self.damaged.retain(|(path, _)| path.exists());
        for (_, (space, kind, covered)) in self.damaged.clone() {
            self.lose(space, kind, &covered);
        }
    }

    /// Takes a put of which nobody knows how far it came.
    fn doubt(&mut self, space: u8, tokens: &[u32], records: &[(RecordKind, usize, usize)]) {
        let before = self.certain.clone();
        self.add(space, tokens, records);
        self.certain.retain(|key| before.contains(key));
    }

    /// The record in `covered` is damaged or gone: nothing that hangs on it need be found.
    fn lose(&mut self, space: u8, kind: RecordKind, covered: &[u32]) {
        self.certain.retain(|(other, other_kind, stored)| {
            let hangs = if kind == RecordKind::State {
                *other_kind == kind && stored == covered
            } else {
                stored.starts_with(covered) || (!covered.len().is_multiple_of(BLOCK) && stored == covered)
            };
            *other != space || !hangs
        });
    }

    /// Tokens of `query` whose rows must come back, and the deepest state.
    fn expect(&self, space: u8, query: &[u32]) -> (usize, usize) {
        let is_certain = |kind, covered: &[u32]| self.certain.contains(&(space, kind, covered.to_vec()));
        let full = (1..=query.len() / BLOCK).take_while(|n| is_certain(RecordKind::Rows, &query[..n * BLOCK])).count();
        let whole = full * BLOCK;
        let common = |stored: &[u32]| stored.iter().zip(query).take_while(|(a, b)| a == b).count();
        let near = self.certain.iter().filter(|(other, kind, stored)| {
            *other == space && *kind == RecordKind::Rows && stored.len() > whole && stored.len() <= whole + BLOCK
        });
        let rows = near.map(|(_, _, stored)| common(stored)).filter(|&n| n > whole).max().unwrap_or(whole);
        let states = (0..=query.len()).rev().find(|&end| is_certain(RecordKind::State, &query[..end]));
        (rows, states.unwrap_or(0))
    }
}

/// Records of a put: kind, start and end.
type Which = Vec<(RecordKind, usize, usize)>;

/// The same with their bytes.
type Batch = (Vec<NewRecord>, Which);

/// A put whose outcome is not known yet.
struct Waiting {
    handle: PutHandle,
    space: u8,
    tokens: Vec<u32>,
    which: Which,
    /// What lay damaged when it was made: it may count as stored, and be met and put aside before the outcome is looked at.
    damaged: Vec<Key>,
}

struct Run {
    random: Random,
    root: PathBuf,
    store: Option<PromptStore>,
    model: Model,
    prompts: Vec<(u8, Vec<u32>)>,
    waiting: Vec<Waiting>,
    /// Evicted since the store was opened, and gone since.
    n_evicted: u64,
    n_gone: u64,
    tally: BTreeMap<&'static str, u64>,
    asked: u64,
    hit: u64,
    /// The last things that happened, for a failure's report.
    history: VecDeque<String>,
}

impl Run {
    fn close(&mut self) {
        self.settle();
        // What was evicted is known to the store that did it.
        self.look_for_gone();
        self.store = None;
    }

    fn open(&mut self) {
        let path = Some(self.root.as_path());
        // Records of both forms lie in one folder.
        let compression = (self.random.below(2) == 0).then_some(Compression::Zstd);
        let options = Options { disk_bytes: Some(LIMIT), ram_bytes: 4 << 20, compression, ..options(path) };
        self.store = Some(PromptStore::open(options).unwrap());
        (self.n_evicted, self.n_gone) = (0, 0);
    }

    fn store(&self) -> &PromptStore {
        self.store.as_ref().unwrap()
    }

    /// Takes out of the model what was evicted, which is known by its absence; no more may be gone than were evicted.
    fn notice_eviction(&mut self) {
        let n_evicted = self.store().stats().n_evicted;
        if n_evicted != self.n_evicted {
            self.look_for_gone();
        }
    }

    fn look_for_gone(&mut self) {
        let listed = self.listed();
        // After the list: what is gone in it is counted then.
        let n_evicted = self.store().stats().n_evicted;
        let known: BTreeSet<Key> = listed.values().map(|(key, _)| key.clone()).collect();
        // What memory has too, after a put that failed, may have gone from the disk unseen.
        let in_memory = listed.into_values().filter(|(_, tier)| *tier == Tier::Ram);
        let in_memory: BTreeSet<Key> = in_memory.map(|(key, _)| key).collect();
        self.model.certain.retain(|key| !in_memory.contains(key));
        let (kept, gone): (BTreeSet<Key>, BTreeSet<Key>) =
            std::mem::take(&mut self.model.certain).into_iter().partition(|key| known.contains(key));
        self.n_gone += gone.len() as u64;
        self.note(format!(
            "{n_evicted} evicted, {} gone, {} of them now, {} kept",
            self.n_gone,
            gone.len(),
            kept.len()
        ));
        assert!(
            self.n_gone <= n_evicted,
            "{gone:?} are gone, {} since the start, {n_evicted} were evicted",
            self.n_gone
        );
        (self.model.certain, self.n_evicted) = (kept, n_evicted);
    }

    /// What is listed, by name, with all tokens from the first on; without what hangs on nothing.
    fn listed(&self) -> BTreeMap<String, (Key, Tier)> {
        let mut known: BTreeMap<String, (Key, Tier)> = BTreeMap::new();
        for Listed { record, parent, .. } in self.store().list() {
            let before = if record.start == 0 { Some(Vec::new()) } else { None };
            let before = before.or_else(|| known.get(&parent.to_string()).map(|((_, _, covered), _)| covered.clone()));
            let Some(mut covered) = before else { continue };
            covered.extend_from_slice(record.tokens());
            let n = (0..2).find(|n| space(*n) == *record.space()).unwrap();
            known.insert(record.id.to_string(), ((n, record.kind, covered), record.tier));
        }
        known
    }

    /// A prompt that shares its beginning with others.
    fn prompt(&mut self) -> (u8, Vec<u32>) {
        let fresh = self.prompts.is_empty() || self.random.below(6) == 0;
        let (n, mut tokens) = if fresh {
            (self.random.below(2) as u8, Vec::new())
        } else {
            let at = self.random.below(self.prompts.len());
            self.prompts[at].clone()
        };
        if !tokens.is_empty() && self.random.below(3) == 0 {
            tokens.truncate(self.random.below(tokens.len()));
        }
        let more = 1 + self.random.below(20);
        let first = self.random.below(3) as u32;
        tokens.extend((0..more as u32).map(|at| first + at % 3));
        tokens.truncate(60);
        (n, tokens)
    }

    fn batch(&mut self, n: u8, tokens: &[u32]) -> Batch {
        let mut records = rows(&space(n), tokens, 0, 200 + self.random.below(SIZE));
        if self.random.below(3) == 0 {
            let end = tokens.len();
            records.push(record(&space(n), tokens, RecordKind::State, end / BLOCK * BLOCK, end, 500));
        }
        let which = records.iter().map(|record| (record.kind, record.start, record.end)).collect();
        (records, which)
    }

    fn put(&mut self, wait: bool) {
        let (n, tokens) = self.prompt();
        let (records, which) = self.batch(n, &tokens);
        // Until it is acknowledged, what it goes on from may be gone or not.
        self.model.doubt(n, &tokens, &which);
        let handle = self.store().put(&space(n), &tokens, records);
        self.prompts.push((n, tokens.clone()));
        if self.prompts.len() > 60 {
            self.prompts.swap_remove(self.random.below(60));
        }
        let damaged = self.model.damaged.iter().map(|(_, key)| key.clone()).collect();
        self.waiting.push(Waiting { handle, space: n, tokens, which, damaged });
        if wait {
            self.settle();
        }
    }

    /// Waits for all puts; what they say to be durable must be found from now on.
    fn settle(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        // All of them first: what still waits in memory is found there, and may be let go of since a longer one is stored.
        let wait = |waiting: Waiting| (waiting.handle.wait(Some(Duration::from_secs(60))), waiting);
        let done: Vec<_> = waiting.into_iter().map(wait).collect();
        for (outcome, Waiting { space: n, tokens, which, damaged, .. }) in done {
            self.note(format!("put {n} {tokens:?} {outcome:?}"));
            match outcome {
                Ok(Some(report)) if report.is_durable => {
                    // A tail is not stored if a longer one is.
                    let is_stored = |&(kind, start, end): &(RecordKind, usize, usize)| {
                        let partials = self.store().find(&space(n), &tokens[..end]).partials;
                        kind == RecordKind::State
                            || end - start == BLOCK
                            || partials.first().is_none_or(|partial| partial.end == end)
                    };
                    let which: Vec<_> = which.into_iter().filter(is_stored).collect();
                    self.model.add(n, &tokens, &which);
                    for (n, kind, covered) in damaged {
                        self.model.lose(n, kind, &covered);
                    }
                }
                Ok(Some(_)) => {
                    self.model.doubt(n, &tokens, &which);
                    self.count("puts that stay in memory");
                }
                Ok(None) => panic!("no outcome in a minute"),
                Err(error) => {
                    self.model.doubt(n, &tokens, &which);
                    self.count("puts that fail");
                    assert!(error.to_string().contains("os error"), "{error}");
                }
            }
        }
        self.notice_eviction();
    }

    fn ask(&mut self) {
        let (n, mut query) =
            if self.prompts.is_empty() { (0, vec![1]) } else { self.random.pick(&self.prompts).clone() };
        if self.random.below(3) == 0 {
            query = self.prompt().1;
        }
        self.check(n, &query);
    }

    fn check(&mut self, n: u8, query: &[u32]) {
        let expected = self.model.expect(n, query);
        let (rows, state) = restore(self.store(), &space(n), query);
        self.asked += 1;
        self.hit += u64::from(rows > 0);
        self.notice_eviction();
        let still = self.model.expect(n, query);
        let expected = (expected.0.min(still.0), expected.1.min(still.1));
        assert!(rows >= expected.0 && state >= expected.1, "{query:?}: {rows}, {state} but {expected:?} is there");
        assert!(rows <= query.len() && state <= query.len());
    }

    fn step(&mut self) {
        let choice = self.random.below(100);
        self.note(format!("choice {choice}"));
        match choice {
            0..35 => self.put(true),
            35..45 => self.put(false),
            45..80 => self.ask(),
            80..83 => {
                self.settle();
                let (n, tokens) = self.prompt();
                self.store().pin(&space(n), &tokens).unwrap();
            }
            83..87 => {
                self.settle();
                for (n, tokens) in self.prompts.clone() {
                    self.store().unpin(&space(n), &tokens).unwrap();
                }
            }
            87..89 => {
                self.settle();
                let target = self.random.next() % LIMIT;
                self.store().prune(Some(target)).unwrap();
                self.notice_eviction();
            }
            89..91 => {
                self.settle();
                let repair = self.random.below(2) == 0;
                self.store().verify(repair).unwrap();
            }
            91..93 => {
                self.close();
                self.open();
                self.look_for_gone();
                self.count("restarts");
            }
            93..96 => self.damage_record(),
            96 => self.damage_index(),
            97 => self.leave_strays(),
            98 => self.fail(),
            _ => {
                if self.random.below(10) == 0 {
                    self.settle();
                    self.store().clear().unwrap();
                    self.model.certain.clear();
                }
            }
        }
        if self.waiting.is_empty() && self.random.below(16) == 0 {
            self.look_for_gone();
        }
        let size = folder_size(&self.root);
        assert!(size <= LIMIT, "{size} bytes");
    }

    fn note(&mut self, what: String) {
        self.history.push_back(what);
        if self.history.len() > 400 {
            self.history.pop_front();
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }
}

#[test]
#[expect(clippy::print_stdout, reason = "the hit rate is the result")]
fn random_operations_and_faults_give_no_wrong_hit_and_no_unexplained_miss() {
    let n_operations = env_number("MLXRS_STORE_OPERATIONS", 2_000);
    let seed = env_number("MLXRS_SEED", 20_251_126);
    let folder = tempdir().unwrap();
    let mut run = Run {
        random: Random(seed),
        root: folder.path().join("store"),
        store: None,
        model: Model::default(),
        prompts: Vec::new(),
        waiting: Vec::new(),
        n_evicted: 0,
        n_gone: 0,
        tally: BTreeMap::new(),
        asked: 0,
        hit: 0,
        history: VecDeque::new(),
    };
    run.open();
    for operation in 0..n_operations {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run.step()));
        if outcome.is_err() {
            eprintln!("{:#?}\n{:#?}", run.history, run.listed().into_values().collect::<Vec<_>>());
            eprintln!("{:?}\n{:?}", run.store().stats(), run.store().verify(false));
        }
        assert!(outcome.is_ok(), "operation {operation} of seed {seed}");
    }
    run.settle();
    let certain = run.model.certain.clone();
    for (n, kind, covered) in certain {
        if kind == RecordKind::Rows {
            run.check(n, &covered);
        }
    }
    let rate = 100.0 * run.hit as f64 / run.asked.max(1) as f64;
    println!("{n_operations} operations, seed {seed}: {} queries, {rate:.1} % hit, 0 wrong, 0 unexplained", run.asked);
    println!("{:?}", run.tally);
    assert!(rate > 30.0, "so few hits prove little");
}
