//! The parts that are integers and bytes alone: growth, ring, header, tree, eviction, windows. `cargo bench --bench pure`.
#![allow(missing_docs)]

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mlxrs_py::array::Dtype;
use mlxrs_py::cache::plan::{Growth, Ring};
use mlxrs_py::persist::TensorInfo;
use mlxrs_py::persist::header;
use mlxrs_py::prefill::windows;
use mlxrs_py::store::{Gone, Kind, Limits, Prompts, Radix};
use std::collections::BTreeMap;
use std::hint::black_box;

const STEP: usize = 256;

/// 1,000 tokens, one by one, from an empty cache: per token, growth is looked at once.
fn growth(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan");
    group.throughput(Throughput::Elements(1000));
    group.bench_function("growth, 1,000 tokens", |bencher| {
        bencher.iter(|| {
            let mut len = None;
            for used in 0..1000 {
                if let Some(plan) = Growth::plan(black_box(used), len, 1, STEP) {
                    len = Some(plan.kept + plan.added);
                }
            }
            len
        });
    });
    group.bench_function("ring of 512, 1,000 tokens", |bencher| {
        bencher.iter(|| {
            let mut ring = Ring::new(black_box(512), 4);
            for _ in 0..1000 {
                ring = ring.place(STEP).after;
            }
            ring
        });
    });
    group.finish();
}

fn window_plan(criterion: &mut Criterion) {
    criterion.bench_function("windows, 100,000 tokens by 512", |bencher| {
        bencher.iter(|| windows(black_box(100_000), 512).map(|window| window.len()).sum::<usize>());
    });
}

/// The header of a cache file of so many layers.
fn header_of(n_layers: usize) -> (Vec<u8>, u64) {
    let size = 8 * 16_384 * 128 * 2;
    let tensors = (0..2 * n_layers).map(|i| {
        let start = (i * size) as u64;
        let name = format!("{}.{}", i / 2, i % 2);
        let info = TensorInfo {
            name: name.clone(),
            dtype: Dtype::Bf16,
            shape: vec![1, 8, 16_384, 128],
            start,
            end: start + size as u64,
        };
        (name, info)
    });
    let tensors: Vec<_> = tensors.collect();
    let metadata = BTreeMap::from([("model".to_owned(), "m".to_owned())]);
    let file = header::build(&tensors, &metadata).expect("a header");
    (file[header::PREFIX_SIZE..].to_vec(), (2 * n_layers * size) as u64)
}

fn header_parse(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("header");
    for n_layers in [32, 1024] {
        let (json, data_size) = header_of(n_layers);
        group.throughput(Throughput::Bytes(json.len() as u64));
        group.bench_with_input(BenchmarkId::new("parse, layers", n_layers), &json, |bencher, json| {
            bencher.iter(|| header::parse(black_box(json), data_size).expect("a good header"));
        });
    }
    group.finish();
}

/// The `i`-th of many prompts that share a system prompt.
fn prompt(i: i64, n_shared: i64, n_tokens: i64) -> Vec<i64> {
    (0..n_shared).chain((n_shared..n_tokens).map(|t| t + 1_000_000 * (i + 1))).collect()
}

fn radix(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("radix");
    for n_prompts in [10, 10_000] {
        let mut tree = Radix::default();
        for i in 0..n_prompts {
            tree.insert(&prompt(i, 500, 1000), i);
        }
        let mut query = prompt(n_prompts / 2, 500, 1000);
        query[990] = -1;
        group.throughput(Throughput::Elements(query.len() as u64));
        group.bench_with_input(
            BenchmarkId::new("search 1,000 tokens, prompts", n_prompts),
            &query,
            |bencher, query| {
                bencher.iter(|| tree.search(black_box(query)));
            },
        );
    }
    let mut long = Radix::default();
    let stored: Vec<i64> = (0..100_000).collect();
    long.insert(&stored, 0);
    group.throughput(Throughput::Elements(100_000));
    group.bench_function("search 100,000 tokens", |bencher| bencher.iter(|| long.search(black_box(&stored))));
    group.finish();
}

/// A full store takes one more prompt and gives up the one that was used last the longest ago.
fn lru(criterion: &mut Criterion) {
    const FULL: i64 = 1000;
    let limits = Limits { n_prompts: FULL as u64, n_bytes: u64::MAX };
    let mut prompts = Prompts::new(limits);
    for i in 0..FULL {
        prompts.insert(0, &prompt(i, 500, 1000), (Kind::User, 1, ()), false, &mut Gone::default());
    }
    let mut next = FULL;
    criterion.bench_function("store of 1,000 prompts: insert and evict", |bencher| {
        bencher.iter_batched(
            || {
                next += 1;
                prompt(next, 500, 1000)
            },
            |tokens| {
                let mut gone = Gone::default();
                prompts.insert(0, &tokens, (Kind::User, 1, ()), false, &mut gone);
                prompts.evict(limits, &mut gone);
                gone
            },
            BatchSize::SmallInput,
        );
    });
}

criterion_group!(benches, growth, window_plan, header_parse, radix, lru);
criterion_main!(benches);
