//! Saves are whole or have not happened: the writer of files on healthy, odd and failing systems.

mod faults;
mod parallel;
mod savers;
mod sweep;

use std::cell::RefCell;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use mlxrs_py::persist::atomic::{AtomicFile, Phase, effective_safetensors_path, set_probe};
use mlxrs_py::{Error, Result};
use rustix::fs::{FlockOperation, Mode, flock};
use tempfile::tempdir;

/// Exit code of a child that did all of its part; libtest's own codes are 0 and 101.
const DONE: i32 = 42;
const PART: &str = "MLXRS_TEST_PART";
const PLACE: &str = "MLXRS_TEST_PLACE";

pub fn save(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    for piece in bytes.chunks(bytes.len().div_ceil(3).max(1)) {
        file.write_all(piece)?;
    }
    file.commit(true)
}

/// The pattern of temporary names, said a second time.
pub fn is_temporary(name: &OsStr) -> bool {
    let Some(name) = name.as_bytes().strip_prefix(b".") else { return false };
    let mut parts: Vec<_> = name.rsplitn(5, |&byte| byte == b'.').collect();
    parts.reverse();
    matches!(parts[..], [target, process, random, b"tmp", b"safetensors"]
        if !target.is_empty()
            && !process.is_empty() && process.len() <= 10 && process.iter().all(u8::is_ascii_digit)
            && random.len() == 16 && random.iter().all(|byte| byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase()))
}

pub fn names(folder: &Path) -> Vec<OsString> {
    let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

pub fn temporaries(folder: &Path) -> Vec<PathBuf> {
    names(folder).into_iter().filter(|name| is_temporary(name)).map(|name| folder.join(name)).collect()
}

fn mode_of(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// The system's error number; checks that the error names `target`.
fn errno_at(target: &Path, result: Result<impl Sized>) -> Option<i32> {
    match result.err() {
        Some(Error::Io { path, source, .. }) if path == target => source.raw_os_error(),
        other => panic!("{other:?} instead of an I/O error of {}", target.display()),
    }
}

fn raw(errno: rustix::io::Errno) -> Option<i32> {
    Some(errno.raw_os_error())
}

type Probe = Box<dyn FnMut(Phase) -> io::Result<()>>;

thread_local! {
    static PROBE: RefCell<Option<Probe>> = const { RefCell::new(None) };
}

/// Runs `body` with `probe` called before each step of this thread's saves.
fn probed<T>(probe: impl FnMut(Phase) -> io::Result<()> + 'static, body: impl FnOnce() -> T) -> T {
    fn dispatch(phase: Phase) -> io::Result<()> {
        let Some(mut probe) = PROBE.take() else { return Ok(()) };
        let result = probe(phase);
        PROBE.set(Some(probe));
        result
    }
    let _is_first = set_probe(dispatch);
    PROBE.set(Some(Box::new(probe)));
    let result = body();
    PROBE.set(None);
    result
}

/// Runs `act` once, before the first step `phase` of this thread's saves in `body`.
fn at<T>(phase: Phase, act: impl FnOnce() + 'static, body: impl FnOnce() -> T) -> T {
    let mut act = Some(act);
    let probe = move |reached| {
        if reached == phase
            && let Some(act) = act.take()
        {
            act();
        }
        Ok(())
    };
    probed(probe, body)
}

/// Runs `body` with every step `phase` of this thread's saves failing with `errno`.
fn failing<T>(phase: Phase, errno: rustix::io::Errno, body: impl FnOnce() -> T) -> T {
    probed(move |reached| if reached == phase { Err(errno.into()) } else { Ok(()) }, body)
}

/// This test binary, as a child of `launcher` (or of this process) that plays `part` in `place`.
fn child(launcher: &[&str], part: &str, place: &Path) -> Command {
    let module = module_path!().split_once("::").unwrap().1;
    let test = format!("{module}::a_child_process_plays_its_part_and_then_says_done");
    let this = std::env::current_exe().unwrap();
    let mut command = match launcher {
        [] => Command::new(this),
        [program, args @ ..] => {
            let mut command = Command::new(program);
            command.args(args).arg(this);
            command
        }
    };
    command.args([&test, "--exact", "--nocapture"]).env(PART, part).env(PLACE, place).stdout(Stdio::piped());
    command
}

fn assert_done(output: &Output) {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(DONE), "{out}\n{err}");
}

#[test]
fn a_child_process_plays_its_part_and_then_says_done() {
    let (Some(part), Some(place)) = (std::env::var_os(PART), std::env::var_os(PLACE)) else { return };
    let place = Path::new(&place);
    match part.to_str().unwrap() {
        "umask" => save_under_a_umask(place),
        "file size" => faults::save_under_a_file_size_limit(place),
        "full disk" => faults::save_to_a_full_disk(place),
        "threads" => parallel::save_with_a_fault_in_each_write(place),
        "saver" => savers::save_again_and_again(place),
        other => panic!("no part {other}"),
    }
    std::process::exit(DONE);
}

#[test]
fn the_effective_path_ends_with_safetensors() {
    let effective = |path: &str| effective_safetensors_path(Path::new(path));
    assert_eq!(effective("x.safetensors"), Path::new("x.safetensors"));
    assert_eq!(effective("x"), Path::new("x.safetensors"));
    assert_eq!(effective("a.b/x.bin"), Path::new("a.b/x.bin.safetensors"));
    assert_eq!(effective("x.SAFETENSORS"), Path::new("x.SAFETENSORS.safetensors"));
    assert_eq!(effective("x.safetensors.old"), Path::new("x.safetensors.old.safetensors"));
    let not_utf8 = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
    assert_eq!(effective_safetensors_path(&not_utf8(b"\xFFx")), not_utf8(b"\xFFx.safetensors"));
    assert_eq!(effective_safetensors_path(&not_utf8(b"\xFF.safetensors")), not_utf8(b"\xFF.safetensors"));
}

#[test]
fn a_save_makes_a_file_and_the_next_one_replaces_it() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    for bytes in [&b"first"[..], b"", b"a third and longer one"] {
        save(&target, bytes).unwrap();
        assert_eq!(fs::read(&target).unwrap(), bytes);
        assert_eq!(names(folder.path()), ["x.safetensors"]);
    }
}

#[test]
fn a_save_that_need_not_be_durable_is_whole_and_syncs_nothing() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    let save = || {
        let mut file = AtomicFile::create(&target)?;
        file.write_all(b"bytes")?;
        file.commit(false)
    };
    let no_sync = |phase| {
        assert!(!matches!(phase, Phase::Sync | Phase::FolderSync));
        Ok(())
    };
    probed(no_sync, save).unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"bytes");
}

#[test]
fn the_target_changes_only_at_the_commit_and_not_at_all_without_one() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    save(&target, b"old").unwrap();
    let mut file = AtomicFile::create(&target).unwrap();
    file.write_all(b"new").unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"old");
    drop(file);
    assert_eq!(fs::read(&target).unwrap(), b"old");
    assert_eq!(names(folder.path()), ["x.safetensors"]);
}

#[test]
fn the_temporary_file_lies_beside_the_target_under_its_pattern_and_locked() {
    let folder = tempdir().unwrap();
    let mut file = AtomicFile::create(&folder.path().join("x.safetensors")).unwrap();
    file.write_all(b"new").unwrap();
    let [temp] = &temporaries(folder.path())[..] else { panic!("not one temporary: {:?}", names(folder.path())) };
    let start = format!(".x.safetensors.{}.", std::process::id());
    assert!(temp.file_name().unwrap().to_str().unwrap().starts_with(&start), "{temp:?}");
    assert_eq!(fs::read(temp).unwrap(), b"new");
    let other = fs::File::open(temp).unwrap();
    assert_eq!(flock(&other, FlockOperation::NonBlockingLockExclusive), Err(rustix::io::Errno::WOULDBLOCK));
}

#[test]
fn a_name_of_255_bytes_is_saved_and_its_temporary_ends_at_a_whole_character() {
    for letter in ["x", "é", "€", "🦀"] {
        for length in [200, 212, 213, 214, 215, 216, 255 - 12] {
            let folder = tempdir().unwrap();
            let name =
                format!("{}.safetensors", "y".repeat(length % letter.len()) + &letter.repeat(length / letter.len()));
            let file = AtomicFile::create(&folder.path().join(&name)).unwrap();
            let temp = temporaries(folder.path()).pop().unwrap();
            let temp = temp.file_name().unwrap().to_str().expect("characters are whole");
            assert!(temp.len() <= 255, "{}", temp.len());
            file.commit(true).unwrap();
            assert_eq!(names(folder.path()), [OsStr::new(&name)]);
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_name_that_is_not_utf8_is_saved() {
    let folder = tempdir().unwrap();
    let target = folder.path().join(OsStr::from_bytes(b"\xFF\x80\xC0.safetensors"));
    save(&target, b"bytes").unwrap();
    assert_eq!(fs::read(target).unwrap(), b"bytes");
}

#[test]
fn a_link_is_followed_and_the_file_it_points_to_is_replaced_in_its_own_folder() {
    let folder = tempdir().unwrap();
    let real = folder.path().join("real");
    fs::create_dir(&real).unwrap();
    let target = folder.path().join("x.safetensors");
    symlink("real/../second", &target).unwrap();
    symlink(real.join("file"), folder.path().join("second")).unwrap();
    fs::write(real.join("file"), b"old").unwrap();
    let mut file = AtomicFile::create(&target).unwrap();
    assert_eq!((temporaries(folder.path()).len(), temporaries(&real).len()), (0, 1));
    file.write_all(b"new").unwrap();
    file.commit(true).unwrap();
    assert_eq!(fs::read_link(&target).unwrap(), Path::new("real/../second"));
    assert!(fs::symlink_metadata(real.join("file")).unwrap().is_file());
    assert_eq!(fs::read(&target).unwrap(), b"new");
    assert_eq!(names(&real), ["file"]);
}

#[test]
fn a_link_to_nothing_makes_the_file_it_points_to() {
    let folder = tempdir().unwrap();
    fs::create_dir(folder.path().join("real")).unwrap();
    let target = folder.path().join("x.safetensors");
    symlink("real/file", &target).unwrap();
    save(&target, b"new").unwrap();
    assert!(fs::symlink_metadata(&target).unwrap().is_symlink());
    assert_eq!(fs::read(folder.path().join("real/file")).unwrap(), b"new");
}

#[test]
fn a_new_file_gets_the_mode_of_the_umask() {
    let folder = tempdir().unwrap();
    assert_done(&child(&[], "umask", folder.path()).output().unwrap());
}

fn save_under_a_umask(folder: &Path) {
    for (mask, expected) in [(0o000, 0o666), (0o022, 0o644), (0o027, 0o640), (0o077, 0o600)] {
        rustix::process::umask(Mode::from_raw_mode(mask));
        let target = folder.join(format!("{mask}.safetensors"));
        save(&target, b"bytes").unwrap();
        assert_eq!(mode_of(&target), expected);
    }
}

#[test]
fn a_replaced_file_hands_on_its_mode_and_its_temporary_is_never_more_open() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    save(&target, b"old").unwrap();
    for mode in [0o600, 0o640, 0o664, 0o666, 0o444, 0o755] {
        set_mode(&target, mode);
        let file = AtomicFile::create(&target).unwrap();
        let temp = temporaries(folder.path()).pop().unwrap();
        assert_eq!(mode_of(&temp) & !(mode | 0o600), 0, "{mode:o}");
        file.commit(true).unwrap();
        assert_eq!(mode_of(&target), mode);
    }
}

#[test]
fn a_replaced_file_hands_on_its_owner() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    save(&target, b"old").unwrap();
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&target, Some(65_534), Some(65_533)).unwrap();
    }
    let owner = |path| fs::metadata(path).map(|file| (file.uid(), file.gid())).unwrap();
    let before = owner(&target);
    save(&target, b"new").unwrap();
    assert_eq!(owner(&target), before);
}

/// Runs `body` in a thread with no rights beyond those of a user, who is in `groups` and owns `folder`.
#[cfg(target_os = "linux")]
fn as_a_user(folder: &Path, groups: &[u32], body: impl FnOnce() + Send) {
    use rustix::fs::{Gid, Uid};

    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        std::os::unix::fs::chown(folder, Some(65_534), Some(65_534)).unwrap();
    }
    let groups: Vec<_> = groups.iter().map(|&group| Gid::from_raw(group)).collect();
    let user = || {
        if is_root {
            rustix::thread::set_thread_groups(&groups).unwrap();
            rustix::thread::set_thread_gid(Gid::from_raw(65_534)).unwrap();
            rustix::thread::set_thread_uid(Uid::from_raw(65_534)).unwrap();
        }
        body();
    };
    std::thread::scope(|threads| threads.spawn(user).join().unwrap());
}

#[cfg(target_os = "linux")]
#[test]
fn a_folder_that_takes_files_but_cannot_be_listed_is_saved_to() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    set_mode(folder.path(), 0o300);
    as_a_user(folder.path(), &[], || {
        assert_eq!(fs::read_dir(folder.path()).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        save(&target, b"old").unwrap();
        save(&target, b"new").unwrap();
    });
    set_mode(folder.path(), 0o700);
    assert_eq!(fs::read(&target).unwrap(), b"new");
    assert_eq!(names(folder.path()), ["x.safetensors"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_group_is_kept_where_that_is_allowed_and_else_hands_its_rights_to_no_other_group() {
    let is_root = rustix::process::geteuid().is_root();
    for (groups, kept_mode) in [(&[65_533][..], 0o664), (&[], 0o644)] {
        let folder = tempdir().unwrap();
        let target = folder.path().join("x.safetensors");
        save(&target, b"old").unwrap();
        set_mode(&target, 0o664);
        if is_root {
            std::os::unix::fs::chown(&target, None, Some(65_533)).unwrap();
        }
        let group = fs::metadata(&target).unwrap().gid();
        as_a_user(folder.path(), groups, || save(&target, b"new").unwrap());
        let saved = fs::metadata(&target).unwrap();
        // Without root the file was the user's own, and its group is kept either way.
        let expected = if is_root { kept_mode } else { 0o664 };
        assert_eq!((saved.gid() == group, mode_of(&target)), (expected == 0o664, expected));
    }
}
