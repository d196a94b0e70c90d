//! The caches: shapes that do not fit, trims, masks, states. Values are compared with mlx-lm in tests/parity.

use crate::mock::{rows_of, tokens_of};
use mlxrs_py::array::{Array, Dtype};
use mlxrs_py::cache::{
    Cache, ChunkedKvCache, ConcatenateKvCache, KvCache, KvTensor, LayerCache, MaskMode, QuantizedKvCache,
    RotatingKvCache, StandardKvCache,
};

fn all() -> Vec<Cache> {
    vec![
        Cache::Standard(StandardKvCache::default()),
        Cache::Rotating(RotatingKvCache::new(8, 2).unwrap()),
        Cache::Concatenate(ConcatenateKvCache::default()),
        Cache::Chunked(ChunkedKvCache::new(8).unwrap()),
    ]
}

fn seen(tensor: &KvTensor) -> Vec<i32> {
    tokens_of(&tensor.arrays()[0])
}

fn feed(cache: &mut dyn KvCache, tokens: std::ops::Range<i32>) -> Vec<i32> {
    let rows = rows_of(&tokens.collect::<Vec<_>>());
    seen(&cache.update(&rows, &rows).unwrap().0)
}

fn mask_rows(mask: MaskMode) -> Vec<Vec<u8>> {
    let MaskMode::Array(mask) = mask else { panic!("{mask:?}") };
    let width = *mask.shape().last().unwrap() as usize;
    mask.to_bytes().unwrap().chunks(width).map(<[u8]>::to_vec).collect()
}

#[test]
fn every_cache_names_its_class_and_counts_its_tokens() {
    let names = ["KVCache", "RotatingKVCache", "ConcatenateKVCache", "ChunkedKVCache"];
    for (mut cache, name) in all().into_iter().zip(names) {
        assert_eq!(cache.as_dyn().reference_class_name(), name);
        assert!(cache.as_dyn().is_empty() && cache.as_dyn().nbytes() == 0);
        assert_eq!(feed(cache.as_kv_mut().unwrap(), 0..3), [0, 1, 2]);
        assert_eq!(feed(cache.as_kv_mut().unwrap(), 3..4), [0, 1, 2, 3]);
        assert_eq!((cache.as_kv().unwrap().offset(), cache.as_dyn().size()), (4, 4));
        assert!(!cache.as_dyn().is_empty());
    }
}

#[test]
fn an_update_that_does_not_fit_changes_nothing() {
    let wrong = [
        ([1, 2, 1, 4], [1, 2, 1, 4]),
        ([2, 1, 1, 4], [2, 1, 1, 4]),
        ([1, 1, 1, 5], [1, 1, 1, 4]),
        ([1, 1, 2, 4], [1, 1, 1, 4]),
    ];
    for mut cache in all() {
        feed(cache.as_kv_mut().unwrap(), 0..3);
        let before = format!("{:?}", cache.as_dyn().state());
        for (keys, values) in wrong {
            let (keys, values) = (Array::zeros(&keys, Dtype::F32).unwrap(), Array::zeros(&values, Dtype::F32).unwrap());
            cache.as_kv_mut().unwrap().update(&keys, &values).unwrap_err();
            assert_eq!(format!("{:?}", cache.as_dyn().state()), before);
        }
        let flat = Array::zeros(&[1, 1, 4], Dtype::F32).unwrap();
        cache.as_kv_mut().unwrap().update(&flat, &flat).unwrap_err();
        assert_eq!(feed(cache.as_kv_mut().unwrap(), 3..5), [0, 1, 2, 3, 4]);
    }
}

#[test]
fn trimmed_tokens_do_not_come_back() {
    for mut cache in all() {
        feed(cache.as_kv_mut().unwrap(), 0..6);
        assert_eq!(cache.as_dyn_mut().trim(2).unwrap(), 2);
        assert_eq!(feed(cache.as_kv_mut().unwrap(), 9..10), [0, 1, 2, 3, 9]);
        assert_eq!(cache.as_dyn_mut().trim(100).unwrap(), 5);
        assert_eq!(cache.as_kv().unwrap().offset(), 0);
        assert_eq!(feed(cache.as_kv_mut().unwrap(), 7..9), [7, 8]);
    }
}

#[test]
fn a_full_ring_refuses_to_be_trimmed() {
    let mut ring = RotatingKvCache::new(8, 2).unwrap();
    feed(&mut ring, 0..8);
    assert!(!ring.is_trimmable());
    assert!(ring.trim(1).unwrap_err().to_string().contains("max_size=8"));
    assert_eq!(ring.trim(0).unwrap(), 0);
    assert_eq!(ring.offset(), 8);
}

#[test]
fn a_ring_needs_room_for_new_tokens() {
    for (max_size, keep) in [(0, 0), (4, 4), (4, 9)] {
        let error = RotatingKvCache::new(max_size, keep).unwrap_err().to_string();
        assert!(error.contains(&format!("max_size={max_size}")), "{error}");
    }
}

#[test]
fn a_ring_returns_its_rows_as_mlx_lm_lays_them() {
    let mut ring = RotatingKvCache::new(8, 2).unwrap();
    assert_eq!(feed(&mut ring, 0..12), (0..12).collect::<Vec<_>>());
    assert_eq!(feed(&mut ring, 12..13), [0, 1, 12, 7, 8, 9, 10, 11]);
    assert_eq!(feed(&mut ring, 13..16), [0, 1, 8, 9, 10, 11, 12, 13, 14, 15]);
}

#[test]
fn a_chunk_drops_its_front_and_keeps_counting() {
    let mut chunk = ChunkedKvCache::new(4).unwrap();
    feed(&mut chunk, 0..6);
    chunk.maybe_trim_front().unwrap();
    assert_eq!((chunk.offset(), chunk.start_position, chunk.size()), (6, 2, 4));
    assert_eq!(mask_rows(chunk.make_mask(2, None, true).unwrap()), [[1, 1, 1, 1, 1, 0], [1; 6]]);
    assert_eq!(feed(&mut chunk, 6..8), [2, 3, 4, 5, 6, 7]);
    assert_eq!((chunk.trim(99).unwrap(), chunk.offset()), (6, 2));
    ChunkedKvCache::new(0).unwrap_err();
    chunk.offset = 1;
    let rows = rows_of(&[1]);
    assert!(chunk.update(&rows, &rows).unwrap_err().to_string().contains("start_position <= offset 1"));
}

#[test]
fn a_copy_is_independent() {
    for mut cache in all() {
        feed(cache.as_kv_mut().unwrap(), 0..3);
        let mut copy = cache.as_dyn().copy();
        assert_eq!(feed(copy.as_kv_mut().unwrap(), 7..8), [0, 1, 2, 7]);
        assert_eq!(feed(cache.as_kv_mut().unwrap(), 3..4), [0, 1, 2, 3]);
    }
}

#[test]
fn quantization_asks_for_whole_groups_and_known_bits() {
    for (group_size, bits) in [(64, 7), (16, 4), (0, 8), (64, 0)] {
        QuantizedKvCache::new(group_size, bits).unwrap_err();
    }
    let mut cache = QuantizedKvCache::new(64, 4).unwrap();
    let rows = Array::zeros(&[1, 1, 3, 80], Dtype::F32).unwrap();
    cache.update(&rows, &rows).unwrap_err();
    assert!(cache.is_empty());
    for bits in [2, 3, 4, 5, 6, 8] {
        let mut cache = QuantizedKvCache::new(32, bits).unwrap();
        let rows = Array::zeros(&[1, 1, 3, 96], Dtype::F16).unwrap();
        cache.update(&rows, &rows).unwrap();
        let (keys, _) = cache.keys_and_values().unwrap();
        assert_eq!(keys.arrays()[0].shape(), [1, 1, 3, 96 * bits as i32 / 32]);
    }
}

#[test]
fn masks_of_a_ring_show_what_it_holds() {
    let mut ring = RotatingKvCache::new(4, 0).unwrap();
    let expected: [&[u8]; 6] = [&[0, 1, 1], &[0, 0, 1, 1], &[1, 0, 0, 1], &[1, 1, 0, 0], &[0, 1, 1, 0], &[0, 0, 1, 1]];
    for t in 0..8 {
        if t >= 2 {
            assert_eq!(mask_rows(ring.make_mask(1, Some(2), false).unwrap()), [expected[t as usize - 2]], "token {t}");
        }
        feed(&mut ring, t..t + 1);
    }
}

/// What a token may see of the rows that an update returned, told from their positions.
fn visible(positions: &[i32], token: i32, keep: i32, window: Option<i32>, max_size: i32) -> Vec<u8> {
    let near = |p: i32| match window {
        Some(window) => p > token - window,
        None => p < keep || p > token - (max_size - keep),
    };
    positions.iter().map(|&p| u8::from(p <= token && near(p))).collect()
}

#[test]
fn a_ring_with_kept_rows_masks_by_position() {
    for (max_size, keep) in [(6, 2), (8, 2), (8, 1), (5, 4)] {
        for window in [None, Some(3), Some(4), Some(7)] {
            for updates in [vec![1; 14], vec![9, 6, 1, 1, 2], vec![3, 4, 5, 1, 6], vec![2, 1, 12, 3]] {
                let mut ring = RotatingKvCache::new(max_size, keep).unwrap();
                for n in updates {
                    let first = ring.offset() as i32;
                    let mask = ring.make_mask(n as usize, window, n > 1).unwrap();
                    let rows = feed(&mut ring, first..first + n);
                    let (keep, max_size, window) = (keep as i32, max_size as i32, window.map(|w| w as i32));
                    let expected: Vec<_> =
                        (first..first + n).map(|t| visible(&rows, t, keep, window, max_size)).collect();
                    match mask {
                        MaskMode::None => assert_eq!(expected, [vec![1; rows.len()]], "{max_size} {keep} {window:?}"),
                        mask => assert_eq!(mask_rows(mask), expected, "{max_size} {keep} {window:?} at {first}+{n}"),
                    }
                }
            }
        }
    }
}
