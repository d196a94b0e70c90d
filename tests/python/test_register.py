"""Classes of the user's in cache files."""

import threading

import mlx.core as mx
import pytest

import mlxrs_py
from mlxrs_py import _core
from mlxrs_py.cache import KVCache, RotatingKVCache, load_prompt_cache, register, save_prompt_cache
from raw_files import Raw, Tensor, assert_refused, text, write
from tiny import feed, leaves


@register
class Bag:
    """A cache that holds anything."""

    def __init__(self, content):
        self.state = content

    @classmethod
    def from_state(cls, state):
        return cls(state)


@register
class Counting(KVCache):
    """A subclass of ours with a count of its own."""

    n_calls = 0

    def update_and_fetch(self, keys, values):
        self.n_calls += 1
        return super().update_and_fetch(keys, values)

    @property
    def state(self):
        return super().state, self.n_calls

    @state.setter
    def state(self, value):
        KVCache.state.__set__(self, value[0])
        self.n_calls = value[1]


STATES = {
    "an array": mx.arange(5),
    "a number": 3,
    "a big number": 2**40,
    "a fraction": 0.25,
    "a truth": True,
    "a text": "ü 漢字 \U0001f600" * 100,
    "no text": "",
    "None": None,
    "nothing": (),
    "a tree": (mx.ones((2, 3)), (1, (), "", None, ("x", (False, mx.zeros((0, 4))))), -7, ((((),),),)),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_any_state_of_a_registered_class_comes_back(state, tmp_path):
    save_prompt_cache(tmp_path / "p", [Bag(state), feed(KVCache(), 3), Bag(state)], {"model": "m"})
    for _ in range(2):
        first, second, third = load_prompt_cache(tmp_path / "p")
        assert type(first) is type(third) is Bag and second.offset == 3
        assert leaves(first.state) == leaves(third.state) == leaves(state)
        assert _core.verify_file(tmp_path / "p")["layers"][0]["class"] == "Bag"
        _core.convert_file(tmp_path / "p", tmp_path / "p", "0.32")


def test_a_registered_subclass_of_ours_comes_back_as_itself(tmp_path):
    cache = feed(Counting(), 3, 1)
    save_prompt_cache(tmp_path / "p", [cache])
    (loaded,) = load_prompt_cache(tmp_path / "p")
    assert type(loaded) is Counting and loaded.n_calls == 2 and loaded.offset == 4
    assert leaves(loaded.keys_and_values()) == leaves(cache.keys_and_values())
    assert feed(loaded, 1).n_calls == 3


def test_a_subclass_that_is_not_registered_is_saved_as_its_base_unless_it_has_a_state_of_its_own(tmp_path):
    class Plain(RotatingKVCache):
        pass

    class Own(KVCache):
        state = property(lambda self: (1,))

    save_prompt_cache(tmp_path / "p", [feed(Plain(8), 3)])
    assert type(load_prompt_cache(tmp_path / "p")[0]) is RotatingKVCache
    with pytest.raises(ValueError, match=r"registered or has the state of its base, got .*Own"):
        save_prompt_cache(tmp_path / "q", [Own()])
    assert not (tmp_path / "q.safetensors").exists()


@pytest.mark.parametrize(
    "name",
    ["KVCache", "CacheList", "BatchRotatingKVCache", "BatchQuantizedKVCache", "", "a b", "a.b", "\x1b", "x" * 65],
)
def test_a_name_of_ours_or_of_mlx_lms_and_one_that_is_no_word_are_refused(name):
    with pytest.raises(ValueError, match="register: expected a"):
        register(type(name, (Bag,), {}))


def test_what_is_no_cache_class_is_refused():
    for wrong in (3, "Bag", None, Bag(())):
        with pytest.raises(TypeError):
            register(wrong)
    with pytest.raises(TypeError, match="a class with from_state"):
        register(type("Half", (), {"state": ()}))


def test_a_name_belongs_to_one_class_which_may_be_defined_anew(tmp_path):
    def make(doc, **attributes):
        return type("Anew", (Bag,), {"__doc__": doc, **attributes})

    old, new = make("old"), make("new")
    assert register(old) is old and register(old) is old
    save_prompt_cache(tmp_path / "p", [old((1,))])
    register(new)
    assert type(load_prompt_cache(tmp_path / "p")[0]) is new
    with pytest.raises(ValueError, match="a name that is free"):
        register(make("other", __module__="elsewhere"))
    # The old class would come back as the new one.
    with pytest.raises(ValueError, match="the Anew that is registered"):
        save_prompt_cache(tmp_path / "q", [old((1,))])


def test_format_031_has_no_form_for_registered_classes(tmp_path):
    with pytest.raises(ValueError, match=r"a class that format 0.31 has, or format 0.32, got Bag"):
        save_prompt_cache(tmp_path / "p", [Bag((1,))], format="0.31")
    save_prompt_cache(tmp_path / "p", [Bag((1,))])
    with pytest.raises(ValueError, match=r"convert: expected layer 0: a class that format 0.31 has"):
        _core.convert_file(tmp_path / "p", tmp_path / "q", "0.31")


def test_states_that_no_file_holds_are_refused_before_a_file_is_touched(tmp_path):
    deep = ()
    for _ in range(64):
        deep = (deep,)
    for state in (deep, "x" * (2**20 + 1), (object(),), {"a": 1}, 2**63):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            save_prompt_cache(tmp_path / "p", [Bag(state)])
    assert list(tmp_path.iterdir()) == []


def raw(*entries):
    file = Raw("0.32")
    file.meta |= {"1.0": "Bag", "2.0": ""}
    for key, value in entries:
        file.put(key, value)
    return file


LIES = {
    "no state": raw(),
    "a gap": raw(("0.0", 1), ("0.2", 1)),
    "a number and a list at one place": raw(("0", 1), ("0.0", 1)),
    "65 levels": raw(("0" + ".0" * 65, 1)),
    "3,000 levels": raw(("0" + ".0" * 3000, 1)),
    "an entry of three million": raw(("0.3000000", 1)),
    "a name of letters": raw(("0.a", 1)),
    "a scalar that is big": raw(("0.0", 1), ("0.1", Tensor("I32", [2]))),
    "a text that is too long": raw(("0", text("x" * (2**20 + 1)))),
}
LIES["a scalar that is big"].stand_in("0.1", Tensor("I32", [2]), "scalar")
LIES["a text that is too long"].stand_in("0", text("x" * (2**20 + 1)), "string")


@pytest.mark.parametrize("file", LIES.values(), ids=LIES)
def test_a_file_that_lies_about_a_registered_class_is_refused(file, tmp_path):
    assert_refused(write(tmp_path, file.content()))


def test_a_state_that_the_class_refuses_is_the_files_fault(tmp_path):
    file = Raw("0.32")
    file.meta |= {"1.0": "Counting", "2.0": ""}
    file.put("0", ((None, None, 5), 1))
    path = write(tmp_path, file.content())
    with pytest.raises(
        mlxrs_py.CacheFormatError, match=f"^{path}: 0: expected a state that Counting.from_state takes"
    ) as e:
        load_prompt_cache(path)
    assert isinstance(e.value.__cause__, ValueError)


def test_what_a_class_raises_otherwise_passes(tmp_path):
    @register
    class Stopped(Bag):
        @classmethod
        def from_state(cls, state):
            raise KeyboardInterrupt

    save_prompt_cache(tmp_path / "p", [Stopped((1,))])
    with pytest.raises(KeyboardInterrupt):
        load_prompt_cache(tmp_path / "p")


def test_threads_register_and_save_at_once(tmp_path):
    errors = []

    def work(n):
        try:
            for k in range(20):
                register(cls := type(f"Thread{n}_{k}", (Bag,), {}))
                save_prompt_cache(tmp_path / f"{n}", [cls((k,))], durable=False)
                (loaded,) = load_prompt_cache(tmp_path / f"{n}")
                assert type(loaded) is cls and loaded.state == (k,)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
