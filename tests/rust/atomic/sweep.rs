//! What dead savers left is removed by the next save beside it, and nothing else is.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use mlxrs_py::persist::atomic::{AtomicFile, Phase};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tempfile::tempdir;

use super::{at, failing, is_temporary, names, probed, save, set_mode, temporaries};

const DEAD: &str = ".x.safetensors.4321.0123456789abcdef.tmp.safetensors";

#[test]
fn a_save_sweeps_dead_temporaries_of_every_target_beside_it() {
    let folder = tempdir().unwrap();
    for name in [DEAD, ".y.1.ffffffffffffffff.tmp.safetensors", "...4194304.0000000000000000.tmp.safetensors"] {
        assert!(is_temporary(name.as_ref()));
        fs::write(folder.path().join(name), b"cut").unwrap();
        set_mode(&folder.path().join(name), 0o444);
    }
    save(&folder.path().join("x.safetensors"), b"new").unwrap();
    assert_eq!(names(folder.path()), ["x.safetensors"]);
}

#[test]
fn a_save_that_is_still_under_way_is_not_swept() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    let mut first = AtomicFile::create(&target).unwrap();
    first.write_all(b"first").unwrap();
    save(&target, b"second").unwrap();
    save(&folder.path().join("y.safetensors"), b"other").unwrap();
    assert_eq!(temporaries(folder.path()).len(), 1);
    first.commit(true).unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"first");
    assert_eq!(names(folder.path()), ["x.safetensors", "y.safetensors"]);
}

#[test]
fn a_temporary_is_alive_as_long_as_its_lock_whatever_its_process_id() {
    let folder = tempdir().unwrap();
    let temp = folder.path().join(DEAD);
    let lock = File::create(&temp).unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    save(&folder.path().join("x.safetensors"), b"new").unwrap();
    assert!(temp.exists());
    // Unlocked, not closed: a child that another test starts just now would keep a closed file's lock for a moment.
    flock(&lock, FlockOperation::Unlock).unwrap();
    save(&folder.path().join("x.safetensors"), b"new").unwrap();
    assert!(!temp.exists());
}

#[test]
fn files_of_the_user_that_only_resemble_temporaries_stay() {
    let folder = tempdir().unwrap();
    let own = [
        "x.tmp.safetensors",
        ".x.tmp.safetensors",
        ".x.safetensors.12.0123456789abcdef.tmp",
        ".x.safetensors.12.0123456789abcdef.safetensors",
        ".x.safetensors.12.0123456789ABCDEF.tmp.safetensors",
        ".x.safetensors.12.0123456789abcde.tmp.safetensors",
        ".x.safetensors.12.0123456789abcdef0.tmp.safetensors",
        ".x.safetensors.1a.0123456789abcdef.tmp.safetensors",
        ".x.safetensors.12345678901.0123456789abcdef.tmp.safetensors",
        ".x.safetensors..0123456789abcdef.tmp.safetensors",
        "..12.0123456789abcdef.tmp.safetensors",
        ".12.0123456789abcdef.tmp.safetensors",
        "x.safetensors.12.0123456789abcdef.tmp.safetensors",
        ".x.safetensors.12.0123456789abcdef.tmp.safetensors.bak",
    ];
    for name in own {
        fs::write(folder.path().join(name), name).unwrap();
    }
    save(&folder.path().join("x.safetensors"), b"new").unwrap();
    assert_eq!(names(folder.path()).len(), own.len() + 1);
    for name in own {
        assert_eq!(fs::read_to_string(folder.path().join(name)).unwrap(), name);
    }
}

#[test]
fn only_regular_files_are_swept_and_links_are_not_followed() {
    let folder = tempdir().unwrap();
    let named = |n: u32| folder.path().join(format!(".x.{n}.0123456789abcdef.tmp.safetensors"));
    let pointed_at = folder.path().join("pointed at");
    fs::write(&pointed_at, b"the user's").unwrap();
    symlink(&pointed_at, named(1)).unwrap();
    symlink("nothing", named(2)).unwrap();
    fs::create_dir(named(3)).unwrap();
    assert!(Command::new("mkfifo").arg(named(4)).status().unwrap().success());
    let before = names(folder.path());
    save(&folder.path().join("x.safetensors"), b"new").unwrap();
    assert_eq!(fs::read(&pointed_at).unwrap(), b"the user's");
    assert_eq!(names(folder.path()).len(), before.len() + 1);
}

#[test]
fn a_dead_temporary_whose_name_another_file_takes_meanwhile_is_no_longer_swept() {
    let folder = tempdir().unwrap();
    let temp = folder.path().join(DEAD);
    fs::write(&temp, b"cut").unwrap();
    let mut n_reached = 0;
    let replace_when_open = {
        let temp = temp.clone();
        move |phase| {
            n_reached += u32::from(phase == Phase::Sweep);
            if phase == Phase::Sweep && n_reached == 2 {
                fs::remove_file(&temp)?;
                fs::write(&temp, b"another's")?;
            }
            Ok(())
        }
    };
    probed(replace_when_open, || save(&folder.path().join("x.safetensors"), b"new")).unwrap();
    assert_eq!(fs::read(&temp).unwrap(), b"another's");
}

#[test]
fn a_folder_that_cannot_be_swept_is_saved_to() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    fs::write(folder.path().join(DEAD), b"cut").unwrap();
    failing(Phase::Sweep, Errno::ACCESS, || save(&target, b"new")).unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"new");
    assert_eq!(temporaries(folder.path()).len(), 1);
}

/// Creates a file while `act` gets its first temporary between creation and lock; the temporaries then there
/// must be one of another name, beside `others` left under the first. Then it is committed.
fn create_against(act: impl FnOnce(&Path) -> Option<File> + 'static, others: usize) {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    let (report, taken) = std::sync::mpsc::channel();
    let act = {
        let folder = folder.path().to_owned();
        move || {
            let temp = temporaries(&folder).pop().unwrap();
            report.send((act(&temp), temp)).unwrap();
        }
    };
    let mut file = at(Phase::Lock, act, || AtomicFile::create(&target)).unwrap();
    let (_held, taken) = taken.recv().unwrap();
    let is_first = |temp: &&PathBuf| **temp == taken;
    let now = temporaries(folder.path());
    assert_eq!((now.len(), now.iter().filter(is_first).count()), (1 + others, others));
    file.write_all(b"new").unwrap();
    file.commit(true).unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"new");
    assert_eq!(names(folder.path()).len(), 1 + others);
}

#[test]
fn a_saver_whose_file_was_swept_before_it_was_locked_takes_another_name() {
    let sweep = |temp: &Path| {
        fs::remove_file(temp).unwrap();
        None
    };
    create_against(sweep, 0);
}

#[test]
fn a_saver_whose_file_a_sweeper_holds_takes_another_name() {
    let hold = |temp: &Path| {
        let sweeper = File::open(temp).unwrap();
        flock(&sweeper, FlockOperation::NonBlockingLockExclusive).unwrap();
        Some(sweeper)
    };
    create_against(hold, 0);
}

#[test]
fn a_saver_whose_name_another_one_has_leaves_that_file_alone_and_takes_another_name() {
    let replace = |temp: &Path| {
        fs::remove_file(temp).unwrap();
        let other = File::create(temp).unwrap();
        flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
        Some(other)
    };
    create_against(replace, 1);
}

#[test]
fn savers_that_are_given_no_name_fail_and_leave_nothing() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    let result = failing(Phase::Lock, Errno::WOULDBLOCK, || save(&target, b"new"));
    assert_eq!(super::errno_at(&target, result), super::raw(Errno::EXIST));
    assert_eq!(names(folder.path()).len(), 0);
}
