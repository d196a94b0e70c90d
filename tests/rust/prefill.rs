//! The prefill loop on a fake model.

use crate::mock::{MockModel, tokens_of};
use mlxrs_py::array::Array;
use mlxrs_py::cache::{Cache, CacheConfig, KvTensor, RotatingKvCache, make_prompt_cache};
use mlxrs_py::prefill::{Steps, materialize_caches, prefill_full, run, windows};
use std::ops::Range;

fn plain(layers: usize) -> Vec<Cache> {
    make_prompt_cache(&CacheConfig { num_hidden_layers: layers, sliding_window: None }).unwrap()
}

fn prompt(n: i32) -> Vec<i32> {
    (1..=n).collect()
}

#[test]
fn every_layer_ends_at_the_length_of_the_prompt_whatever_the_step() {
    for step in [1, 2, 3, 6, 7, 100] {
        let mut caches = plain(2);
        let logits = prefill_full(&mut MockModel::new(5), &prompt(7), &mut caches, step).unwrap();
        assert_eq!(logits.shape(), [1, 1, 5]);
        assert!(caches.iter().all(|cache| cache.as_kv().unwrap().offset() == 7), "step {step}");
    }
}

#[test]
fn the_model_sees_chunks_of_all_but_the_last_token_and_then_that_token() {
    let mut model = MockModel::new(5);
    prefill_full(&mut model, &prompt(7), &mut plain(1), 3).unwrap();
    assert_eq!(model.windows, [3, 3, 1]);
}

#[test]
fn one_token_needs_one_forward() {
    let (mut model, mut caches) = (MockModel::new(5), plain(1));
    prefill_full(&mut model, &[9], &mut caches, 4).unwrap();
    assert_eq!((model.windows.as_slice(), caches[0].as_kv().unwrap().offset()), (&[1][..], 1));
}

#[test]
fn a_step_of_zero_counts_as_one() {
    let mut caches = plain(1);
    prefill_full(&mut MockModel::new(5), &prompt(3), &mut caches, 0).unwrap();
    assert_eq!(caches[0].as_kv().unwrap().offset(), 3);
}

#[test]
fn an_empty_prompt_is_refused() {
    assert!(prefill_full(&mut MockModel::new(5), &[], &mut plain(1), 4).is_err());
}

/// Counts the barriers that the loop asks for.
#[derive(Default)]
struct Counter {
    barriers: usize,
    finishes: usize,
    reports: Vec<(usize, usize)>,
}

impl Steps for Counter {
    type Error = ();

    fn checkpoint(&mut self, _n_tokens: usize) -> Result<(), ()> {
        Ok(())
    }

    fn rollback(&mut self) {}

    fn forward(&mut self, _window: Range<usize>) -> Result<(), ()> {
        Ok(())
    }

    fn barrier(&mut self) -> Result<(), ()> {
        self.barriers += 1;
        Ok(())
    }

    fn finish(&mut self) -> Result<(), ()> {
        self.finishes += 1;
        Ok(())
    }

    fn progress(&mut self, done: usize, total: usize) -> Result<(), ()> {
        self.reports.push((done, total));
        Ok(())
    }
}

#[test]
fn the_barrier_runs_once_per_leading_chunk() {
    for (total, step, expected) in [(7, 2, 3), (4, 8, 1), (1, 8, 0)] {
        let mut counter = Counter::default();
        run(&mut counter, total, step).unwrap();
        assert_eq!((counter.barriers, counter.finishes), (expected, 1), "P {total}, step {step}");
    }
}

#[test]
fn the_barrier_evaluates_the_buffers_of_every_layer() {
    let mut caches = plain(3);
    let mut model = MockModel::new(5);
    // Everything but the last token has passed a barrier, so the buffers before it are real.
    prefill_full(&mut model, &prompt(4), &mut caches, 8).unwrap();
    assert!(caches.iter().all(|cache| cache.as_dyn().buffers().iter().all(|buffer| !buffer.is_available())));
    materialize_caches(&caches).unwrap();
    assert!(caches.iter().all(|cache| cache.as_dyn().buffers().iter().all(|buffer| buffer.is_available())));
}

#[test]
fn the_barrier_takes_the_stored_buffers_not_the_sliced_state() {
    let mut caches = vec![Cache::Rotating(RotatingKvCache::new(4, 2).unwrap())];
    let mut seen = 0;
    let mut model = MockModel::new(5);
    for window in windows(9, 1) {
        let tokens = Array::from_i32(&[window.start as i32]).unwrap().reshape(&[1, 1]).unwrap();
        mlxrs_py::prefill::Model::forward(&mut model, &tokens, &mut caches).unwrap();
        if window.end < 9 {
            materialize_caches(&caches).unwrap();
            seen += 1;
            assert!(caches[0].as_dyn().buffers().iter().all(|buffer| buffer.is_available()));
        }
    }
    assert_eq!(seen, 8);

    // Two tokens one by one leave a buffer of four rows, of which the valid ones are two.
    let mut cache = RotatingKvCache::new(4, 2).unwrap();
    for token in 0..2 {
        let rows = crate::mock::rows_of(&[token]);
        mlxrs_py::cache::KvCache::update(&mut cache, &rows, &rows).unwrap();
    }
    let cache = Cache::Rotating(cache);
    let buffers: usize = cache.as_dyn().buffers().iter().map(|buffer| buffer.n_bytes()).sum();
    let (keys, values) = cache.as_kv().unwrap().keys_and_values().unwrap();
    let valid: usize = [keys, values].iter().flat_map(KvTensor::arrays).map(Array::n_bytes).sum();
    assert!(buffers > valid, "{buffers} > {valid}");
}

#[test]
fn progress_is_told_at_the_start_and_after_every_window() {
    let mut counter = Counter::default();
    run(&mut counter, 10, 4).unwrap();
    assert_eq!(counter.reports, [(0, 10), (4, 10), (8, 10), (9, 10), (10, 10)]);
}

#[test]
fn a_fault_puts_every_cache_back_to_the_last_boundary() {
    let ring = |max_size, keep| Cache::Rotating(RotatingKvCache::new(max_size, keep).unwrap());
    for fail_at in 0..4 {
        let mut caches = plain(1);
        caches.extend([ring(4, 1), ring(64, 0), ring(1, 0)]);
        let mut model = MockModel { fail_at: Some(fail_at), ..MockModel::new(5) };
        prefill_full(&mut model, &prompt(10), &mut caches, 3).unwrap_err();
        let boundary = [0, 3, 6, 9][fail_at];
        assert!(caches.iter().all(|cache| cache.as_kv().unwrap().offset() == boundary), "{fail_at}: {caches:?}");

        // Going on from there gives what an undisturbed run gives.
        let mut cold = plain(1);
        cold.extend([ring(4, 1), ring(64, 0), ring(1, 0)]);
        {
            prefill_full(&mut MockModel::new(5), &prompt(10)[boundary..], &mut caches, 3).unwrap();
            prefill_full(&mut MockModel::new(5), &prompt(10), &mut cold, 3).unwrap();
            for (a, b) in caches.iter().zip(&cold) {
                let rows = |cache: &Cache| match cache.as_kv().unwrap().keys_and_values().unwrap().0 {
                    KvTensor::Dense(keys) => tokens_of(&keys),
                    KvTensor::Quantized(_) => Vec::new(),
                };
                assert_eq!(rows(a), rows(b), "{fail_at}");
            }
        }
    }
}
