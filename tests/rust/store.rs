//! Trees of tokens and the order in which prompts go, beside naive models.

use mlxrs_py::store::{Gone, Key, Kind, Limits, Lru, Match, Prompts, Radix};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Few different tokens, so that sequences share prefixes.
fn tokens() -> impl Strategy<Value = Vec<i64>> {
    prop::collection::vec(prop::sample::select(vec![-1, 0, 7, i64::MAX]), 0..7)
}

#[derive(Clone, Debug)]
enum Step {
    Insert(Vec<i64>),
    Remove(Vec<i64>),
    RemovePrefixes(Vec<i64>),
    Search(Vec<i64>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => tokens().prop_map(Step::Insert),
        2 => tokens().prop_map(Step::Remove),
        1 => tokens().prop_map(Step::RemovePrefixes),
        3 => tokens().prop_map(Step::Search),
    ];
    prop::collection::vec(step, 0..60)
}

type Naive = BTreeMap<Vec<i64>, usize>;

fn starts(naive: &Naive, prefix: &[i64]) -> bool {
    naive.keys().any(|stored| stored.starts_with(prefix))
}

/// Proper prefixes that are stored, the shortest first.
fn prefixes(naive: &Naive, query: &[i64]) -> Vec<Vec<i64>> {
    (0..query.len()).map(|n| query[..n].to_vec()).filter(|prefix| naive.contains_key(prefix)).collect()
}

fn check_search(tree: &Radix<usize>, naive: &Naive, query: &[i64]) {
    let Match { exact, shorter, longer, common_prefix } = tree.search(query);
    assert_eq!(exact.map(|key| tree.tokens(key)), naive.get_key_value(query).map(|(stored, _)| stored.clone()));
    assert_eq!(exact, tree.find(query));
    if exact.is_some() {
        return;
    }
    let common = (0..=query.len()).rev().find(|&n| n == 0 || starts(naive, &query[..n])).unwrap_or(0);
    assert_eq!(common_prefix, common);
    assert_eq!(shorter.map(|(key, _)| tree.tokens(key)), prefixes(naive, query).pop());
    assert!(shorter.is_none_or(|(key, n_tokens)| tree.depth(key) == n_tokens));
    let candidates = naive.keys().filter(|stored| common > 0 && stored.starts_with(&query[..common]));
    assert_eq!(longer.map(|key| tree.depth(key)), candidates.map(Vec::len).min());
    assert!(longer.is_none_or(|key| tree.tokens(key).starts_with(&query[..common])));
}

proptest! {
    #[test]
    fn a_tree_does_what_a_map_of_sequences_does(steps in steps()) {
        let (mut tree, mut naive, mut keys) = (Radix::default(), Naive::new(), BTreeMap::<Vec<i64>, Key>::new());
        for (turn, step) in steps.into_iter().enumerate() {
            match step {
                Step::Insert(query) => {
                    let (key, before) = tree.insert(&query, turn);
                    prop_assert_eq!(before, naive.insert(query.clone(), turn));
                    keys.insert(query, key);
                }
                Step::Remove(query) => {
                    let removed = tree.find(&query).and_then(|key| tree.remove(key));
                    prop_assert_eq!(removed, naive.remove(&query));
                }
                Step::RemovePrefixes(query) => {
                    let on_path = query.is_empty() || starts(&naive, &query);
                    let stored = prefixes(&naive, &query);
                    let expected = on_path.then(|| {
                        stored.iter().filter_map(|stored| Some((stored.len(), naive.remove(stored)?))).collect::<Vec<_>>()
                    });
                    prop_assert_eq!(tree.remove_prefixes(&query), expected);
                }
                Step::Search(query) => check_search(&tree, &naive, &query),
            }
            // A key stays right until its own value goes.
            for (stored, value) in &naive {
                prop_assert_eq!(tree.get(keys[stored]), Some(value));
                prop_assert_eq!(&tree.tokens(keys[stored]), stored);
            }
            let all: Naive = tree.iter().map(|(key, &value)| (tree.tokens(key), value)).collect();
            prop_assert_eq!(&all, &naive);
            prop_assert_eq!((tree.len(), tree.is_empty()), (naive.len(), naive.is_empty()));
        }
    }

    #[test]
    fn entries_go_as_in_three_plain_lists(steps in prop::collection::vec((0..6_u8, 0..3_usize, 0..9_u64), 0..80)) {
        let mut lru = Lru::default();
        // Per kind the entries with their bytes, the one used last at the end.
        let mut lists: [Vec<(u64, u64)>; 3] = Default::default();
        for (step, kind, number) in steps {
            let ids: Vec<u64> = lists.iter().flatten().map(|&(id, _)| id).collect();
            let some = (!ids.is_empty()).then(|| ids[number as usize % ids.len()]);
            match (step, some) {
                (0..=2, _) => {
                    let id = lru.push(Kind::ALL[kind], number, |id| id);
                    lists[kind].push((id, number));
                }
                (3, Some(id)) => {
                    lru.touch(id);
                    for list in &mut lists {
                        if let Some(at) = list.iter().position(|entry| entry.0 == id) {
                            let entry = list.remove(at);
                            list.push(entry);
                        }
                    }
                }
                (4, Some(id)) => {
                    lru.resize(id, number + 100);
                    lists.iter_mut().flatten().filter(|entry| entry.0 == id).for_each(|entry| entry.1 = number + 100);
                }
                _ => {
                    let next = (0..2).find(|&a| !lists[a].is_empty() && lists[a].len() >= lists[a + 1].len()).unwrap_or(2);
                    let expected = lists[next].first().map(|entry| entry.0);
                    prop_assert_eq!(lru.victim(), expected);
                    if let Some(id) = expected {
                        prop_assert_eq!(lru.remove(id), Some(id));
                        lists[next].remove(0);
                    }
                }
            }
            for (kind, list) in Kind::ALL.into_iter().zip(&lists) {
                let bytes: u64 = list.iter().map(|entry| entry.1).sum();
                prop_assert_eq!(lru.stats(kind), (list.len(), u128::from(bytes)));
            }
            let order: Vec<u64> = lists.iter().flatten().map(|entry| entry.0).collect();
            prop_assert_eq!(lru.iter().map(|(id, ..)| id).collect::<Vec<_>>(), order);
            prop_assert_eq!(lru.len(), lists.iter().map(Vec::len).sum::<usize>());
        }
    }

    #[test]
    fn limits_hold_and_an_entry_is_found_until_it_goes(
        steps in prop::collection::vec((0..2_u64, tokens(), 0..3_usize, 0..40_u64, any::<bool>()), 1..40),
        n_prompts in 0..5_u64,
        n_bytes in 0..60_u64,
    ) {
        let mut prompts = Prompts::new(Limits { n_prompts, n_bytes });
        let mut n_gone = 0;
        for (turn, (model, query, kind, size, replaces)) in steps.into_iter().enumerate() {
            let mut gone = Gone::default();
            let before = prompts.len();
            prompts.insert(model, &query, (Kind::ALL[kind], size, turn), replaces, &mut gone);
            if size > n_bytes {
                prop_assert_eq!((&gone.values, prompts.len()), (&vec![turn], before));
            }
            prompts.settle(&mut gone);
            n_gone += gone.values.len();
            prop_assert!(prompts.len() as u64 <= n_prompts && prompts.n_bytes() <= u128::from(n_bytes));
            prop_assert_eq!(prompts.len() + n_gone, turn + 1);
            let all: Vec<_> = prompts.iter().map(|(id, _, model, _)| (id, model, prompts.tokens(id).unwrap())).collect();
            for (id, model, tokens) in all {
                prop_assert_eq!(prompts.nearest(model, &tokens).exact.map(|found| (found.id, found.n_tokens)), Some((id, tokens.len())));
                prop_assert!(!gone.models.contains(&model));
            }
        }
    }
}

#[test]
fn no_depth_overflows_the_stack() {
    let query: Vec<i64> = (0..1_000_000).collect();
    let mut tree = Radix::default();
    // A branch at each of the first tokens, and one that goes a long way.
    for n_tokens in 1..=3_000 {
        tree.insert(&query[..n_tokens], n_tokens);
    }
    tree.insert(&query, 0);
    let copy = tree.clone();
    assert_eq!(tree.search(&query[..999_999]).common_prefix, 999_999);
    let past = [&query[..], &[5]].concat();
    assert_eq!(tree.search(&past).shorter.map(|(_, n_tokens)| n_tokens), Some(1_000_000));
    assert_eq!(tree.remove_prefixes(&query).map(|taken| taken.len()), Some(3_000));
    assert_eq!(tree.tokens(tree.find(&query).unwrap()), query);
    drop(tree);
    assert_eq!(copy.iter().count(), 3_001);
}

#[test]
fn an_entry_that_grew_beyond_the_limit_goes_alone() {
    let mut prompts = Prompts::new(Limits { n_prompts: 10, n_bytes: 10 });
    let mut gone = Gone::default();
    for (turn, token) in [1, 2, 3].into_iter().enumerate() {
        prompts.insert(0, &[token], (Kind::User, 3, turn), true, &mut gone);
    }
    let newest = prompts.nearest(0, &[3]).exact.unwrap().id;
    prompts.resize(newest, 11);
    prompts.settle(&mut gone);
    assert_eq!((gone.values, gone.models), (vec![2], vec![]));
    assert_eq!((prompts.len(), prompts.n_bytes()), (2, 6));
}

#[test]
fn a_model_is_told_when_its_last_prompt_goes() {
    let mut prompts = Prompts::new(Limits { n_prompts: 1, n_bytes: 10 });
    let mut gone = Gone::default();
    prompts.insert(0, &[1], (Kind::User, 3, "a"), true, &mut gone);
    prompts.insert(1, &[1], (Kind::User, 3, "b"), true, &mut gone);
    prompts.settle(&mut gone);
    assert_eq!((gone.values, gone.models), (vec!["a"], vec![0]));
}
