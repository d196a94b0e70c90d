"""The checker of the layers finds what it is there for."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKER = Path(__file__).parents[1] / "layers.py"


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("array/mod.rs", "use crate::cache::Cache;", "layer array uses cache"),
        ("persist/reader.rs", "use crate::{error::Error, prefill};", "layer persist uses prefill"),
        ("cache/mod.rs", "use pyo3::prelude::*;", "PyO3 outside"),
        ("cache/long.rs", "\n" * 500, "more than 450 lines"),
        ("cache/mod.rs", "use crate::array::Array; // not crate::python", ""),
    ],
)
def test_a_fault_is_named_and_order_is_not(tmp_path, file, text, words):
    path = tmp_path / "src" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    result = subprocess.run([sys.executable, CHECKER, tmp_path / "src"], capture_output=True, text=True, check=False)
    assert result.returncode == (1 if words else 0)
    assert words in result.stderr
