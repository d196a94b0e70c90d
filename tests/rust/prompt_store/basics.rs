//! The store in order: what hits, where, and after what.

use super::common::*;
use mlxrs_py::Error;
use mlxrs_py::store::prompt_store::{
    DISK_BYTES, DiskState, Options, PromptStore, RecordInfo, RecordKind, Tier, Wanted,
};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use tempfile::tempdir;

/// Runs a test in memory, and in a folder.
fn both(test: impl Fn(&PromptStore, Tier)) {
    test(&PromptStore::open(options(None)).unwrap(), Tier::Ram);
    let folder = tempdir().unwrap();
    test(&open(&folder.path().join("store")), Tier::Disk);
}

#[test]
fn prompts_hit_as_far_as_they_share_tokens() {
    both(|store, tier| {
        let a = tokens(&[(1, 20), (2, 30)]);
        assert_eq!(restore(store, &space(1), &a), (0, 0));
        put(store, &space(1), &a, rows(&space(1), &a, 0, 40));
        assert_eq!(restore(store, &space(1), &a), (50, 0), "an exact repeat");
        assert!(store.find(&space(1), &a).blocks.iter().all(|block| block.tier == tier));
        assert_eq!(restore(store, &space(1), &tokens(&[(1, 20), (2, 30), (3, 9)])), (50, 0), "grown");
        assert_eq!(restore(store, &space(1), &tokens(&[(1, 20), (3, 30)])), (20, 0), "a shared beginning");
        assert_eq!(restore(store, &space(1), &a[..43]), (43, 0), "cut within a block");
        assert_eq!(restore(store, &space(1), &tokens(&[(3, 30)])), (0, 0), "another prompt");
        assert_eq!(restore(store, &space(2), &a), (0, 0), "another model");
        assert_eq!(restore(store, &space(1), &[]), (0, 0));
    });
}

#[test]
fn of_many_continuations_the_nearest_is_found() {
    both(|store, _| {
        for last in 0..8_u32 {
            let a: Vec<u32> = (0..last).chain([100 + last, 200]).collect();
            put(store, &space(1), &a, rows(&space(1), &a, 0, 8));
        }
        for last in 0..8_u32 {
            let query: Vec<u32> = (0..last).chain([100 + last, 300, 7, 7, 7]).collect();
            assert_eq!(restore(store, &space(1), &query).0, last as usize + 1, "{query:?}");
        }
    });
}

#[test]
fn rows_that_lack_some_hide_none_that_have_them() {
    both(|store, _| {
        let a = tokens(&[(1, 20)]);
        let add = |covered: &[u32], grid, complete_from| {
            let mut new = record(&space(1), covered, RecordKind::Rows, 0, covered.len(), 16);
            (new.grid, new.complete_from) = (grid, complete_from);
            put(store, &space(1), covered, vec![new]);
        };
        let ends = |partials: Vec<RecordInfo>| partials.iter().map(|partial| partial.end).collect::<Vec<_>>();
        add(&a[..3], 16, 0);
        add(&a[..5], 0, 0);
        add(&a[..6], 0, 4);
        add(&a[..7], 0, 6);
        for other in 0..40 {
            add(&[&a[..6], &[500 + other]].concat(), 0, 5);
        }
        // Most tokens, then those that lack less, all of them, and those on a grid.
        assert_eq!(ends(store.find(&space(1), &a[..7]).partials), [7, 6, 5, 3]);
        // What serves an end in the middle of others is there though they have as many tokens in common.
        let partials = store.find(&space(1), &[&a[..6], &[7000]].concat()).partials;
        assert_eq!(partials.iter().map(|partial| partial.complete_from).collect::<Vec<_>>(), [4, 0, 0]);
        add(&a[..8], 0, 7);
        let found = store.find(&space(1), &a);
        assert_eq!((found.blocks.len(), found.partials.len()), (1, 0));
        assert_eq!(ends(store.find_partials(&space(1), &a, &[])), [8, 7, 6, 5, 3], "in the block's place");
        assert_eq!(ends(store.find_partials(&space(1), &a, &found.blocks)), [0; 0]);
    });
}

#[test]
fn a_tail_goes_when_its_block_fills() {
    both(|store, _| {
        let a = tokens(&[(1, 13)]);
        put(store, &space(1), &a, rows(&space(1), &a, 0, 40));
        let longer = tokens(&[(1, 15)]);
        put(store, &space(1), &longer, rows(&space(1), &longer, 8, 40));
        assert_eq!(store.list().len(), 2);
        let full = tokens(&[(1, 16)]);
        put(store, &space(1), &full, rows(&space(1), &full, 8, 40));
        assert_eq!(store.list().len(), 2);
        assert_eq!(restore(store, &space(1), &full), (16, 0));
        // What a longer record has is not stored again.
        put(store, &space(1), &a, rows(&space(1), &a, 0, 40));
        assert_eq!(store.list().len(), 2);
        assert!(store.verify(false).unwrap().faults.is_empty());
    });
}

#[test]
fn states_are_found_without_rows_and_thinned() {
    both(|store, _| {
        let a = tokens(&[(1, 100)]);
        for end in [0, 5, 16, 40, 50, 60, 70, 80, 90, 99, 100] {
            let mut state = record(&space(1), &a, RecordKind::State, end / BLOCK * BLOCK, end, 24);
            state.keep = end == 50;
            put(store, &space(1), &a[..end], vec![state]);
            assert_eq!(restore(store, &space(1), &a[..end]).1, end);
        }
        let ends: Vec<_> = store.find(&space(1), &a).states.iter().map(|state| state.end).collect();
        assert!(ends.starts_with(&[100, 99]) && ends.contains(&50), "{ends:?}");
        assert_eq!(store.find(&space(1), &a[..99]).states[0].end, 99);
    });
}

#[test]
fn better_records_take_the_place_of_others() {
    both(|store, _| {
        let a = tokens(&[(1, 8)]);
        let with = |grid, complete_from| {
            let mut new = record(&space(1), &a, RecordKind::Rows, 0, 8, 16);
            (new.grid, new.complete_from) = (grid, complete_from);
            put(store, &space(1), &a, vec![new]);
            let block = &store.find(&space(1), &a).blocks[0];
            (block.grid, block.complete_from)
        };
        let wants = |grid, complete_from| {
            let wanted = Wanted { kind: RecordKind::Rows, start: 0, end: 8, grid, complete_from, keep: false };
            store.missing(&space(1), &a, &[wanted])[0]
        };
        assert!(wants(0, 4));
        assert_eq!(with(0, 4), (0, 4));
        assert!(!wants(0, 4) && wants(0, 3) && wants(16, 4) && !wants(16, 8));
        assert_eq!(with(0, 8), (0, 4));
        assert_eq!(with(16, 4), (16, 4));
        assert_eq!(with(0, 0), (16, 4), "worse in one");
        assert_eq!(with(32, 0), (32, 0));
        assert_eq!(store.list().len(), 1);
        assert_eq!(restore(store, &space(1), &a).0, 8);
    });
}

#[test]
fn what_was_put_is_there_after_a_restart_and_in_another_process() {
    let folder = tempdir().unwrap();
    let a = tokens(&[(1, 50)]);
    let first = open(folder.path());
    let handle = first.put(&space(1), &a, rows(&space(1), &a, 0, 40));
    assert_eq!(restore(&first, &space(1), &a).0, 50, "seen at once");
    let report = handle.wait(None).unwrap().unwrap();
    assert!(report.is_durable && handle.is_done());
    assert_eq!((report.n_written, report.n_present, report.n_in_memory), (7, 0, 0));
    let report = first.put(&space(1), &a, rows(&space(1), &a, 0, 40)).wait(None).unwrap().unwrap();
    assert_eq!((report.n_written, report.n_present), (0, 7), "nothing is written twice");
    let second = open(folder.path());
    assert_eq!(restore(&second, &space(1), &a).0, 50);
    first.note_rate("prefill", 100.0);
    drop(first);
    assert_eq!(restore(&second, &space(1), &a).0, 50);
    drop(second);
    let third = open(folder.path());
    assert_eq!(restore(&third, &space(1), &a).0, 50);
    assert_eq!(third.rate("prefill"), Some(100.0));
    assert_eq!(third.stats().n_rebuilds, 0);
    third.close();
    assert!(third.find(&space(1), &a).blocks.is_empty());
    assert!(third.put(&space(1), &a, Vec::new()).wait(None).is_err());
    assert_eq!(fs::read_dir(folder.path().join("owners")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(folder.path().join("tmp")).unwrap().count(), 0);
}

#[test]
fn a_lost_index_is_built_anew_from_the_records() {
    let folder = tempdir().unwrap();
    let a = tokens(&[(1, 50)]);
    let store = open(folder.path());
    put(&store, &space(1), &a, rows(&space(1), &a, 0, 40));
    assert_eq!(store.pin(&space(1), &a).unwrap(), 7);
    drop(store);
    fs::remove_file(folder.path().join("index.sqlite")).unwrap();
    let store = open(folder.path());
    assert_eq!(restore(&store, &space(1), &a).0, 50);
    // While it is open.
    fs::remove_file(folder.path().join("index.sqlite")).unwrap();
    assert_eq!(store.find(&space(1), &a).blocks.len(), 0);
    let b = tokens(&[(1, 20), (2, 10)]);
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while restore(&store, &space(1), &a).0 < 50 {
        assert!(std::time::Instant::now() < deadline, "not built anew");
        std::thread::sleep(Duration::from_millis(20));
    }
    put(&store, &space(1), &b, rows(&space(1), &b, 0, 40));
    assert_eq!(restore(&store, &space(1), &b).0, 30);
}

#[test]
fn limits_hold_and_the_least_recently_used_leaves_go_first() {
    let folder = tempdir().unwrap();
    let limit = 3 << 20;
    let options = Options { disk_bytes: Some(limit), ..options(Some(folder.path())) };
    let store = PromptStore::open(options).unwrap();
    let pinned = tokens(&[(0, 24)]);
    put(&store, &space(1), &pinned, rows(&space(1), &pinned, 0, 20_000));
    assert_eq!(store.pin(&space(1), &pinned).unwrap(), 3);
    for n in 1..20 {
        let a = tokens(&[(n, 24)]);
        put(&store, &space(1), &a, rows(&space(1), &a, 0, 20_000));
        assert_eq!(restore(&store, &space(1), &a).0, 24, "prompt {n}");
        assert!(folder_size(folder.path()) <= limit, "{} after prompt {n}", folder_size(folder.path()));
    }
    assert!(store.stats().n_evicted > 0);
    assert!(store.stats().disk_bytes >= folder_size(folder.path()));
    assert_eq!(restore(&store, &space(1), &pinned).0, 24);
    assert_eq!(store.unpin(&space(1), &pinned).unwrap(), 3);
    assert!(store.prune(Some(0)).unwrap() > 0);
    assert_eq!(store.list().len(), 0);
    assert_eq!(fs::read_dir(folder.path().join("records")).unwrap().count(), 0);
}

#[test]
fn what_is_larger_than_the_limit_stays_in_memory_as_far_as_it_may() {
    let folder = tempdir().unwrap();
    let options = Options { disk_bytes: Some(2 << 20), ram_bytes: 1 << 20, ..options(Some(folder.path())) };
    let store = PromptStore::open(options).unwrap();
    let a = tokens(&[(1, 400)]);
    let report = store.put(&space(1), &a, rows(&space(1), &a, 0, 40_000)).wait(None).unwrap().unwrap();
    assert!(!report.is_durable && report.n_in_memory > 0 && report.n_written > 0, "{report:?}");
    assert!(restore(&store, &space(1), &a).0 >= report.n_written * BLOCK);
    assert!(store.stats().ram_bytes <= 1 << 20);
    assert!(folder_size(folder.path()) <= 2 << 20);
}

#[test]
fn the_budget_of_a_day_holds_over_restarts() {
    let folder = tempdir().unwrap();
    let budget = Some(300 << 10);
    let with_budget =
        || PromptStore::open(Options { write_bytes_per_day: budget, ..options(Some(folder.path())) }).unwrap();
    let mut n_durable = 0;
    for n in 1..8 {
        let store = with_budget();
        let a = tokens(&[(n, 8)]);
        let report = store.put(&space(1), &a, rows(&space(1), &a, 0, 20_000)).wait(None).unwrap().unwrap();
        n_durable += usize::from(report.is_durable);
        assert!(store.stats().written_today <= 300 << 10);
        assert_eq!(restore(&store, &space(1), &a).0, 8);
    }
    assert!((2..7).contains(&n_durable), "{n_durable}");
}

#[test]
fn a_folder_that_others_may_write_to_or_that_is_no_store_is_refused() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("store");
    drop(open(&path));
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700);
    for entry in fs::read_dir(&path).unwrap() {
        let entry = entry.unwrap();
        let expected = if entry.file_type().unwrap().is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode(&entry.path()), expected, "{}", entry.path().display());
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o770)).unwrap();
    assert!(matches!(PromptStore::open(options(Some(&path))), Err(Error::Value { .. })));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(path.join("format"), "mlxrs_py prompt store 2\n").unwrap();
    let error = PromptStore::open(options(Some(&path))).unwrap_err().to_string();
    assert!(error.contains("expected format 1, got format 2"), "{error}");
    fs::write(folder.path().join("letter"), "x").unwrap();
    assert!(matches!(PromptStore::open(options(Some(folder.path()))), Err(Error::Value { .. })));
    assert!(matches!(
        PromptStore::open(Options { disk_bytes: Some(1), ..options(Some(&path)) }),
        Err(Error::Value { .. })
    ));
}

#[test]
fn a_folder_keeps_its_limit_and_whoever_gives_none_evicts_nothing_by_opening() {
    let folder = tempdir().unwrap();
    let with = |disk_bytes| PromptStore::open(Options { disk_bytes, ..options(Some(folder.path())) }).unwrap();
    assert_eq!(with(None).stats().disk_limit, DISK_BYTES);
    assert_eq!(with(Some(4 << 20)).stats().disk_limit, 4 << 20);
    let store = with(Some(16 << 20));
    let a = tokens(&[(1, 80)]);
    put(&store, &space(1), &a, rows(&space(1), &a, 0, 120_000));
    drop(store);
    // As somebody may write it, by hand or by an accident.
    for (text, limit) in [("4194304\n", 4 << 20), ("", DISK_BYTES), ("\0\0", DISK_BYTES), ("17", DISK_BYTES)] {
        fs::write(folder.path().join("limit"), text).unwrap();
        let store = with(None);
        assert_eq!((store.stats().disk_limit, store.list().len()), (limit, 10));
        assert!(store.verify(true).unwrap().faults.is_empty());
    }
    fs::write(folder.path().join("limit"), "4194304").unwrap();
    let store = with(None);
    assert_eq!(restore(&store, &space(1), &a).0, 80);
    put(&store, &space(1), &tokens(&[(2, 8)]), rows(&space(1), &tokens(&[(2, 8)]), 0, 2_000));
    assert!(folder_size(folder.path()) <= 4 << 20, "whoever writes keeps the limit");
    drop(store);
    assert!(with(Some(3 << 20)).stats().disk_bytes <= 3 << 20, "one that is given holds at once");
    assert_eq!(with(None).stats().disk_limit, 3 << 20);
}

#[test]
fn a_store_that_is_only_read_changes_nothing() {
    let folder = tempdir().unwrap();
    let a = tokens(&[(1, 50)]);
    let writer = open(folder.path());
    put(&writer, &space(1), &a, rows(&space(1), &a, 0, 40));
    let reader = PromptStore::open(Options { read_only: true, ..options(Some(folder.path())) }).unwrap();
    assert_eq!(restore(&reader, &space(1), &a).0, 50);
    assert_eq!(reader.stats().disk, DiskState::ReadOnly);
    let b = tokens(&[(1, 50), (2, 50)]);
    let report = reader.put(&space(1), &b, rows(&space(1), &b, 48, 40)).wait(None).unwrap().unwrap();
    assert!(!report.is_durable && report.n_in_memory == 7);
    assert_eq!(restore(&reader, &space(1), &b).0, 100);
    assert_eq!(restore(&writer, &space(1), &b).0, 50);
    let missing = Options { read_only: true, ..options(Some(&folder.path().join("none"))) };
    assert!(matches!(PromptStore::open(missing), Err(Error::Io { .. })));
}

#[test]
fn records_that_cannot_be_are_refused_by_the_handle() {
    let store = PromptStore::open(options(None)).unwrap();
    let a = tokens(&[(1, 20)]);
    let refuse = |change: &dyn Fn(&mut mlxrs_py::store::prompt_store::NewRecord)| {
        let mut new = record(&space(1), &a, RecordKind::Rows, 8, 16, 16);
        change(&mut new);
        let refused = store.put(&space(1), &a, vec![new]);
        assert!(matches!(refused.wait(None), Err(Error::Value { .. })));
        assert!(matches!(refused.wait(None), Err(Error::Value { .. })), "asked again");
    };
    refuse(&|new| new.start = 7);
    refuse(&|new| new.end = 17);
    refuse(&|new| (new.start, new.end) = (16, 21));
    refuse(&|new| new.end = 8);
    refuse(&|new| new.complete_from = 7);
    refuse(&|new| new.tensors[0].name = "seal".into());
    refuse(&|new| new.tensors[0].name = "0.wide".into());
    refuse(&|new| new.tensors[0].bytes.push(0));
    refuse(&|new| new.tensors[0].shape = vec![usize::MAX, 3]);
    assert_eq!(store.list().len(), 0);
}

#[test]
fn memory_keeps_its_limit() {
    let store = PromptStore::open(Options { ram_bytes: 200_000, ..options(None) }).unwrap();
    for n in 0..30 {
        let a = tokens(&[(n, 24)]);
        put(&store, &space(1), &a, rows(&space(1), &a, 0, 5_000));
        assert!(store.stats().ram_bytes <= 200_000);
        assert_eq!(restore(&store, &space(1), &a).0, 24);
    }
    store.clear().unwrap();
    assert_eq!(store.stats().ram_bytes, 0);
}
