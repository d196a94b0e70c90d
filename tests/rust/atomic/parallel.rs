//! Files that several threads write.

use std::fs;
use std::io;
use std::num::NonZero;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use mlxrs_py::Error;
use mlxrs_py::array::{Array, Dtype};
use mlxrs_py::cache::{Cache, StandardKvCache};
use mlxrs_py::persist::atomic::{AtomicFile, Phase, set_probe};
use mlxrs_py::persist::{CacheFile, SaveOptions, save_prompt_cache};
use rustix::io::Errno;
use tempfile::tempdir;

use super::{assert_done, at, child, mode_of, names, save, set_mode};

const LARGE: usize = 20 << 20;

/// Freeing its blocks goes through the journal that the sync of the folder waits for, and takes long.
#[cfg(target_os = "linux")]
#[test]
fn a_replaced_file_is_let_go_of_after_the_folder_is_synced_and_not_by_the_saver() {
    use std::os::unix::fs::MetadataExt as _;
    use std::time::{Duration, Instant};

    fn key(file: &fs::Metadata) -> (u64, u64) {
        (file.dev(), file.ino())
    }
    // How often this process has the file open.
    fn n_open(old: (u64, u64)) -> usize {
        let entries = fs::read_dir("/proc/self/fd").unwrap();
        entries.filter(|entry| fs::metadata(entry.as_ref().unwrap().path()).is_ok_and(|file| key(&file) == old)).count()
    }
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    let save = || {
        let mut file = AtomicFile::create(&target)?;
        file.reserve(LARGE as u64)?;
        file.write_all_at(&vec![1; LARGE], 0)?;
        file.commit(true)
    };
    save().unwrap();
    let old = key(&fs::metadata(&target).unwrap());
    let watch = move || assert_eq!(n_open(old), 1, "the one that is closed in the background");
    at(Phase::FolderSync, watch, save).unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    while n_open(old) > 0 {
        assert!(Instant::now() < end, "it is never closed");
        std::thread::yield_now();
    }
}

/// A cache of `n_rows` rows of 64 KiB, so of several pieces of work.
fn cache_of(n_rows: i32) -> Cache {
    let rows = Array::zeros(&[1, 8, n_rows, 4096], Dtype::Bf16).unwrap();
    let mut cache = Cache::Standard(StandardKvCache::default());
    cache.as_kv_mut().unwrap().update(&rows, &rows).unwrap();
    cache
}

#[test]
fn a_file_written_by_several_threads_replaces_another_and_is_whole() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    for round in 0..4_u8 {
        // The second and the fourth round replace a file whose pages may be taken.
        let bytes: Vec<u8> = (0..LARGE).map(|at| (at / 4099) as u8 ^ round).collect();
        let mut file = AtomicFile::create(&target).unwrap();
        file.reserve(LARGE as u64).unwrap();
        let held = fs::File::open(&target);
        std::thread::scope(|threads| {
            for (at, piece) in bytes.chunks(3 << 20).enumerate() {
                let file = &file;
                threads.spawn(move || {
                    let at = (at * (3 << 20)) as u64;
                    file.write_all_at(piece, at).unwrap();
                    file.start_writeback(at, piece.len());
                });
            }
        });
        file.commit(round % 2 == 0).unwrap();
        assert!(fs::read(&target).unwrap() == bytes);
        // Whoever has the old file open still reads it.
        if let Ok(held) = held {
            let old: Vec<u8> = (0..LARGE).map(|at| (at / 4099) as u8 ^ (round - 1)).collect();
            let mut found = vec![0; LARGE];
            std::os::unix::fs::FileExt::read_exact_at(&held, &mut found, 0).unwrap();
            assert!(found == old);
        }
        assert_eq!(names(folder.path()), ["x.safetensors"]);
    }
}

#[test]
fn a_large_file_that_cannot_be_read_is_replaced_and_hands_on_its_mode() {
    let folder = tempdir().unwrap();
    let target = folder.path().join("x.safetensors");
    save(&target, &vec![1; LARGE]).unwrap();
    set_mode(&target, 0o200);
    let mut file = AtomicFile::create(&target).unwrap();
    file.reserve(LARGE as u64).unwrap();
    file.write_all_at(&[7], LARGE as u64 - 1).unwrap();
    file.commit(true).unwrap();
    assert_eq!(mode_of(&target), 0o200);
    set_mode(&target, 0o600);
    let bytes = fs::read(&target).unwrap();
    assert!(bytes.len() == LARGE && bytes[LARGE - 1] == 7 && bytes[..LARGE - 1].iter().all(|&byte| byte == 0));
}

#[test]
fn a_fault_in_any_piece_of_any_thread_keeps_the_old_file() {
    let folder = tempdir().unwrap();
    assert_done(&child(&[], "threads", folder.path()).output().unwrap());
}

/// The write that fails, counted from 1, and how many there were.
static FAILING: AtomicUsize = AtomicUsize::new(0);
static WRITES: AtomicUsize = AtomicUsize::new(0);

fn probe(phase: Phase) -> io::Result<()> {
    if phase == Phase::Write && WRITES.fetch_add(1, Ordering::SeqCst) + 1 == FAILING.load(Ordering::SeqCst) {
        return Err(Errno::NOSPC.into());
    }
    Ok(())
}

pub fn save_with_a_fault_in_each_write(folder: &Path) {
    // Of a whole process, since the writers are threads of their own.
    assert!(set_probe(probe));
    let target = folder.join("x.safetensors");
    for direct in [false, true] {
        fault_in_each_write(folder, &target, direct);
    }
}

fn fault_in_each_write(folder: &Path, target: &Path, direct: bool) {
    WRITES.store(0, Ordering::SeqCst);
    let options = SaveOptions { durable: false, direct, threads: NonZero::new(3), ..SaveOptions::default() };
    let save = |cache: Cache| save_prompt_cache(target, &[cache], &Default::default(), &options);
    save(cache_of(300)).unwrap();
    let old = fs::metadata(target).unwrap().len();
    let n_writes = WRITES.load(Ordering::SeqCst);
    // Past the page cache whole windows are written.
    assert!(n_writes > if direct { 1 } else { 5 }, "{n_writes} writes");
    for failing in 1..=n_writes {
        WRITES.store(0, Ordering::SeqCst);
        FAILING.store(failing, Ordering::SeqCst);
        let error = save(cache_of(301)).unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if path == target), "{failing}: {error}");
        assert_eq!(fs::metadata(target).unwrap().len(), old);
        assert_eq!(names(folder), ["x.safetensors"]);
    }
    FAILING.store(0, Ordering::SeqCst);
    save(cache_of(301)).unwrap();
    CacheFile::open(target).unwrap().read(None).unwrap();
}

#[test]
fn past_the_page_cache_a_file_has_the_same_bytes() {
    // The second takes no such writes on most kernels.
    for folder in
        [tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(), tempfile::tempdir_in("/dev/shm").unwrap()]
    {
        for (n_rows, durable) in [(1, true), (300, false), (5000, true)] {
            let rows: Vec<i32> = (0..n_rows * 8 * 128).collect();
            let rows =
                Array::from_i32(&rows).unwrap().reshape(&[1, 8, n_rows, 128]).unwrap().astype(Dtype::F32).unwrap();
            let mut cache = Cache::Standard(StandardKvCache::default());
            cache.as_kv_mut().unwrap().update(&rows, &rows).unwrap();
            let [through, past] = [false, true].map(|direct| {
                let path = folder.path().join(format!("{direct}.safetensors"));
                let options = SaveOptions { durable, direct, ..SaveOptions::default() };
                save_prompt_cache(&path, std::slice::from_ref(&cache), &Default::default(), &options).unwrap();
                fs::read(path).unwrap()
            });
            assert!(through == past, "{n_rows} rows in {folder:?}");
        }
    }
}
