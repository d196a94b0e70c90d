"""Prints what would escape ``mlxrs_py.install``: holders of mlx-lm's classes and functions that are no module.

Run by itself in a process of its own: it imports every module of mlx-lm.
"""

import contextlib
import gc
import importlib
import inspect
import pkgutil
import sys
import warnings
from types import ModuleType

from mlxrs_py.install import CLASSES, FUNCTIONS

# isort: split
import mlx_lm
from mlx_lm.models import cache

#: These need packages that are not installed.
ABSENT = {"mlx_lm.evaluate", "mlx_lm.models.olmo"}


def import_all():
    names = {found.name for found in pkgutil.walk_packages(mlx_lm.__path__, "mlx_lm.")}
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(None):
        for name in names - ABSENT - {"mlx_lm.__main__"}:
            importlib.import_module(name)


def escapes(value):
    """Give the holders that keep a class or function for use; annotations and a class's own parts do not."""
    namespaces = {id(vars(module)) for module in sys.modules.values() if isinstance(module, ModuleType)}
    for holder in gc.get_referrers(value):
        if id(holder) in namespaces or inspect.isframe(holder) or inspect.isgetsetdescriptor(holder):
            continue
        # Base classes and annotations are tuples, and so are the defaults of a function.
        functions = [function for function in gc.get_referrers(holder) if inspect.isfunction(function)]
        if not isinstance(holder, tuple) or any(function.__defaults__ is holder for function in functions):
            yield holder


import_all()
for name in (*CLASSES, *FUNCTIONS):
    for holder in escapes(getattr(cache, name)):
        print(name, type(holder), repr(holder)[:200])
