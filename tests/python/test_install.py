"""``mlxrs_py.install`` without an mlx-lm; with one see tests/parity/test_install.py."""

import sys

import pytest

import mlxrs_py


def test_an_absent_mlx_lm_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(ImportError, match=r"needs mlx-lm: pip install mlx-lm==0\.32\.2"):
        mlxrs_py.install()


def test_there_may_be_nothing_to_uninstall():
    mlxrs_py.uninstall()
