"""A pytest plugin under which mlx-lm's own tests run on our caches, and which proves that they do.

The model that the tests name lies on a hub; the embedded default model stands in for it.
"""

from __future__ import annotations

import ast
import contextlib
import sys
from collections import Counter
from types import ModuleType

import mlxrs_py
from mlxrs_py import cache as ours
from mlxrs_py.default_model import default_model_path
from mlxrs_py.install import CLASSES, FUNCTIONS

# isort: split
# MLX comes after our package, which chooses its BLAS.
import mlx_lm.utils
import pytest
from mlx_lm.models import base
from mlx_lm.models import cache as theirs
from parity.spy import by_class, calls

N_TESTS = 25
ORIGINALS = {name: getattr(theirs, name) for name in (*CLASSES, *FUNCTIONS)}
#: Models import a function of this name from here; mlx-lm's cache module has another one.
OTHER = base.create_attention_mask


class Plugin:
    def __init__(self):
        self.stack = contextlib.ExitStack()
        self.counts = Counter()
        self.used = set()
        self.faults = []

    def pytest_configure(self):
        load = mlx_lm.utils.load
        mlx_lm.utils.load = lambda _hub_name, *args, **options: load(str(default_model_path()), *args, **options)
        self.stack.enter_context(mlxrs_py.install())
        self.counts = self.stack.enter_context(calls(getattr(ours, name) for name in CLASSES))

    def pytest_unconfigure(self):
        self.stack.close()

    def pytest_collection_modifyitems(self, items):
        for file in {item.path for item in items}:
            imports = [node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.ImportFrom)]
            names = {alias.name for node in imports if node.module == theirs.__name__ for alias in node.names}
            self.used |= names & set(CLASSES)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        assert_ours(item.module)
        result = yield
        assert_ours(item.module)
        return result

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        outcomes = {name: len(reports) for name, reports in reporter.stats.items() if name}
        if outcomes != {"passed": N_TESTS}:
            self.faults.append(f"expected {N_TESTS} passed and nothing else, got {outcomes}")
        self.faults += [f"{name}: never called" for name in sorted(self.used - self.called().keys())]
        if self.faults:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def called(self):
        return {name.rpartition(".")[2]: n for name, n in by_class(self.counts).items()}

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("calls into our classes")
        called = self.called()
        for name in CLASSES:
            terminalreporter.write_line(
                f"{name:<24}{called.get(name, 0):>7}{'' if name in self.used else '  (not used)'}"
            )
        for fault in self.faults:
            terminalreporter.write_line(fault, red=True)


def assert_ours(test: ModuleType) -> None:
    """Look into every module of mlx-lm, and into the test's: each name must mean ours."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "mlx_lm"]
    for name, original in ORIGINALS.items():
        assert getattr(theirs, name) is getattr(ours, name), name
        for module in (*modules, test):
            assert vars(module).get(name, OTHER) in (getattr(ours, name), OTHER), (module, name)
            assert not any(value is original for value in vars(module).values()), (module, name)


def pytest_configure(config):
    plugin = Plugin()
    config.pluginmanager.register(plugin)
