//! The prefill loop on a fake model.

use crate::mock::{MockModel, tokens_of};
use mlxrs_py::array::Array;
use mlxrs_py::cache::{Cache, CacheConfig, KvTensor, RotatingKvCache, make_prompt_cache};
use mlxrs_py::prefill::{Step, Steps, materialize_caches, prefill_full, run, windows};
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

/// Notes what the loop asks for, and fails where it is told to.
#[derive(Default)]
struct Trace {
    step: usize,
    calls: Vec<String>,
    fails: &'static str,
    hides: bool,
}

impl Trace {
    fn note(&mut self, call: String) -> Result<(), bool> {
        let fails = self.fails == call;
        self.calls.push(call);
        if fails { Err(self.hides) } else { Ok(()) }
    }

    fn run(total: usize, step: usize, fails: &'static str, hides: bool) -> (Result<(), bool>, Vec<String>) {
        let mut trace = Self { step, fails, hides, ..Self::default() };
        let result = run(&mut trace, total);
        (result, trace.calls)
    }

    fn count(&self, what: &str) -> usize {
        self.calls.iter().filter(|call| call.starts_with(what)).count()
    }
}

impl Steps for Trace {
    /// Whether it may hide another.
    type Error = bool;
    type Checkpoint = usize;
    type Pending = usize;

    fn step(&self) -> usize {
        self.step
    }

    fn checkpoint(&mut self, _n_tokens: usize) -> Result<usize, bool> {
        let at = self.count("forward");
        self.note(format!("checkpoint {at}")).map(|()| at)
    }

    fn rollback(&mut self, checkpoint: usize) {
        self.calls.push(format!("back to {checkpoint}"));
    }

    fn forward(&mut self, _window: Range<usize>) -> Result<(), bool> {
        self.note(format!("forward {}", self.count("forward")))
    }

    fn barrier(&mut self) -> Result<usize, bool> {
        let at = self.count("barrier");
        self.note(format!("barrier {at}")).map(|()| at)
    }

    fn wait(&mut self, pending: usize) -> Result<(), bool> {
        self.note(format!("wait {pending}"))
    }

    fn computed(&mut self) -> Result<(), bool> {
        self.note("computed".to_owned())
    }

    fn finish(&mut self) -> Result<(), bool> {
        self.note("finish".to_owned())
    }

    fn hides_failures(error: &bool) -> bool {
        *error
    }

    fn progress(&mut self, done: usize, total: usize) -> Result<(), bool> {
        self.note(format!("{done} of {total}"))
    }
}

#[test]
fn the_barrier_runs_once_per_leading_chunk() {
    for (total, step, expected) in [(7, 2, 3), (4, 8, 1), (1, 8, 0)] {
        let mut trace = Trace { step, ..Trace::default() };
        run(&mut trace, total).unwrap();
        let counts = ["barrier", "wait", "computed", "finish"].map(|what| trace.count(what));
        assert_eq!(counts, [expected, expected, expected, 1], "P {total}, step {step}");
    }
}

#[test]
fn a_window_is_waited_for_once_the_next_is_under_way() {
    let (result, calls) = Trace::run(7, 3, "", false);
    assert_eq!(result, Ok(()));
    let expected = [
        "0 of 7",
        "checkpoint 0",
        "forward 0",
        "barrier 0", //
        "checkpoint 1",
        "forward 1",
        "barrier 1",
        "wait 0",
        "computed",
        "3 of 7", //
        "checkpoint 2",
        "forward 2",
        "finish",
        "wait 1",
        "computed",
        "6 of 7",
        "7 of 7",
    ];
    assert_eq!(calls, expected);
}

#[test]
fn what_stops_a_prefill_undoes_the_newer_window_first_and_the_older_only_if_it_failed() {
    let undone = |fails, hides| {
        let (result, calls) = Trace::run(7, 3, fails, hides);
        assert_eq!(result, Err(hides), "{fails}");
        let at = calls.iter().position(|call| call == fails).unwrap();
        calls[at + 1..].to_vec()
    };
    assert_eq!(undone("forward 0", false), ["back to 0"]);
    // The first window is under way when the second cannot be built: it is waited for, told of, and stays.
    assert_eq!(undone("checkpoint 1", false), ["wait 0", "3 of 7"]);
    assert_eq!(undone("forward 1", false), ["back to 1", "wait 0", "3 of 7"]);
    assert_eq!(undone("barrier 1", false), ["back to 1", "wait 0", "3 of 7"]);
    // Unless what stopped the second may be the first one's failure, which MLX tells once.
    assert_eq!(undone("barrier 1", true), ["back to 1", "wait 0", "back to 0"]);
    assert_eq!(undone("checkpoint 1", true), ["wait 0", "back to 0"]);
    // The first fails when the second is under way.
    assert_eq!(undone("wait 0", false), ["wait 1", "back to 1", "back to 0"]);
    assert_eq!(undone("computed", false), ["wait 1", "back to 1"]);
    assert_eq!(undone("3 of 7", false), ["wait 1", "back to 1"]);
    // The last window is computed when the one before is told of.
    assert_eq!(undone("6 of 7", false), ["back to 2"]);
    assert_eq!(undone("finish", false), ["back to 2", "wait 1", "6 of 7"]);
    assert_eq!(undone("7 of 7", false), [] as [&str; 0]);
    assert_eq!(undone("0 of 7", false), [] as [&str; 0]);
}

#[test]
fn buffers_grow_by_longer_steps_until_the_prompt_is_over() {
    let mut caches = plain(2);
    let rows = |caches: &[Cache]| caches.iter().map(|cache| cache.as_dyn().buffers()[0].dim(2)).collect::<Vec<_>>();
    prefill_full(&mut MockModel::new(5), &prompt(3000), &mut caches, 500).unwrap();
    assert_eq!(rows(&caches), [3072, 3072]);
    let mut copies: Vec<_> = caches.iter().map(|cache| cache.as_dyn().copy()).collect();
    prefill_full(&mut MockModel::new(5), &prompt(200), &mut caches, 50).unwrap();
    assert_eq!(rows(&caches), [3328, 3328]);
    // Whatever comes without a prompt's length finds the steps of mlx-lm again, after a prompt that failed too.
    let mut model = MockModel { fail_at: Some(1), ..MockModel::new(5) };
    assert!(prefill_full(&mut model, &prompt(5000), &mut copies, 50).is_err());
    for caches in [&mut caches, &mut copies] {
        let before = rows(caches);
        let n_tokens = before[0] as i32 - caches[0].as_dyn().size() as i32 + 1;
        for cache in caches.iter_mut() {
            let new = crate::mock::rows_of(&vec![1; n_tokens as usize]);
            cache.as_kv_mut().unwrap().update(&new, &new).unwrap();
        }
        assert!(rows(caches).iter().zip(before).all(|(now, before)| *now <= before + 256), "{:?}", rows(caches));
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
fn progress_is_told_at_the_start_and_of_every_window() {
    let (_, calls) = Trace::run(10, 4, "", false);
    let told: Vec<_> = calls.iter().filter(|call| call.contains(" of ")).collect();
    assert_eq!(told, ["0 of 10", "4 of 10", "8 of 10", "9 of 10", "10 of 10"]);
}

#[test]
fn the_step_may_follow_the_memory() {
    let (mut model, mut caches) = (MockModel::new(5), plain(1));
    prefill_full(&mut model, &prompt(9000), &mut caches, Step::Auto).unwrap();
    // What a fake model takes fits anywhere.
    assert_eq!(model.windows, [512, 512, 4096, 3879, 1]);
    assert_eq!(caches[0].as_kv().unwrap().offset(), 9000);
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
