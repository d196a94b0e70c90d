//! Handles, errors and host bytes.

use crate::mock::{rows_of, tokens_of};
use mlxrs_py::array::{Array, Dtype, eval};
use mlxrs_py::cache::{Cache, CacheConfig, KvCache, LayerCache, QuantizedKvCache, StandardKvCache, make_prompt_cache};
use mlxrs_py::{Error, live_handles};
use std::sync::Mutex;

/// Handles are counted for the whole process: tests that compare counts must not overlap with each other, and the
/// count of the other tests is waited out by repeating.
static COUNTING: Mutex<()> = Mutex::new(());

#[test]
fn an_error_of_mlx_is_a_result_with_its_words() {
    let (a, b) = (Array::zeros(&[2, 3], Dtype::F32).unwrap(), Array::zeros(&[4, 5], Dtype::F32).unwrap());
    let error = a.plus(&b).unwrap_err();
    let Error::Mlx { op, message } = &error else { panic!("{error:?}") };
    assert_eq!(*op, "add");
    assert!(message.contains("broadcast") && !message.contains(".cpp"), "{message}");
}

#[test]
fn an_error_of_one_thread_is_not_seen_by_another() {
    let threads: Vec<_> = (2..9)
        .map(|n| {
            std::thread::spawn(move || {
                for _ in 0..50 {
                    let a = Array::zeros(&[n, 3], Dtype::F32).unwrap();
                    let b = Array::zeros(&[n + 100, 3], Dtype::F32).unwrap();
                    let message = a.plus(&b).unwrap_err().to_string();
                    assert!(message.contains(&format!("({},3)", n + 100)), "{n}: {message}");
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn a_scalar_and_an_empty_array_have_bytes() {
    assert_eq!(Array::scalar(7).to_bytes().unwrap(), 7_i32.to_ne_bytes());
    assert!(Array::zeros(&[0], Dtype::F32).unwrap().to_bytes().unwrap().is_empty());
    assert!(Array::zeros(&[1, 0, 3], Dtype::F32).unwrap().to_bytes().unwrap().is_empty());
}

#[test]
fn bytes_come_in_row_major_order_from_slices_and_broadcasts() {
    let numbers = Array::arange(0, 24).unwrap().reshape(&[1, 2, 4, 3]).unwrap();
    let bytes = |array: &Array| -> Vec<i32> {
        array.to_bytes().unwrap().chunks_exact(4).map(|b| i32::from_ne_bytes(b.try_into().unwrap())).collect()
    };
    assert_eq!(bytes(&numbers.rows(1, 3).unwrap()), [3, 4, 5, 6, 7, 8, 15, 16, 17, 18, 19, 20]);
    let sum = Array::scalar(0).plus(&numbers.rows(0, 1).unwrap()).unwrap();
    assert_eq!(bytes(&sum), [0, 1, 2, 12, 13, 14]);
}

#[test]
fn a_slice_of_a_buffer_is_read_without_a_copy() {
    let mut cache = StandardKvCache::default();
    let rows = rows_of(&(0..300).collect::<Vec<_>>());
    cache.update(&rows, &rows).unwrap();
    let keys = cache.keys.clone().unwrap();
    eval("test", [&keys]).unwrap();
    let mut runs = 0;
    keys.rows(0, 300)
        .unwrap()
        .for_each_run(&mut |run| {
            runs += 1;
            assert_eq!(run.len(), 300 * 16);
            Ok(())
        })
        .unwrap();
    assert_eq!(runs, 1);
    assert_eq!(tokens_of(&keys.rows(298, 300).unwrap()), [298, 299]);
}

#[test]
fn updates_begin_with_an_array_that_differs_in_its_number_of_rows_only() {
    let zeros = |n_rows| Array::zeros(&[1, 1, n_rows, 2], Dtype::F32).unwrap();
    let buffer = zeros(4);
    eval("test", [&buffer]).unwrap();
    let updated = buffer.with_rows(&zeros(1), 2).unwrap();
    let grown = Array::concatenate(&[&updated, &zeros(4)], 2).unwrap();
    assert!(grown.before_unscheduled_updates().is_same(&buffer));
    // Zeros are a scalar, repeated.
    let fresh = zeros(4);
    assert!(fresh.before_unscheduled_updates().is_same(&fresh));
}

#[test]
fn no_handle_leaks_on_success_or_on_failure() {
    let _alone = COUNTING.lock();
    let work = || {
        let config = CacheConfig { num_hidden_layers: 2, sliding_window: Some(5) };
        let mut caches = make_prompt_cache(&config).unwrap();
        caches.push(Cache::Standard(StandardKvCache::default()));
        for n in [3, 1, 1, 1, 4, 1] {
            let rows = rows_of(&vec![1; n]);
            for cache in &mut caches {
                cache.as_kv_mut().unwrap().update(&rows, &rows).unwrap();
                let wrong = Array::zeros(&[1, 2, 1, 4], Dtype::F32).unwrap();
                cache.as_kv_mut().unwrap().update(&wrong, &wrong).unwrap_err();
                cache.as_kv().unwrap().make_mask(n, Some(2), true).unwrap();
            }
        }
        let mut quantized = QuantizedKvCache::new(32, 4).unwrap();
        let rows = Array::zeros(&[1, 1, 3, 64], Dtype::F32).unwrap();
        quantized.update(&rows, &rows).unwrap();
        rows.plus(&Array::zeros(&[7, 5], Dtype::F32).unwrap()).unwrap_err();
        eval("test", quantized.buffers()).unwrap();
    };
    work();
    // Other tests run beside this one: a leak shows in every round, their handles do not.
    let leaked = (0..20)
        .map(|_| {
            let before = live_handles();
            work();
            live_handles() as i64 - before as i64
        })
        .min();
    assert!(leaked <= Some(0), "{leaked:?} handles more in every round");
}
