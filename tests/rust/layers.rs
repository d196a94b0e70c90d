//! Caches without keys and values: recurrent states. Values are compared with mlx-lm in tests/parity.

use crate::mock::rows_of;
use mlxrs_py::array::{Array, Dtype};
use mlxrs_py::cache::{ArraysCache, Cache, LayerCache};
use mlxrs_py::{Error, Result};

/// A slot `(B, 2)` that holds its sequences' numbers.
fn slot(sequences: &[i32]) -> Array {
    let column = Array::from_i32(sequences).unwrap().reshape(&[-1, 1]).unwrap();
    Array::concatenate(&[&column, &column], 1).unwrap()
}

fn filled(sequences: &[i32]) -> ArraysCache {
    ArraysCache { slots: vec![Some(slot(sequences)), None], ..ArraysCache::default() }
}

fn sequences(cache: &ArraysCache) -> Vec<i32> {
    cache.slots[0].as_ref().unwrap().to_i32().unwrap().into_iter().step_by(2).collect()
}

fn numbers(array: &Option<Array>) -> Vec<i32> {
    array.as_ref().unwrap().to_i32().unwrap()
}

#[test]
fn batches_are_filtered_joined_and_taken_apart() {
    let mut cache = filled(&[10, 11, 12]);
    cache.set_lengths(Some(Array::from_i32(&[1, 2, 3]).unwrap())).unwrap();
    cache.filter(&[2, -3]).unwrap();
    assert_eq!((sequences(&cache), numbers(&cache.lengths)), (vec![12, 10], vec![3, 1]));
    cache.extend(&filled(&[20])).unwrap();
    assert_eq!((sequences(&cache), numbers(&cache.lengths)), (vec![12, 10, 20], vec![3, 1, 0]));
    let parts: Vec<_> = (0..3).map(|at| cache.extract(at).unwrap()).collect();
    assert_eq!(sequences(&parts[1]), [10]);
    let merged = ArraysCache::merge(&[parts[2].clone(), ArraysCache::new(2), parts[0].clone()]).unwrap();
    assert_eq!((sequences(&merged), merged.slots[1].is_none()), (vec![20, 0, 12], true));
}

#[test]
fn what_does_not_fit_changes_nothing() {
    let mut cache = filled(&[10, 11]);
    let before = format!("{:?}", cache.state());
    let wrong: [fn(&mut ArraysCache) -> Result<()>; 6] = [
        |cache| cache.filter(&[0, 2]),
        |cache| cache.extend(&ArraysCache::new(3)),
        |cache| cache.extend(&ArraysCache { slots: vec![Some(rows_of(&[1])), None], ..ArraysCache::default() }),
        |cache| cache.set_lengths(Some(slot(&[1, 2]))),
        |cache| cache.trim(1).map(|_| ()),
        |cache| {
            cache.set_state(filled(&[1]).slots.into_iter().flatten().map(mlxrs_py::cache::State::Array).next().unwrap())
        },
    ];
    for attempt in wrong {
        assert!(matches!(attempt(&mut cache), Err(Error::Value { .. })));
        assert_eq!(format!("{:?}", cache.state()), before);
    }
    ArraysCache::merge(&[]).unwrap_err();
    ArraysCache::merge(&[filled(&[1]), filled(&[1, 2])]).unwrap_err();
    // A slot that does not hold the whole batch is not cut.
    cache.slots[1] = Some(slot(&[1]));
    cache.filter(&[0]).unwrap_err();
}

#[test]
fn a_recurrent_state_has_no_keys_and_goes_back_whole() {
    let mut cache = Cache::Arrays(filled(&[10]));
    assert!(matches!(cache.as_kv().map(|_| ()), Err(Error::Type { .. })));
    assert!(matches!(cache.as_kv_mut().map(|_| ()), Err(Error::Type { .. })));
    assert_eq!((cache.as_dyn().size(), cache.as_dyn().nbytes(), cache.as_dyn().is_trimmable()), (0, 8, false));
    let checkpoint = cache.as_dyn().checkpoint(4);
    let Cache::Arrays(arrays) = &mut cache else { unreachable!() };
    (arrays.slots[0], arrays.slots[1]) = (Some(slot(&[99])), Some(slot(&[98])));
    cache.as_dyn_mut().rollback(checkpoint);
    let Cache::Arrays(arrays) = &cache else { unreachable!() };
    assert_eq!((sequences(arrays), arrays.slots[1].is_none()), (vec![10], true));
}

#[test]
fn a_mask_hides_padding_and_what_is_past_the_end() {
    let mut cache = ArraysCache::new(1);
    assert!(cache.make_mask(3).unwrap().is_none());
    cache.set_left_padding(Some(Array::from_i32(&[0, 2]).unwrap())).unwrap();
    cache.prepare(Array::from_i32(&[2, 3]).unwrap()).unwrap();
    let mask = cache.make_mask(4).unwrap().unwrap();
    assert_eq!((mask.shape(), mask.dtype()), ([2, 4].as_slice(), Dtype::Bool));
    assert_eq!(mask.to_bytes().unwrap(), [1, 1, 0, 0, 0, 0, 1, 0]);
    cache.advance(2).unwrap();
    assert_eq!((numbers(&cache.left_padding), numbers(&cache.lengths)), (vec![-2, 0], vec![0, 1]));
    cache.finalize();
    assert!(cache.make_mask(4).unwrap().is_none());
}
