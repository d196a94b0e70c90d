//! Several savers of one target: the last one wins, and every reader sees a whole file.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use tempfile::tempdir;

use super::{assert_done, child, names, save};

const SAVES: u8 = 40;

/// A content that shows by itself whether it is whole: its length follows from its one byte.
fn content(byte: u8) -> Vec<u8> {
    vec![byte; 20_000 + 1_000 * usize::from(byte)]
}

fn assert_whole(target: &Path) {
    let bytes = fs::read(target).unwrap();
    assert!(bytes == content(bytes[0]), "{} bytes that begin with {}", bytes.len(), bytes[0]);
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Reads the target over and over until `work` is done.
fn watched(target: &Path, work: impl FnOnce()) {
    let is_over = AtomicBool::new(false);
    thread::scope(|threads| {
        threads.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                assert_whole(target);
            }
        });
        // Said also when `work` panics, or the reader would be waited for without end.
        let _over = Over(&is_over);
        work();
    });
    assert_whole(target);
}

pub fn save_again_and_again(target: &Path) {
    for byte in 1..=SAVES {
        save(target, &content(byte)).unwrap();
    }
}

#[test]
fn threads_that_save_to_one_target_leave_a_whole_file_and_nothing_else() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    save(&target, &content(0)).unwrap();
    watched(&target, || {
        thread::scope(|threads| {
            for _ in 0..4 {
                threads.spawn(|| save_again_and_again(&target));
            }
        });
    });
    assert_eq!(names(folder.path()), ["x.safetensors"]);
}

#[test]
fn processes_that_save_to_one_target_leave_a_whole_file_and_nothing_else() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    save(&target, &content(0)).unwrap();
    watched(&target, || {
        let savers: Vec<_> = (0..3).map(|_| child(&[], "saver", &target).spawn().unwrap()).collect();
        for saver in savers {
            assert_done(&saver.wait_with_output().unwrap());
        }
    });
    assert_eq!(names(folder.path()), ["x.safetensors"]);
}

#[test]
fn the_last_of_two_savers_to_commit_wins() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    let [mut first, mut second] = [(); 2].map(|()| mlxrs_py::persist::atomic::AtomicFile::create(&target).unwrap());
    first.write_all(b"first").unwrap();
    second.write_all(b"second").unwrap();
    second.commit(true).unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"second");
    first.commit(true).unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"first");
}
