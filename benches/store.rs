//! Lookup in the prompt store: one prompt of 100,000 tokens, with 10 and with 10,000 other prompts.
#![allow(missing_docs, clippy::unwrap_used)]

use criterion::{Criterion, criterion_group, criterion_main};
use mlxrs_py::array::Dtype;
use mlxrs_py::store::prompt_store::{BLOCK_TOKENS, NewRecord, NewTensor, Options, PromptStore, RecordKind, Space};
use std::hint::black_box;

const SPACE: Space = Space([1; 32]);

fn rows(tokens: &[u32]) -> Vec<NewRecord> {
    let starts = (0..tokens.len()).step_by(BLOCK_TOKENS);
    let record = |start: usize| NewRecord {
        kind: RecordKind::Rows,
        start,
        end: (start + BLOCK_TOKENS).min(tokens.len()),
        grid: 0,
        complete_from: start,
        keep: false,
        layout: String::new(),
        tensors: vec![NewTensor { name: "x".into(), dtype: Dtype::U8, shape: vec![16], bytes: vec![7; 16] }],
    };
    starts.map(record).collect()
}

/// Tokens that differ from those of any other `prompt` within the first block.
fn prompt(prompt: u32, n_tokens: u32) -> Vec<u32> {
    (0..n_tokens).map(|at| if at < 100 { at } else { prompt * 7919 + at }).collect()
}

fn find(criterion: &mut Criterion) {
    let long = prompt(0, 100_000);
    for on_disk in [true, false] {
        let mut group = criterion.benchmark_group(if on_disk { "find/disk" } else { "find/memory" });
        for n_prompts in [10, 10_000] {
            let folder = tempfile::tempdir().unwrap();
            let path = on_disk.then(|| folder.path().join("store"));
            let options = Options { path, ram_bytes: 4 << 30, disk_bytes: Some(64 << 30), ..Options::default() };
            let store = PromptStore::open(options).unwrap();
            let mut handles = vec![store.put(&SPACE, &long, rows(&long))];
            for other in 1..=n_prompts {
                let tokens = prompt(other, 300);
                handles.push(store.put(&SPACE, &tokens, rows(&tokens)));
            }
            for handle in handles {
                handle.wait(None).unwrap();
            }
            let found = store.find(&SPACE, &long);
            assert_eq!((found.blocks.len(), !found.partials.is_empty()), (390, true));
            group.bench_function(format!("{n_prompts} prompts"), |bencher| {
                bencher.iter(|| store.find(black_box(&SPACE), black_box(&long)));
            });
            let miss = prompt(77_777, 100_000);
            group.bench_function(format!("{n_prompts} prompts, other tokens"), |bencher| {
                bencher.iter(|| store.find(black_box(&SPACE), black_box(&miss)));
            });
            let first = store.find(&SPACE, &long);
            group.bench_function(format!("{n_prompts} prompts, 390 records opened"), |bencher| {
                bencher.iter(|| store.open_records(black_box(&first.blocks)));
            });
        }
    }
}

criterion_group!(benches, find);
criterion_main!(benches);
