//! Savers killed in the middle: the target is always a whole old or new version, and the next save cleans up.
//!
//! `MLXRS_KILLS` sets the number of kills and `MLXRS_SEED` the seed, which is printed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use mlxrs_py::persist::atomic::{AtomicFile, Phase, set_probe};
use rustix::process::{Signal, getpid, kill_process};
use tempfile::tempdir;

use crate::atomic::temporaries;

const CHILD: &str = "MLXRS_KILL_CHILD";
const PIECES: usize = 8;
const SIGKILL: i32 = 9;

/// What a child last said it was doing: nothing yet, nothing between two saves, or a step.
const PHASES: [(Option<Phase>, &str); 10] = [
    (None, "starting"),
    (None, "idle"),
    (Some(Phase::Sweep), "sweep"),
    (Some(Phase::Create), "create"),
    (Some(Phase::Lock), "lock"),
    (Some(Phase::Write), "write"),
    (Some(Phase::Mode), "mode"),
    (Some(Phase::Sync), "sync"),
    (Some(Phase::Rename), "rename"),
    (Some(Phase::FolderSync), "folder sync"),
];
const IDLE: u8 = 1;

/// The steps at which children kill themselves, in turn; those with a temporary file first and more often.
const ON_PURPOSE: [Phase; 9] = [
    Phase::Write,
    Phase::Lock,
    Phase::Mode,
    Phase::Sync,
    Phase::Rename,
    Phase::Write,
    Phase::Create,
    Phase::FolderSync,
    Phase::Sweep,
];

fn code(phase: Phase) -> u8 {
    PHASES.iter().position(|&(known, _)| known == Some(phase)).unwrap() as u8
}

/// Splitmix64: small, and the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// The content of `version`: its number, bytes and a length that follow from it, and a hash over all of that.
fn content(version: u64) -> Vec<u8> {
    let mut random = Random(version);
    let block: Vec<u8> = (0..512).flat_map(|_| random.next().to_le_bytes()).collect();
    let mut bytes = version.to_le_bytes().to_vec();
    bytes.extend(block.repeat(40 + random.below(120) as usize));
    let hash = blake3::hash(&bytes);
    bytes.extend_from_slice(hash.as_bytes());
    bytes
}

/// The version that `target` holds, if it is whole.
fn version_of(target: &Path) -> Option<u64> {
    let bytes = fs::read(target).ok()?;
    let (content, hash) = bytes.split_last_chunk::<32>()?;
    let (version, _) = content.split_first_chunk::<8>()?;
    (blake3::hash(content) == *hash).then(|| u64::from_le_bytes(*version))
}

fn save(target: &Path, version: u64) -> mlxrs_py::Result<()> {
    let bytes = content(version);
    let mut file = AtomicFile::create(target)?;
    let size = bytes.len().div_ceil(PIECES);
    if version.is_multiple_of(2) {
        for piece in bytes.chunks(size) {
            file.write_all(piece)?;
        }
    } else {
        file.reserve(bytes.len() as u64)?;
        let pieces: Vec<_> = bytes.chunks(size).enumerate().collect();
        let write = |half: &[(usize, &[u8])]| {
            half.iter().try_for_each(|(at, piece)| {
                file.write_all_at(piece, (at * size) as u64)?;
                file.start_writeback((at * size) as u64, piece.len());
                mlxrs_py::Result::Ok(())
            })
        };
        thread::scope(|threads| {
            let halves: Vec<_> = pieces.chunks(PIECES / 2).map(|half| threads.spawn(move || write(half))).collect();
            halves.into_iter().try_for_each(|half| half.join().unwrap())
        })?;
    }
    file.commit(true)
}

fn env_number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// One byte for the phase and eight for the version being saved, in a file that outlives the child.
static STATUS: OnceLock<File> = OnceLock::new();
static VERSION: AtomicU64 = AtomicU64::new(0);
/// The phase at which this child kills itself, and how often it is passed before.
static LAST_PHASE: OnceLock<u8> = OnceLock::new();
static PASSES_LEFT: AtomicU32 = AtomicU32::new(0);

fn report(code: u8) {
    let mut status = [code; 9];
    status[1..].copy_from_slice(&VERSION.load(Ordering::Relaxed).to_le_bytes());
    STATUS.get().unwrap().write_all_at(&status, 0).unwrap();
}

fn report_and_maybe_die(phase: Phase) -> std::io::Result<()> {
    report(code(phase));
    if LAST_PHASE.get() == Some(&code(phase)) && PASSES_LEFT.fetch_sub(1, Ordering::Relaxed) == 0 {
        kill_process(getpid(), Signal::KILL)?;
    }
    Ok(())
}

/// What the parent tells a child: the folder, the first version to save, the phase to die at (0: none), the passes.
fn start_child(folder: &Path, version: u64, last_phase: u8, passes: u64) -> Child {
    let module = module_path!().split_once("::").unwrap().1;
    fs::write(folder.join("status"), [0; 9]).unwrap();
    Command::new(std::env::current_exe().unwrap())
        .arg(format!("{module}::a_child_saves_until_it_is_killed"))
        .args(["--exact", "--nocapture"])
        .env(CHILD, format!("{version} {last_phase} {passes}"))
        .current_dir(folder)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_child_saves_until_it_is_killed() {
    let Ok(orders) = std::env::var(CHILD) else { return };
    let orders: Vec<u64> = orders.split(' ').map(|number| number.parse().unwrap()).collect();
    let [first, last_phase, passes] = orders[..] else { panic!("{orders:?}") };
    STATUS.set(File::options().write(true).open("status").unwrap()).unwrap();
    LAST_PHASE.set(last_phase as u8).unwrap();
    PASSES_LEFT.store(passes as u32, Ordering::Relaxed);
    assert!(set_probe(report_and_maybe_die));
    // Bounded, so that a child whose parent is gone ends by itself.
    for version in first..first + 5_000 {
        VERSION.store(version, Ordering::Relaxed);
        save(Path::new("saved/x.safetensors"), version).unwrap();
        report(IDLE);
    }
}

/// The phase and version in the status file.
fn read_status(folder: &Path) -> (u8, u64) {
    let status = fs::read(folder.join("status")).unwrap();
    (status[0], u64::from_le_bytes(status[1..].try_into().unwrap()))
}

#[derive(Clone, Copy, Default)]
struct Row {
    kills: u64,
    with_temporary: u64,
    old: u64,
    new: u64,
}

#[test]
#[expect(clippy::print_stdout, reason = "the table is the result")]
fn a_killed_saver_leaves_a_whole_file_and_the_next_save_no_stray() {
    let n_kills = env_number("MLXRS_KILLS", 60);
    let seed = env_number("MLXRS_SEED", 20_251_123);
    let mut random = Random(seed);
    let folder = tempdir().unwrap();
    let saved = folder.path().join("saved");
    let target = saved.join("x.safetensors");
    fs::create_dir(&saved).unwrap();
    save(&target, 1).unwrap();
    let mut version = 1;
    let mut table = [Row::default(); PHASES.len()];
    for kill in 0..n_kills {
        // Two of three children kill themselves at a chosen step, the third is killed at any moment.
        let on_purpose = (kill % 3 != 2).then(|| ON_PURPOSE[(kill - kill / 3) as usize % ON_PURPOSE.len()]);
        let passes = random.below(if on_purpose == Some(Phase::Write) { 3 * PIECES as u64 } else { 3 });
        let mut child = start_child(folder.path(), version + 1, on_purpose.map_or(0, code), passes);
        if on_purpose.is_none() {
            while read_status(folder.path()).0 == 0 && child.try_wait().unwrap().is_none() {
                thread::sleep(Duration::from_micros(100));
            }
            thread::sleep(Duration::from_micros(random.below(20_000)));
            child.kill().unwrap();
        }
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(SIGKILL), "kill {kill} of seed {seed}: {status}");

        let (phase, saving) = read_status(folder.path());
        let found = version_of(&target).unwrap_or_else(|| panic!("kill {kill} of seed {seed}: the target is damaged"));
        let is_expected = match PHASES[phase as usize] {
            (_, "idle" | "folder sync") => found == saving,
            (Some(Phase::Rename), _) if on_purpose.is_none() => found == saving || found == saving - 1,
            _ => found == saving - 1,
        };
        assert!(is_expected, "kill {kill} of seed {seed}: version {found} while {saving} was at step {phase}");
        let row = &mut table[phase as usize];
        row.kills += 1;
        row.with_temporary += u64::from(!temporaries(&saved).is_empty());
        *(if found == saving { &mut row.new } else { &mut row.old }) += 1;

        version = saving + 1;
        save(&target, version).unwrap();
        assert_eq!(version_of(&target), Some(version));
        let left: Vec<_> = fs::read_dir(&saved).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["x.safetensors"], "kill {kill} of seed {seed}: strays");
    }
    let with_temporary: u64 = table.iter().map(|row| row.with_temporary).sum();
    println!("{n_kills} kills, seed {seed}: {with_temporary} while a temporary file existed, 0 damaged, 0 strays");
    println!("{:<12} {:>6} {:>15} {:>4} {:>4}", "step", "kills", "with temporary", "old", "new");
    for (row, (_, name)) in table.iter().zip(PHASES) {
        println!("{name:<12} {:>6} {:>15} {:>4} {:>4}", row.kills, row.with_temporary, row.old, row.new);
    }
    assert!(with_temporary * 10 >= n_kills * 3, "only {with_temporary} of {n_kills} kills met a temporary file");
    for phase in ON_PURPOSE.iter().take(n_kills as usize / 2) {
        assert!(table[code(*phase) as usize].kills > 0, "no kill at {phase:?}");
    }
}
