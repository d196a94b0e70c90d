"""Files whose header is in order but lies, in both formats and every kind of cache: refused whole, never half read."""

import os

import pytest

from mlxrs_py import _core
from mlxrs_py.cache import load_prompt_cache
from raw_files import (
    LAYOUTS,
    PLACES,
    STATES,
    Raw,
    Tensor,
    assert_refused,
    each_kind,
    each_layout,
    first,
    good,
    number,
    rows,
    text,
    write,
)


@each_layout
@each_kind
def test_the_files_that_are_damaged_here_are_good_before(layout, kind, tmp_path):
    path = write(tmp_path, good(layout, kind).content())
    assert [layer["class"] for layer in _core.verify_file(path)["layers"]] == [kind]
    if layout == "0.31":
        # What is read there is what the other format says.
        other, _ = _core.convert_file(path, tmp_path / "other", "0.32")
        assert _core.inspect_file(other)["layers"] == _core.inspect_file(path)["layers"]


def classes(*names):
    """Name the classes of the first layers."""

    def name(file):
        file.meta |= {f"{file.class_group}.{layer}": name for layer, name in enumerate(names)}

    return name


def no_classes(file):
    file.meta = {key: value for key, value in file.meta.items() if key == "2.0" or key[0] != str(file.class_group)}
    if file.layout == "0.31":
        del file.meta["2.0"]


def second_state(file):
    """Let the tensors of layer 0 stand as layer 1 too, without a class."""
    file.tensors |= {"1" + key[1:]: tensor for key, tensor in file.tensors.items()}


def gap(file):
    """Move the only layer behind a gap: number 1, without a 0."""
    file.tensors = {"1" + key[1:]: tensor for key, tensor in file.tensors.items()}
    kind = file.meta.pop(f"{file.class_group}.0")
    file.meta[f"{file.class_group}.1"] = kind
    if file.layout == "0.31":
        file.meta = {f"0.1{key[3:]}" if key.startswith("0.0") else key: value for key, value in file.meta.items()}
        file.meta["2.0"] = "KVCache"
    else:
        file.meta |= {k: "1" + v[1:] for k, v in file.meta.items() if k.startswith("2.") and v[:2] == "0."}


def tensor(key, value=None):
    return lambda file: file.tensors.update({key: value or Tensor("F32", [1])})


def meta(key, value):
    return lambda file: file.meta.update({key: value})


def without_tensor(which):
    return lambda file: file.tensors.pop(list(file.tensors)[which])


def class_of_group(group_name):
    return lambda file: file.meta.update({f"{file.class_group}.{group_name}": "KVCache"})


#: The letters, numbers and modules that mlx-lm's reader would look up.
NAMES = ["Nope", "", "mx", "copy", "Any", "LRUPromptCache", "PromptTrie", "TokenBuffer", "__builtins__", "_BaseCache"]
STRUCTURE = {
    "no metadata": lambda file: file.meta.clear(),
    "no mark of a format": lambda file: file.meta.pop("2.0"),
    "no classes": no_classes,
    **{f"a class called {name!r}": classes(name) for name in NAMES},
    "a class name of a million letters": lambda file: classes("K" * 10**6)(file),
    "a class without a state": lambda file: classes(file.meta[f"{file.class_group}.0"], "KVCache")(file),
    "a state without a class": second_state,
    "a gap in the layers": gap,
    "a class at layer 2": class_of_group("2"),
    "a class at layer 3,000,000": class_of_group("3000000"),
    "a class at layer -1": class_of_group("-1"),
    "a class at layer 00": class_of_group("00"),
    "the first tensor is missing": without_tensor(0),
    "the last tensor is missing": without_tensor(-1),
    "a tensor at layer 3,000,000": tensor("3000000.0"),
    "a tensor that is layer 3,000,000": tensor("3000000"),
    "a tensor at entry 3,000,000": tensor("0.3000000"),
    "a tensor at layer 2**70": tensor(f"{2**70}.0"),
    "a tensor of 3,000 levels": tensor("0" + ".0" * 3000),
    "a tensor with a name of letters": tensor("abc"),
    "a tensor with a letter in its name": tensor("0.a"),
    "a tensor without a name": tensor(""),
    "a tensor called .": tensor("."),
    "a tensor with a sign": tensor("0.-1"),
    "a tensor with a zero before its number": tensor("0.00"),
    "a tensor below another": lambda file: tensor(first(file) + ".0")(file),
    "metadata outside the groups": meta("format", "mlx"),
    "metadata in a fourth group": meta("3.0", "x"),
    "metadata of 3,000 levels": meta("2" + ".0" * 3000, "x"),
    "a string that is a number": meta("0.n", 3),
    "a string that is null": meta("0.n", None),
    "a string that is a list": meta("0.n", ["x"]),
}


@pytest.mark.parametrize("damage", STRUCTURE.values(), ids=STRUCTURE)
@each_layout
@each_kind
def test_a_wrong_structure_is_refused(damage, layout, kind, tmp_path):
    file = good(layout, kind)
    damage(file)
    assert_refused(write(tmp_path, file.content()))


CLASSES = ["KVCache", "RotatingKVCache", "QuantizedKVCache", "ConcatenateKVCache", "ChunkedKVCache", "ArraysCache"]
CLASSES += ["CacheList", "BatchKVCache", "BatchRotatingKVCache"]
#: What each kind must not be taken for. In format 0.31 keys and values without numbers are alike in a KVCache, a
#: ConcatenateKVCache and an ArraysCache.
SWAPS = [
    (layout, kind, name)
    for kind in STATES
    for name in CLASSES
    for layout in LAYOUTS
    if name != kind and (layout, kind, name[:3]) not in {("0.31", "KVCache", "Con"), ("0.31", "KVCache", "Arr")}
]


@pytest.mark.parametrize(("layout", "kind", "name"), SWAPS)
def test_a_class_that_is_swapped_is_refused(layout, kind, name, tmp_path):
    file = good(layout, kind)
    classes(name)(file)
    assert_refused(write(tmp_path, file.content()))


WRONG = {
    "offset": [-3, 9, 2**31, 2**62, -(2**62)],
    "keep": [-1, 8, 9, 2**40],
    "max_size": [0, -8, 2, 9],
    "_idx": [-50, 0, 2, 99, 2**40],
    "group_size": [-32, 0, 16, 64, 2**62],
    "bits": [-4, 0, 7, 8, 2**62],
}
NUMBERS = [
    (layout, kind, name, value)
    for kind, places in PLACES.items()
    for name in places
    for layout, place in zip(["0.32", "0.31"], places[name], strict=True)
    for value in [*WRONG[name], 2.5, True, None, "3x", [3]]
    if place
]
# A ring may have seen any number of tokens.
NUMBERS += [("0.32", "KVCache", "offset", 999), ("0.32", "QuantizedKVCache", "offset", 999)]


@pytest.mark.parametrize(("layout", "kind", "name", "value"), NUMBERS)
def test_a_wrong_number_is_refused(layout, kind, name, value, tmp_path):
    file, place = good(layout, kind), PLACES[kind][name]
    if layout == "0.31":
        file.meta[place[1]] = str(value)
    elif value == [3]:
        # Still in the table as a scalar.
        file.tensors[place[0]] = Tensor("I32", [2])
    else:
        file.put(place[0], value)
    assert_refused(write(tmp_path, file.content()))


def test_the_kept_tokens_must_leave_room_in_a_ring_that_is_empty(tmp_path):
    for size, keep in [(0, 0), (4, 4), (4, 5)]:
        file = Raw("0.32")
        file.meta |= {"1.0": "RotatingKVCache", "2.0": ""}
        file.put("0", (None, None, 0, keep, size, 0))
        assert_refused(write(tmp_path, file.content()), "keep < max_size")


ROWS = {
    "values that are shorter": ("1", rows(3)),
    "values of another batch": ("1", Tensor("F32", [2, 1, 4, 2])),
    "values of another number of heads": ("1", Tensor("F32", [1, 2, 4, 2])),
    "keys of three axes": ("0", Tensor("F32", [1, 4, 2])),
    "keys of integers": ("0", Tensor("I32", [1, 1, 4, 2])),
    "values that are a number": ("1", Tensor("F32", [])),
}


@pytest.mark.parametrize(("place", "value"), ROWS.values(), ids=ROWS)
@each_layout
def test_keys_and_values_that_do_not_fit_are_refused(layout, place, value, tmp_path):
    for kind, prefix in [("KVCache", "0."), ("CacheList", "0.0.0." if layout == "0.32" else "0.0.")]:
        file = good(layout, kind)
        assert prefix + place in file.tensors
        file.tensors[prefix + place] = value
        assert_refused(write(tmp_path, file.content()))


@each_layout
@pytest.mark.parametrize("part", [0, 1, 2])
def test_quantized_rows_that_do_not_fit_are_refused(layout, part, tmp_path):
    for wrong in (Tensor("U32", [1, 1, 4, 9]), Tensor("F16", [1, 1, 3, 2]), Tensor("F32", [1, 1, 4, 3])):
        file = good(layout, "QuantizedKVCache")
        file.tensors[f"0.1.{part}"] = wrong
        assert_refused(write(tmp_path, file.content()))


def test_wrong_padding_and_lengths_of_arrays_are_refused(tmp_path):
    for place in ("0.1", "0.2"):
        for wrong in (3, True, 2.5, "abc", Tensor("F32", [1]), Tensor("I32", [1, 1]), Tensor("I32", [])):
            file = Raw("0.32")
            file.meta |= {"1.0": "ArraysCache", "2.0": ""}
            slots, padding, lengths = STATES["ArraysCache"]
            file.put("0", (slots, wrong, lengths) if place == "0.1" else (slots, padding, wrong))
            assert_refused(write(tmp_path, file.content()))


TABLE = {
    "an entry for a tensor that is not there": lambda file: file.meta.update({"2.1.0": "9.9"}),
    "an unknown kind": lambda file: file.meta.update({"2.1.1": "weird"}),
    "an entry without a kind": lambda file: file.meta.pop("2.1.1"),
    "a gap in the table": lambda file: file.meta.update({"2.99.0": "0.0", "2.99.1": "scalar"}),
    "a tensor twice in the table": lambda file: file.stand_in("0.2", number(3), "scalar") or twice_in_table(file),
    "a scalar that is a big tensor": lambda file: file.stand_in("0.0", rows(), "scalar"),
    "a text that is a big tensor": lambda file: file.stand_in("0.0", rows(), "string"),
    "a text of a million letters": lambda file: file.stand_in("0.2", text("K" * 10**6), "string"),
    "a text of no letters": lambda file: file.stand_in("0.2", Tensor("I32", [1], b"\xff" * 4), "string"),
    "nothing that is a big tensor": lambda file: file.stand_in("0.0", rows(), "none"),
    "nothing in place of the keys": lambda file: file.put("0.0", None),
    "an offset without its entry": lambda file: [file.meta.pop(key) for key in ("2.1.0", "2.1.1")],
}


def twice_in_table(file):
    file.meta |= {"2.2.0": "0.2", "2.2.1": "scalar"}


@pytest.mark.parametrize("damage", TABLE.values(), ids=TABLE)
def test_a_wrong_table_is_refused(damage, tmp_path):
    file = good("0.32", "KVCache")
    damage(file)
    assert_refused(write(tmp_path, file.content()))


@each_layout
@pytest.mark.parametrize("depth", [9, 3000])
def test_lists_in_lists_end_at_a_depth(layout, depth, tmp_path):
    file = Raw(layout)
    if layout == "0.31":
        file.meta["2.0"] = "CacheList"
        for level in range(depth):
            file.meta["0.0" + ".1.0" * level + ".0.0"] = "CacheList"
    else:
        file.meta |= {"1.0": "CacheList", "2.0": ""}
        for level in range(depth):
            file.put("0" + ".0.0" * level + ".0.1", "CacheList")
    assert_refused(write(tmp_path, file.content()), "at most 8 CacheLists")


def test_what_the_file_system_refuses_keeps_its_type(tmp_path):
    file = write(tmp_path, good("0.32", "KVCache").content())
    (tmp_path / "loop").symlink_to("loop")
    for path, kind in [
        (tmp_path / "missing", FileNotFoundError),
        (tmp_path, IsADirectoryError),
        (file / "below", NotADirectoryError),
        (tmp_path / "loop", OSError),
        (tmp_path / ("x" * 300), OSError),
    ]:
        for read in (load_prompt_cache, _core.inspect_file, _core.verify_file):
            with pytest.raises(kind) as error:
                read(path)
            assert isinstance(error.value, OSError) and error.value.errno and error.value.filename == str(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", "a regular file")
