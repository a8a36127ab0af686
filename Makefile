# One short verb for each thing to do; CI calls the same ones. `make` alone lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PROGRESS := tools/with_progress.sh
# The Python that .venv is made from: the first that is new enough.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -type f)
CPP_SOURCES := $(filter %.h %.cpp %.cu,$(NATIVE_SOURCES))
JOBS := $(shell nproc)

.PHONY: help
help:  ## list the verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# Setup. Each stamp is redone when what it was made from changes.

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'NEO needs Python 3.11 or newer as python3 on the PATH' >&2; exit 1; }
	@$(PROGRESS) 'Making $(VENV)' $(PYTHON) -m venv $(VENV)

$(VENV)/.dependencies: pyproject.toml constraints.txt | $(BIN)/python
	@$(PROGRESS) 'Installing dependencies' $(BIN)/pip install --disable-pip-version-check -c constraints.txt \
	  $$($(BIN)/python tools/requirements.py dev bench)
	@touch $@

$(VENV)/.package: $(VENV)/.dependencies $(NATIVE_SOURCES)
	@$(PROGRESS) 'Building neoserve' $(BIN)/pip install --disable-pip-version-check \
	  --no-build-isolation --no-deps -e .
	@touch $@

.PHONY: setup
setup: $(VENV)/.package  ## make .venv, install what NEO needs, build it

# What users do.

.PHONY: demo serve bench
demo: setup  ## start the server on the embedded checkpoint, ask it something, stop it
	@$(BIN)/python tools/demo.py

serve: setup  ## serve the embedded checkpoint; ARGS="..." are passed on
	@$(BIN)/neo serve $(ARGS)

bench: setup  ## measure attention on the CPU; ARGS="..." are passed on
	@$(BIN)/neo bench attention $(ARGS)

# What developers do.

.PHONY: test lint native native-test native-check test-cuda clean
test: setup native-check  ## the whole suite that this machine can run
	@$(BIN)/python -m pytest

lint: $(VENV)/.dependencies  ## ruff, mypy, the floors, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/lint-imports --config pyproject.toml
	@echo 'clang-format of $(words $(CPP_SOURCES)) files'
	@$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

test-cuda: setup  ## the tests that need an NVIDIA GPU
	@NEO_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/cuda tests/engine

# CMake and Ninja of .venv when it has them, else the system's.
CMAKE = $(or $(wildcard $(BIN)/cmake),cmake)
GENERATOR = -G Ninja $(if $(wildcard $(BIN)/ninja),-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja))
CTEST = $(dir $(shell command -v $(CMAKE)))ctest

# For work on a checkout without installing it: `make native PYTHON=...`, then PYTHONPATH=src.
native:  ## put the compiled module into src/neoserve, built for PYTHON
	@$(CMAKE) -S . -B build/native $(GENERATOR) -DPython_EXECUTABLE=$(shell command -v $(PYTHON)) -DNEO_IN_SOURCE=ON
	@$(CMAKE) --build build/native

# $(call run_native_tests,build folder,CMake options)
define run_native_tests
	@$(PROGRESS) 'Configuring $(1)' $(CMAKE) -S . -B build/$(1) $(GENERATOR) -DNEO_PYTHON=OFF -DNEO_TESTS=ON $(2)
	@$(PROGRESS) 'Building $(1)' $(CMAKE) --build build/$(1)
	@$(CTEST) --test-dir build/$(1) --output-on-failure --no-tests=error
endef

native-check: $(VENV)/.dependencies
	$(call run_native_tests,native-check,)

native-test: $(VENV)/.dependencies  ## the native tests under the address, undefined-behaviour and thread sanitizers
	$(call run_native_tests,native-asan,-DNEO_SANITIZE=address$(comma)undefined -DCMAKE_BUILD_TYPE=RelWithDebInfo)
	$(call run_native_tests,native-tsan,-DNEO_SANITIZE=thread -DCMAKE_BUILD_TYPE=RelWithDebInfo)
comma := ,

clean:  ## remove what was built, .venv too
	rm -rf build dist $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache src/neoserve/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
