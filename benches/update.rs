//! Host time of one update of each cache, without Python: `cargo bench`.
#![allow(missing_docs)]

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use mlxrs_py::array::{Array, Dtype, eval};
use mlxrs_py::cache::{Cache, QuantizedKvCache, RotatingKvCache, StandardKvCache};

fn caches() -> [(&'static str, Cache); 3] {
    let ring = RotatingKvCache::new(4096, 4).expect("room for new tokens");
    let quantized = QuantizedKvCache::new(64, 8).expect("a known scheme");
    [
        ("KVCache", Cache::Standard(StandardKvCache::default())),
        ("RotatingKVCache", Cache::Rotating(ring)),
        ("QuantizedKVCache", Cache::Quantized(quantized)),
    ]
}

fn update(criterion: &mut Criterion) {
    let rows = Array::zeros(&[1, 8, 1, 128], Dtype::Bf16).expect("rows");
    eval("bench", [&rows]).expect("rows");
    for (name, mut cache) in caches() {
        cache.as_kv_mut().expect("keys and values").update(&rows, &rows).expect("an update");
        criterion.bench_function(&format!("update {name}"), |bencher| {
            // A fresh copy per batch, so that the lazy graph does not grow without end.
            bencher.iter_batched_ref(
                || cache.clone(),
                |cache| cache.as_kv_mut().expect("keys and values").update(&rows, &rows).expect("an update"),
                BatchSize::SmallInput,
            );
        });
    }
}

criterion_group!(benches, update);
criterion_main!(benches);
