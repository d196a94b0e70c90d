"""Which BLAS multiplies matrices on Linux CPUs: decided when the package is imported, so each test is a process."""

import os
import subprocess
import sys

import pytest

import mlxrs_py

PRODUCTS = """
import mlx.core as mx
a = mx.random.normal((70, 50), key=mx.random.key(1))
for dtype in (mx.float32, mx.complex64):
    x = a.astype(dtype)
    print(mx.abs(x @ x.T).sum().item(), mx.abs((x.T @ x)[3]).sum().item())
"""


def run(code, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "MLXRS_PY_BLAS"} | variables
    command = [sys.executable, "-W", "always", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def blas(code, **variables):
    done = run(f"{code}; print(mlxrs_py.build_info()['blas'])", **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_openblas_serves_mlx_when_this_package_comes_first():
    assert mlxrs_py.build_info()["blas"].startswith("OpenBLAS 0.3")
    name, errors = blas("import mlxrs_py, mlx.core")
    assert name.startswith("OpenBLAS 0.3") and not errors


def test_a_variable_turns_it_off():
    assert blas("import mlxrs_py", MLXRS_PY_BLAS="0") == ("None", "")


def test_when_mlx_came_first_one_warning_tells_the_cure():
    name, errors = blas("import mlx.core, mlxrs_py, mlxrs_py.cache")
    assert name == "None"
    assert errors.count("UserWarning") == 1
    assert "import mlxrs_py first, or set MLXRS_PY_BLAS=0" in errors
    assert blas("import mlx.core, mlxrs_py", MLXRS_PY_BLAS="0") == ("None", "")


def test_another_value_of_the_variable_is_refused():
    done = run("import mlxrs_py", MLXRS_PY_BLAS="yes")
    assert done.returncode == 1
    assert "ValueError: MLXRS_PY_BLAS: expected 0 or 1, got 'yes'" in done.stderr


def test_without_openblas_the_variable_says_what_to_install():
    hidden = "import sys; sys.modules['scipy_openblas32'] = None; import mlxrs_py"
    assert blas(hidden) == ("None", "")
    assert "ImportError: MLXRS_PY_BLAS=1 needs OpenBLAS: pip install 'mlxrs_py[cpu]'" in (
        run(hidden, MLXRS_PY_BLAS="1").stderr
    )


def test_products_are_those_of_the_reference_up_to_rounding():
    fast, slow = (run("import mlxrs_py\n" + PRODUCTS, MLXRS_PY_BLAS=on) for on in "10")
    assert fast.returncode == slow.returncode == 0, fast.stderr + slow.stderr
    numbers = [[float(x) for x in done.stdout.split()] for done in (fast, slow)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


def test_how_long_idle_threads_spin_is_told_to_openblas_alone():
    # It reads its variables while it is loaded, the first time.
    seen = """
import ctypes, os
load, told = ctypes.CDLL, []
def spy(name, *rest, **options):
    if "openblas" in str(name):
        told.append(os.environ.get("OPENBLAS_THREAD_TIMEOUT"))
    return load(name, *rest, **options)
ctypes.CDLL = spy
import mlxrs_py
print(told[0], os.environ.get("OPENBLAS_THREAD_TIMEOUT"))
"""
    assert run(seen).stdout.strip() == "16 None"
    assert run(seen, OPENBLAS_THREAD_TIMEOUT="20").stdout.strip() == "20 20"
