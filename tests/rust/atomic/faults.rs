//! Saves that fail leave the old file, or nothing, and no temporary. All ways work for root too.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use mlxrs_py::persist::atomic::{AtomicFile, Phase};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};
use tempfile::{TempDir, tempdir};

use super::{assert_done, at, child, errno_at, failing, names, raw, save};

const BEFORE_THE_RENAME: [Phase; 6] =
    [Phase::Create, Phase::Lock, Phase::Write, Phase::Mode, Phase::Sync, Phase::Rename];

fn old_file() -> (TempDir, PathBuf) {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    save(&target, b"old").unwrap();
    (folder, target)
}

#[test]
fn a_fault_at_any_step_keeps_the_old_file_and_leaves_no_temporary() {
    for phase in BEFORE_THE_RENAME {
        for errno in [Errno::NOSPC, Errno::DQUOT, Errno::IO, Errno::PERM] {
            let (folder, target) = old_file();
            let result = failing(phase, errno, || save(&target, b"new"));
            assert_eq!(errno_at(&target, result), raw(errno), "{phase:?}");
            assert_eq!(fs::read(&target).unwrap(), b"old", "{phase:?}");
            assert_eq!(names(folder.path()), ["x.safetensors"], "{phase:?}");
        }
    }
}

#[test]
fn a_fault_at_any_step_of_a_first_save_leaves_nothing_in_the_folder() {
    for phase in BEFORE_THE_RENAME {
        let folder = tempdir().unwrap();
        let target = folder.path().join("x.safetensors");
        let result = failing(phase, Errno::NOSPC, || save(&target, b"new"));
        assert_eq!(errno_at(&target, result), raw(Errno::NOSPC));
        assert_eq!(names(folder.path()).len(), 0, "{phase:?}");
    }
}

#[test]
fn a_folder_that_cannot_be_synced_is_an_error_with_the_new_file_in_place() {
    let (folder, target) = old_file();
    let result = failing(Phase::FolderSync, Errno::IO, || save(&target, b"new"));
    assert_eq!(errno_at(&target, result), raw(Errno::IO));
    assert_eq!(fs::read(&target).unwrap(), b"new");
    assert_eq!(names(folder.path()), ["x.safetensors"]);
}

#[test]
fn a_file_system_without_locks_is_saved_to() {
    for errno in [Errno::NOLCK, Errno::OPNOTSUPP, Errno::NOSYS] {
        let (folder, target) = old_file();
        failing(Phase::Lock, errno, || save(&target, b"new")).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["x.safetensors"]);
    }
}

#[test]
fn a_folder_as_target_is_an_error_and_stays_as_it_is() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("inside"), b"old").unwrap();
    let link = folder.path().join("link.safetensors");
    symlink("x.safetensors/.", &link).unwrap();
    for target in [&target, &link] {
        assert_eq!(errno_at(target, AtomicFile::create(target)), raw(Errno::ISDIR), "before a byte is written");
        assert_eq!(errno_at(target, save(target, b"new")), raw(Errno::ISDIR));
        assert_eq!(names(folder.path()), ["link.safetensors", "x.safetensors"]);
    }
    assert_eq!(fs::read(target.join("inside")).unwrap(), b"old");
}

#[test]
fn a_target_that_becomes_a_folder_during_the_save_fails_the_rename() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    let make_folder = {
        let target = target.clone();
        move || fs::create_dir(target).unwrap()
    };
    let result = at(Phase::Rename, make_folder, || save(&target, b"new"));
    assert_eq!(errno_at(&target, result), raw(Errno::ISDIR));
    assert_eq!(names(folder.path()), ["x.safetensors"]);
    assert_eq!(names(&target).len(), 0);
}

#[test]
fn a_special_file_is_never_replaced() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    assert!(Command::new("mkfifo").arg(&target).status().unwrap().success());
    assert_eq!(errno_at(&target, save(&target, b"new")), raw(Errno::OPNOTSUPP));
    let link = folder.path().join("null.safetensors");
    symlink("/dev/null", &link).unwrap();
    assert_eq!(errno_at(&link, save(&link, b"new")), raw(Errno::OPNOTSUPP));
    assert_eq!(names(folder.path()), ["null.safetensors", "x.safetensors"]);
}

#[test]
fn links_that_loop_are_an_error() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    symlink("y", &target).unwrap();
    symlink("x.safetensors", folder.path().join("y")).unwrap();
    assert_eq!(errno_at(&target, save(&target, b"new")), raw(Errno::LOOP));
    assert_eq!(names(folder.path()), ["x.safetensors", "y"]);
}

#[test]
fn a_missing_folder_or_a_name_that_is_no_name_is_an_error() {
    let folder = tempdir().unwrap();
    let missing = folder.path().join("missing/x.safetensors");
    assert_eq!(errno_at(&missing, save(&missing, b"new")), raw(Errno::NOENT));
    let long = folder.path().join("x".repeat(256));
    assert_eq!(errno_at(&long, save(&long, b"new")), raw(Errno::NAMETOOLONG));
    let slash = folder.path().join("x/");
    assert_eq!(errno_at(&slash, save(&slash, b"new")), raw(Errno::ISDIR));
    assert_eq!(names(folder.path()).len(), 0);
}

#[test]
fn a_folder_removed_during_the_save_is_an_error() {
    for phase in [Phase::Sweep, Phase::Create, Phase::Lock, Phase::Write, Phase::Mode, Phase::Sync, Phase::Rename] {
        let folder = tempdir().unwrap();
        let inner = folder.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let target = inner.join("x.safetensors");
        let result = at(phase, move || fs::remove_dir_all(inner).unwrap(), || save(&target, b"new"));
        assert_eq!(errno_at(&target, result), raw(Errno::NOENT), "{phase:?}");
        assert_eq!(names(folder.path()).len(), 0);
    }
}

#[test]
fn a_folder_moved_away_during_the_save_is_an_error_and_no_other_folder_is_written() {
    for (is_replaced, expected) in [(false, Errno::NOENT), (true, Errno::STALE)] {
        let folder = tempdir().unwrap();
        let [inner, moved] = ["inner", "moved"].map(|name| folder.path().join(name));
        fs::create_dir(&inner).unwrap();
        let target = inner.join("x.safetensors");
        save(&target, b"old").unwrap();
        let act = {
            let (inner, moved) = (inner.clone(), moved.clone());
            move || {
                fs::rename(&inner, moved).unwrap();
                if is_replaced {
                    fs::create_dir(&inner).unwrap();
                }
            }
        };
        let result = at(Phase::Write, act, || save(&target, b"new"));
        assert_eq!(errno_at(&target, result), raw(expected));
        assert_eq!(names(&moved), ["x.safetensors"]);
        assert_eq!(fs::read(moved.join("x.safetensors")).unwrap(), b"old");
        assert!(!is_replaced || names(&inner).is_empty());
    }
}

#[test]
fn a_link_turned_elsewhere_during_the_save_is_an_error() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    symlink("first", &target).unwrap();
    let file = AtomicFile::create(&target).unwrap();
    fs::remove_file(&target).unwrap();
    symlink("second", &target).unwrap();
    assert_eq!(errno_at(&target, file.commit(true)), raw(Errno::STALE));
    assert_eq!(names(folder.path()), ["x.safetensors"]);
}

#[test]
fn a_file_size_limit_keeps_the_old_file() {
    let (folder, target) = old_file();
    // The limit's signal would end the child; a shell can have it ignored, safe Rust cannot.
    let launcher = ["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"];
    assert_done(&child(&launcher, "file size", &target).output().unwrap());
    assert_eq!(fs::read(&target).unwrap(), b"old");
    assert_eq!(names(folder.path()), ["x.safetensors"]);
}

pub fn save_under_a_file_size_limit(target: &Path) {
    setrlimit(Resource::Fsize, Rlimit { current: Some(30_000), maximum: Some(30_000) }).unwrap();
    assert_eq!(errno_at(target, save(target, &[1; 131_365])), raw(Errno::FBIG));
    assert_eq!(names(target.parent().unwrap()), ["x.safetensors"]);
}

#[test]
#[expect(clippy::print_stdout, reason = "says what the system allowed")]
fn a_full_disk_keeps_the_old_file() {
    let (folder, target) = old_file();
    let result = failing(Phase::Write, Errno::NOSPC, || save(&target, b"new"));
    assert_eq!(errno_at(&target, result), raw(Errno::NOSPC));
    assert_eq!(fs::read(&target).unwrap(), b"old");

    // A really full one as well, wherever the system lends one: to root, or in a user namespace.
    let mount = "mount -t tmpfs -o size=256k none \"$MLXRS_TEST_PLACE\" || exit 77; exec \"$@\"";
    let is_lent = ["-m", "-rm"].into_iter().any(|namespaces| {
        let output = child(&["unshare", namespaces, "sh", "-c", mount, "sh"], "full disk", folder.path()).output();
        let Ok(output) = output else { return false };
        // 1: unshare itself is refused; 77: the mount is.
        let is_refused = matches!(output.status.code(), Some(1 | 77));
        if !is_refused {
            assert_done(&output);
        }
        !is_refused
    });
    println!(
        "full disk: {}",
        if is_lent { "a full tmpfs, and injected" } else { "injected; no mount is allowed here" }
    );
}

pub fn save_to_a_full_disk(disk: &Path) {
    let target = disk.join("x.safetensors");
    assert_eq!(names(disk).len(), 0, "the disk is a new one");
    save(&target, &[1; 100_000]).unwrap();
    assert_eq!(errno_at(&target, save(&target, &[2; 1_000_000])), raw(Errno::NOSPC));
    assert_eq!(fs::read(&target).unwrap(), [1; 100_000]);
    assert_eq!(names(disk), ["x.safetensors"]);
    save(&target, &[3; 100_000]).unwrap();
    assert_eq!(fs::read(&target).unwrap(), [3; 100_000]);
}
