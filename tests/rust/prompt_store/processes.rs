//! Several processes on one store, killed at random.
//!
//! `MLXRS_STORE_SECONDS` sets for how long, `MLXRS_SEED` which prompts and when.

use super::common::*;
use mlxrs_py::store::prompt_store::{Options, PromptStore, RecordKind, Step, set_probe};
use rustix::process::{Pid, Signal, getpid, kill_process};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::{tempdir, tempdir_in};

const CHILD: &str = "MLXRS_STORE_CHILD";
const LIMIT: u64 = 6 << 20;
const SIGKILL: i32 = 9;
const N_CHILDREN: usize = 8;

/// The step at which this child kills itself, and how often it is passed before.
static LAST_STEP: OnceLock<Step> = OnceLock::new();
static PASSES_LEFT: AtomicU32 = AtomicU32::new(0);

const STEPS: [Step; 8] =
    [Step::Reserve, Step::Unlink, Step::Create, Step::Write, Step::Sync, Step::Rename, Step::FolderSync, Step::Index];

fn maybe_die(step: Step, _root: &Path) -> io::Result<()> {
    if LAST_STEP.get() == Some(&step) && PASSES_LEFT.fetch_sub(1, Ordering::Relaxed) == 0 {
        kill_process(getpid(), Signal::KILL)?;
    }
    Ok(())
}

fn open_limited(path: &Path) -> PromptStore {
    PromptStore::open(Options { disk_bytes: Some(LIMIT), ram_bytes: 1 << 20, ..options(Some(path)) }).unwrap()
}

/// One of a few prompts that share their beginnings.
fn prompt(random: &mut Random) -> (u8, Vec<u32>) {
    let branches: Vec<_> = (0..=random.below(3)).map(|_| (random.below(3) as u32, 5 + random.below(14))).collect();
    (random.below(2) as u8, tokens(&branches))
}

#[test]
fn a_child_uses_the_store_until_it_is_killed() {
    let Ok(orders) = std::env::var(CHILD) else { return };
    let orders: Vec<u64> = orders.split(' ').map(|number| number.parse().unwrap()).collect();
    let [seed, step, passes, seconds] = orders[..] else { panic!("{orders:?}") };
    if let Some(step) = STEPS.get(step as usize) {
        LAST_STEP.set(*step).unwrap();
        PASSES_LEFT.store(passes as u32, Ordering::Relaxed);
        assert!(set_probe(maybe_die));
    }
    let mut random = Random(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut store = open_limited(Path::new("store"));
    while Instant::now() < end {
        let (n, tokens) = prompt(&mut random);
        match random.below(40) {
            0 => {
                drop(store);
                store = open_limited(Path::new("store"));
            }
            1 => drop(store.prune(Some(random.next() % LIMIT)).unwrap()),
            2 => drop(store.pin(&space(n), &tokens).unwrap()),
            3 => drop(store.unpin(&space(n), &tokens).unwrap()),
            4..20 => {
                let mut records = rows(&space(n), &tokens, 0, 100 + random.below(12_000));
                let end = tokens.len();
                records.push(record(&space(n), &tokens, RecordKind::State, end / BLOCK * BLOCK, end, 300));
                let handle = store.put(&space(n), &tokens, records);
                if random.below(2) == 0 {
                    assert!(handle.wait(Some(Duration::from_secs(60))).unwrap().is_some());
                }
            }
            _ => read(&store, n, &tokens),
        }
    }
}

/// Nobody damages anything here: whatever opens has the right bytes.
fn read(store: &PromptStore, n: u8, tokens: &[u32]) {
    let found = store.find(&space(n), tokens);
    let records = all(&found);
    for (info, open) in records.iter().zip(store.open_records(&records)) {
        if let Some(open) = open {
            assert!(check(&space(n), tokens, info, &open), "a corrupt record is served");
        }
    }
    assert_eq!(store.stats().n_quarantined, 0);
}

/// Sizes of the store's parts while nobody changes them: who looks around meanwhile counts a renamed file twice.
fn sizes_at_once(children: &[Child], root: &Path) -> Vec<(OsString, u64)> {
    let signal = |signal| {
        for child in children {
            // Refused for one that has just ended, which changes nothing either.
            let _ = kill_process(Pid::from_child(child), signal);
        }
    };
    signal(Signal::STOP);
    #[cfg(target_os = "linux")]
    while children.iter().any(is_running) {
        thread::yield_now();
    }
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| (entry.file_name(), size_of(&entry.path()))).collect();
    signal(Signal::CONT);
    sizes
}

/// Whether any thread of `child` has neither ended nor heard that it has to stop.
#[cfg(target_os = "linux")]
fn is_running(child: &Child) -> bool {
    let threads = fs::read_dir(format!("/proc/{}/task", child.id())).into_iter().flatten().flatten();
    let states = threads.filter_map(|thread| fs::read_to_string(thread.path().join("stat")).ok());
    // The state stands behind the name, which may hold anything.
    let mut states = states.filter_map(|stat| stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()));
    states.any(|state| !matches!(state, 'T' | 'Z' | 'X'))
}

fn start_child(folder: &Path, random: &mut Random, seconds: u64) -> Child {
    let module = module_path!().split_once("::").unwrap().1;
    // Every other child dies at a step of its own choice.
    let step = if random.below(2) == 0 { random.below(STEPS.len()) } else { STEPS.len() };
    Command::new(std::env::current_exe().unwrap())
        .arg(format!("{module}::a_child_uses_the_store_until_it_is_killed"))
        .args(["--exact", "--nocapture"])
        .env(CHILD, format!("{} {step} {} {seconds}", random.next() >> 1, random.below(40)))
        .env("RUST_BACKTRACE", "0")
        .current_dir(folder)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
#[expect(clippy::print_stdout, reason = "the counts are the result")]
fn processes_that_are_killed_leave_a_store_in_order() {
    let seconds = env_number("MLXRS_STORE_SECONDS", 15);
    let seed = env_number("MLXRS_SEED", 20_251_126);
    let mut random = Random(seed);
    // In memory, where there is such a place: nothing waits for a disk there, so more happens at once.
    let ram = Path::new("/dev/shm");
    let folder = if ram.is_dir() { tempdir_in(ram) } else { tempdir() }.unwrap();
    let root = folder.path().join("store");
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut children: Vec<_> = (0..N_CHILDREN).map(|_| start_child(folder.path(), &mut random, seconds)).collect();
    let (mut n_kills, mut n_deaths, mut largest) = (0, 0, 0);
    while Instant::now() < end {
        thread::sleep(Duration::from_millis(20 + random.next() % 200));
        if random.below(3) == 0 {
            n_kills += 1;
            let at = random.below(N_CHILDREN);
            children[at].kill().unwrap();
        }
        for child in &mut children {
            if let Some(status) = child.try_wait().unwrap() {
                // One that is at its end goes by itself; none may fail.
                assert!(status.signal() == Some(SIGKILL) || status.success(), "seed {seed}: {status}");
                n_deaths += 1;
                *child = start_child(folder.path(), &mut random, seconds);
            }
        }
        let parts = sizes_at_once(&children, &root);
        let size = parts.iter().map(|(_, size)| size).sum();
        assert!(size <= LIMIT, "seed {seed}: {size} bytes, {parts:?}");
        largest = largest.max(size);
    }
    for child in &mut children {
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert!(status.signal() == Some(SIGKILL) || status.success(), "seed {seed}: {status}");
    }
    let store = open_limited(&root);
    assert_eq!(fs::read_dir(root.join("tmp")).unwrap().count(), 0, "temporary files");
    assert_eq!(fs::read_dir(root.join("owners")).unwrap().count(), 1, "locks");
    assert_eq!(store.verify(false).unwrap().faults, Vec::<String>::new());
    let stats = store.stats();
    assert_eq!(stats.n_rebuilds, 0);
    assert_eq!(fs::read_dir(root.join("records")).unwrap().count() as u64, stats.disk_records, "strays");
    assert!(folder_size(&root) <= LIMIT);
    println!(
        "{seconds} s, seed {seed}: {N_CHILDREN} processes at a time, {n_deaths} died, {n_kills} of them killed from outside,"
    );
    println!("at most {largest} of {LIMIT} bytes, {} records at the end, 0 wrong, 0 strays", stats.disk_records);
    assert!(stats.disk_records > 0);
}
