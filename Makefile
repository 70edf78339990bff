# Everything from a fresh Debian or Ubuntu machine with Python 3.11+: `make test`.
#
#   make setup      virtual environment, PyTorch, Tandem with its development tools, headless GL libraries
#   make test       setup, then every test that is not marked slow
#   make test-all   the slow ones too
#   make check      ruff (lint and format) and mypy
#   make demo       about ten minutes of training with a table at the end
#   make mutants    breaks the core on purpose and counts which faults the tests notice
#   make clean      removes caches and build output; `make distclean` removes the environment too
#
# A PyTorch build for your GPU (the selector on PyTorch's site gives the command):
#   make setup TORCH='torch==2.13.0 --index-url ...'

SHELL := /bin/bash
VENV  ?= .venv
BIN   := $(VENV)/bin
ROOMS := policy_core experiment envs llm_rlhf embodied tandem studies tests

# Without PYTHON=..., the first interpreter that is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)

# The build that was chosen once is kept: `make test` must not replace a CUDA build by the default one.
TORCH_DEFAULT := torch==2.13.0
TORCH_STAMP   := $(VENV)/torch.stamp
TORCH_SEEN    := $(shell cat $(TORCH_STAMP) 2>/dev/null)
TORCH         ?= $(or $(TORCH_SEEN),$(TORCH_DEFAULT))

MUJOCO_GL ?= egl
# Processes that share the tests, a file at a time.
WORKERS   ?= 2
PYTEST    := OMP_NUM_THREADS=1 MUJOCO_GL=$(MUJOCO_GL) $(BIN)/python -m pytest $(ARGS)
AS_ROOT   := $(if $(filter 0,$(shell id -u)),$(shell command -v apt-get))

.PHONY: setup test test-all check format demo mutants gl clean distclean force
.DEFAULT_GOAL := test

setup: $(VENV)/tandem.stamp gl

test: setup
	$(PYTEST) -n $(WORKERS) --dist loadfile -m 'not slow'

test-all: setup
	$(PYTEST)

check: $(VENV)/tandem.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/tandem.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: setup
	$(BIN)/tandem demo

mutants: setup
	OMP_NUM_THREADS=1 MUJOCO_GL=$(MUJOCO_GL) $(BIN)/python -m tests.mutants $(ARGS)

# ---------------------------------------------------------------- the environment

$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: Tandem needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Install one and type: make setup PYTHON=python3.11"; \
		exit 1; }
	@if ! $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null; then \
		package="$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; \
		if [ -n "$(AS_ROOT)" ]; then \
			apt-get update -q && apt-get install -qy --no-install-recommends "$$package"; \
		else \
			echo "error: $(PYTHON) cannot make virtual environments yet. Type: sudo apt-get install $$package"; exit 1; \
		fi; \
	fi
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

# PyTorch first: the other packages then settle for the build that is there.
TORCH_CHANGED := $(strip $(filter-out $(TORCH_SEEN),$(TORCH)) $(filter-out $(TORCH),$(TORCH_SEEN)))
$(TORCH_STAMP): $(VENV)/python.stamp $(if $(TORCH_CHANGED),force)
	$(if $(TORCH_SEEN),$(BIN)/python -m pip uninstall -qy torch)
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	@echo '$(TORCH)' > $@

$(VENV)/tandem.stamp: pyproject.toml $(TORCH_STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

force:

# Rendering without a screen. Not fatal: what needs no picture works without.
gl:
	@missing=""; \
	if command -v dpkg >/dev/null; then \
		for package in libegl1 libgl1-mesa-dri libosmesa6; do \
			dpkg -s "$$package" >/dev/null 2>&1 || missing="$$missing $$package"; \
		done; \
	fi; \
	if [ -n "$$missing" ] && [ -n "$(AS_ROOT)" ]; then \
		apt-get update -q && apt-get install -qy --no-install-recommends $$missing && missing=""; \
	fi; \
	if [ -n "$$missing" ]; then \
		echo "note: headless rendering needs more libraries. Type: sudo apt-get install$$missing"; \
	fi

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache MUJOCO_LOG.TXT
	find $(ROOMS) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
