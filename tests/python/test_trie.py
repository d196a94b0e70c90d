"""PromptTrie: what is stored under tokens, and what is nearest to a query."""

import array
import copy
import gc
import pickle
import weakref

import mlx.core as mx
import numpy as np
import pytest

from mlxrs_py.cache import PromptTrie, PromptTrieResult

FORMS = {
    "list": list,
    "tuple": tuple,
    "range": lambda tokens: range(tokens[0], tokens[-1] + 1) if tokens else range(0),
    "bytes": bytes,
    "array": lambda tokens: array.array("q", tokens),
    "mlx": lambda tokens: mx.array(tokens, dtype=mx.int32),
    "mlx u64": lambda tokens: mx.array(tokens, dtype=mx.uint64),
    "strided mlx": lambda tokens: mx.array(tokens, dtype=mx.int16)[::-1][::-1],
    "strided NumPy": lambda tokens: np.repeat(np.array(tokens, dtype=np.int64), 2)[::2],
    **{f"NumPy {t}": lambda tokens, t=t: np.array(tokens, dtype=t) for t in ("i1", "i2", "i4", "i8")},
    **{f"NumPy {t}": lambda tokens, t=t: np.array(tokens, dtype=t) for t in ("u1", "u2", "u4", "u8")},
}


def trie_of(*sequences, model="m"):
    trie = PromptTrie()
    for tokens in sequences:
        trie.add(model, tokens, tuple(tokens))
    return trie


def found(trie, tokens, model="m"):
    result = trie.search(model, tokens)
    return result.exact, result.shorter, result.longer, result.common_prefix


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ([1, 2, 3], ([1, 2, 3], None, None, 0)),
        ([1], (None, None, [1, 2], 1)),
        ([1, 2, 3, 4], (None, [1, 2, 3], [1, 2, 3], 3)),
        ([1, 2, 9], (None, [1, 2], [1, 2], 2)),
        ([1, 9], (None, None, [1, 2], 1)),
        ([9], (None, None, None, 0)),
        ([], (None, None, None, 0)),
    ],
)
def test_a_search_gives_what_is_nearest(query, expected):
    assert found(trie_of([1, 2, 3], [1, 2]), query) == expected


def test_a_prefix_of_one_token_and_of_none_is_found():
    assert found(trie_of([1]), [1, 2]) == (None, [1], [1], 1)
    assert found(trie_of([]), [1, 2]) == (None, [], None, 0)
    assert found(trie_of([]), []) == ([], None, None, 0)


def test_of_longer_sequences_the_shortest_is_given_and_of_equals_that_on_the_newest_branch():
    assert found(trie_of([1, 2, 3, 4], [1, 2, 5]), [1, 2])[2] == [1, 2, 5]
    assert found(trie_of([1, 2, 3], [1, 4, 5], [1, 2, 6]), [1])[2] == [1, 4, 5]
    trie = trie_of([1, 2, 3], [1, 4, 5])
    trie.pop("m", [1, 4, 5])
    assert found(trie, [1])[2] == [1, 2, 3]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_tokens_of_every_form_are_the_same_tokens(form):
    trie = trie_of([3, 4, 5])
    assert trie.get("m", form([3, 4, 5])) == (3, 4, 5)
    assert trie.add("m", form([3, 4, 5]), "new") == (3, 4, 5)
    assert found(trie, form([3, 4, 5, 6])) == (None, [3, 4, 5], [3, 4, 5], 3)
    assert found(trie, form([3, 4])) == (None, None, [3, 4, 5], 2)
    assert trie.add("m", form([]), 0) is None
    assert trie.pop_prefixes("m", form([3, 4])) == [(0, 0)]
    assert trie.pop("m", form([3, 4, 5])) == "new"


def test_tokens_are_any_ints_of_64_bits():
    trie = PromptTrie()
    ends = [-(2**63), 2**63 - 1, -1, True, np.int32(7)]
    trie.add("m", ends, "ends")
    assert found(trie, [-(2**63), 2**63 - 1, -1, 1, 7])[0] == [-(2**63), 2**63 - 1, -1, 1, 7]
    for big in ([2**63], np.array([2**63], np.uint64), mx.array(np.array([2**63], np.uint64))):
        with pytest.raises(OverflowError):
            trie.search("m", big)


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        (None, TypeError),
        (5, TypeError),
        ({1, 2}, TypeError),
        ("12", TypeError),
        ([1, "2"], TypeError),
        ([1.0], TypeError),
        (np.array([1.0]), TypeError),
        (np.array([True]), TypeError),
        (np.array([1], dtype=">i8"), TypeError),
        (mx.array([1.0]), TypeError),
        (mx.array([True]), TypeError),
        (np.array(1), TypeError),
        (np.zeros((1, 2), int), ValueError),
        (mx.zeros((1, 2), mx.int32), ValueError),
    ],
)
def test_what_is_no_sequence_of_integers_is_refused(tokens, error):
    trie = trie_of([1])
    for call in (trie.get, trie.pop, trie.search, trie.pop_prefixes, lambda m, t: trie.add(m, t, 0)):
        with pytest.raises(error):
            call("m", tokens)
    assert trie.pop("m", [1]) == (1,)


def test_the_trie_keeps_its_own_tokens():
    tokens = [1, 2, 3]
    trie = trie_of(tokens)
    tokens.append(4)
    tokens[0] = 9
    assert trie.get("m", [1, 2, 3]) == (1, 2, 3)
    rows = np.array([5, 6])
    trie.add("m", rows, "rows")
    rows[:] = 0
    assert trie.get("m", [5, 6]) == "rows"


def test_values_are_any_objects():
    trie = PromptTrie()
    for value in (None, [1], object, trie):
        assert trie.add("m", [1], value) is None or value is not None
        assert trie.get("m", [1]) is value
    assert trie.pop("m", [1]) is trie


def test_models_are_told_apart_as_keys_of_a_dict_are():
    trie = PromptTrie()
    trie.add(1, [1], "int")
    assert trie.add(True, [1], "bool") == "int"
    trie.add(("a", None), [1], "tuple")
    # The same hash, but not equal.
    trie.add(-1, [1], "minus one")
    trie.add(-2, [1], "minus two")
    assert [trie.get(model, [1]) for model in (1.0, ("a", None), -1, -2)] == ["bool", "tuple", "minus one", "minus two"]
    with pytest.raises(TypeError, match="unhashable"):
        trie.add([], [1], 0)


def test_what_is_not_stored_raises_key_error():
    trie = trie_of([1, 2, 3], [1, 2, 4])
    for tokens in ([1, 2], [1], [1, 2, 3, 4], [7], []):
        for call in (trie.get, trie.pop):
            with pytest.raises(KeyError, match=f"got {len(tokens)} that are not"):
                call("m", tokens)
    for call in (trie.get, trie.pop, trie.pop_prefixes):
        with pytest.raises(KeyError, match="another"):
            call("other", [1, 2, 3])
    assert found(trie, [1, 2, 3], "other") == (None, None, None, 0)


def test_prefixes_are_taken_out_all_or_none():
    trie = trie_of([], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4])
    with pytest.raises(KeyError):
        trie.pop_prefixes("m", [1, 2, 9])
    assert trie.pop_prefixes("m", [1, 2, 3]) == [(0, ()), (1, (1,)), (2, (1, 2))]
    assert trie.pop_prefixes("m", [1, 2, 3]) == []
    assert trie.get("m", [1, 2, 3]) == (1, 2, 3)


class Key:
    """A model whose comparison is Python code."""

    def __init__(self, on_eq=lambda: None):
        self.on_eq = on_eq

    def __hash__(self):
        return 7

    def __eq__(self, other):
        self.on_eq()
        return self is other


def test_a_model_whose_comparison_raises_leaves_the_trie_as_it_was():
    def fail():
        raise ZeroDivisionError

    trie, first, bad = PromptTrie(), Key(), Key(fail)
    trie.add(first, [1], "first")
    first.on_eq = fail
    for call in (trie.get, trie.pop, trie.search, trie.pop_prefixes, lambda m, t: trie.add(m, t, 0)):
        with pytest.raises(ZeroDivisionError):
            call(bad, [1])
    assert trie.get(first, [1]) == "first"


def test_a_comparison_may_use_the_trie():
    trie, first, second = PromptTrie(), Key(), Key()
    trie.add(first, [1], "first")

    def meddle():
        first.on_eq = lambda: None
        trie.add(second, [1], "from inside")

    first.on_eq = meddle
    assert trie.add(second, [1], "second") == "from inside"

    def take_out():
        first.on_eq = lambda: None
        assert trie.pop(second, [1]) == "second"

    first.on_eq = take_out
    assert trie.add(second, [1], "again") is None
    assert (trie.get(first, [1]), trie.get(second, [1])) == ("first", "again")


def test_a_destructor_may_use_the_trie():
    trie, seen = PromptTrie(), []

    class Value:
        def __del__(self):
            seen.append(found(trie, [1]))

    trie.add("m", [1], Value())
    trie.add("m", [1], "new")
    assert seen == [([1], None, None, 0)]


def test_a_model_goes_with_its_last_value():
    trie, model = PromptTrie(), Key()
    reference = weakref.ref(model)
    trie.add(model, [1, 2], 0)
    assert reference() is model
    trie.pop(model, [1, 2])
    del model
    assert reference() is None


def test_a_cycle_through_values_models_and_attributes_is_collected():
    trie, model = PromptTrie(), Key()
    trie.add("m", [1], [trie])
    trie.add(model, [1], 0)
    model.trie = trie
    trie.itself = trie
    reference = weakref.ref(trie)
    del trie, model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda trie: pickle.loads(pickle.dumps(trie))])
def test_a_copy_has_the_same_values_and_is_independent(duplicate):
    trie = trie_of([1, 2, 3], [1, 4, 5], [1, 2, 6], [])
    trie.add("other", [1], "x")
    trie.label = "mine"
    twin = duplicate(trie)
    assert (type(twin), twin.label, twin.get("other", [1])) == (PromptTrie, "mine", "x")
    assert [found(twin, query) for query in ([1], [1, 2], [])] == [found(trie, query) for query in ([1], [1, 2], [])]
    twin.pop("m", [])
    assert trie.get("m", []) == ()


def test_a_subclass_has_its_own_constructor():
    class Named(PromptTrie):
        def __init__(self, name):
            super().__init__()
            self.name = name

    trie = Named("mine")
    trie.add("m", [1], trie.name)
    assert trie.get("m", [1]) == "mine"


def test_a_result_is_a_dataclass():
    result = trie_of([1, 2]).search("m", [1])
    assert result == PromptTrieResult(model="m", exact=None, shorter=None, longer=[1, 2], common_prefix=1)
    assert repr(result) == "PromptTrieResult(model='m', exact=None, shorter=None, longer=[1, 2], common_prefix=1)"
    assert pickle.loads(pickle.dumps(result)) == result


def test_a_prompt_of_a_million_tokens_is_no_matter():
    tokens = np.arange(1_000_000)
    trie = PromptTrie()
    trie.add("m", tokens, "all")
    for n_tokens in range(0, 1_000_000, 50_000):
        trie.add("m", [*range(n_tokens), -1], n_tokens)
    assert trie.search("m", tokens[:999_999]).common_prefix == 999_999
    assert len(trie.search("m", tokens[:6_000]).longer) == 50_001
    assert trie.pop_prefixes("m", tokens) == []
    trie.pop("m", tokens)
    assert trie.search("m", tokens).common_prefix == 950_000
