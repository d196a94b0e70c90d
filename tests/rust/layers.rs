//! Caches without keys and values: recurrent states. Values are compared with mlx-lm in tests/parity.

use crate::mock::rows_of;
use mlxrs_py::array::{Array, Dtype};
use mlxrs_py::cache::{ArraysCache, Cache, LayerCache, ListCache, RotatingKvCache, StandardKvCache};
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

fn list() -> ListCache {
    let mut children = vec![
        Cache::Standard(StandardKvCache::default()),
        Cache::List(ListCache { children: vec![Cache::Rotating(RotatingKvCache::new(8, 0).unwrap())] }),
    ];
    for (at, n) in [(0, 6), (1, 4)] {
        let rows = rows_of(&(0..n).collect::<Vec<_>>());
        let mut child = &mut children[at];
        if let Cache::List(inner) = child {
            child = &mut inner.children[0];
        }
        child.as_kv_mut().unwrap().update(&rows, &rows).unwrap();
    }
    ListCache { children }
}

#[test]
fn a_list_trims_all_its_caches_by_the_same_number_or_none() {
    let mut list = list();
    assert_eq!((list.size(), list.n_held(), list.is_trimmable(), list.is_empty()), (6, 4, true, false));
    assert_eq!(list.trim(99).unwrap(), 4);
    assert_eq!(list.children.iter().map(|child| child.as_dyn().size()).collect::<Vec<_>>(), [2, 0]);
    list.children.push(Cache::Arrays(ArraysCache::new(1)));
    assert!(matches!(list.trim(1), Err(Error::Value { .. })));
    assert_eq!((list.trim(0).unwrap(), list.children[0].as_dyn().size()), (0, 2));
    let mut none = ListCache::default();
    assert_eq!((none.trim(3).unwrap(), none.size(), none.is_empty(), none.nbytes()), (0, 0, true, 0));
}

#[test]
fn a_list_has_a_state_and_goes_back_with_its_children() {
    let mut cache = Cache::List(list());
    let before = format!("{:?}", cache.as_dyn().state());
    let again = Cache::from_state(cache.cache_state()).unwrap();
    assert_eq!(format!("{:?}", again.as_dyn().state()), before);
    assert!(matches!(cache.as_kv().map(|_| ()), Err(Error::Type { .. })));
    cache.as_dyn().materialize().unwrap();
    let checkpoint = cache.as_dyn().checkpoint(1);
    let Cache::List(list) = &mut cache else { unreachable!() };
    let rows = rows_of(&[9]);
    list.children[0].as_kv_mut().unwrap().update(&rows, &rows).unwrap();
    assert_eq!(list.size(), 7);
    cache.as_dyn_mut().rollback(checkpoint);
    assert_eq!(format!("{:?}", cache.as_dyn().state()), before);
    cache.as_dyn_mut().set_state(mlxrs_py::cache::State::List(vec![mlxrs_py::cache::State::None])).unwrap_err();
    assert_eq!(format!("{:?}", cache.as_dyn().state()), before);
}
