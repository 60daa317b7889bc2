# `make compare` shows what blockcache does, `make demo` on a page; `make test` is the suite. Everything runs from .venv.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The first interpreter that really runs (a shim on the PATH may not), is neither too old nor too new
# for the pinned torch, and can make virtual environments. PYTHON=... overrides.
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10 python3.14 python
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for python in $(CANDIDATES); do \
	"$$python" -c '$(SUITABLE)' >/dev/null 2>&1 && { echo "$$python"; break; }; done)

.PHONY: compare demo test lint format typecheck lock clean

# Renders with and without the cache on the embedded model and writes pictures, plots and a table.
compare: $(STAMP)
	$(BIN)/blockcache compare --model tiny-image

# Opens the page that shows speed and quality side by side. ARGS='--browse outputs' for example.
demo: $(STAMP)
	$(BIN)/blockcache demo $(ARGS)

# One thread for each process: the tensors are tiny, and results do not depend on the machine.
# ARGS are pytest's: make test ARGS='-m "not slow" tests/engine'; JOBS=0 runs all in one process.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))
test: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

typecheck: $(STAMP)
	$(BIN)/mypy

# Exact versions for Python 3.10 and later on every platform. Keeps the pins that still fit;
# `make lock ARGS=--upgrade` takes the newest. The CUDA libraries are left out: torch itself pins
# them, and a machine with a CPU build of torch must not download them.
lock:
	@test -n "$(PYTHON)" || { $(NO_PYTHON); }
	test -x .venv-lock/bin/uv || { "$(PYTHON)" -m venv .venv-lock && .venv-lock/bin/pip install --quiet uv; }
	.venv-lock/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 \
		--no-annotate --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" --output-file requirements.lock --quiet $(ARGS)
	grep -vE '^(nvidia|cuda)-' requirements.lock > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:
	rm -rf $(VENV) .venv-lock build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

NO_PYTHON = { \
	echo "blockcache needs a Python from 3.10 to 3.14 that can make virtual environments."; \
	echo "Tried: $(CANDIDATES)."; \
	echo "Install one (on Debian and Ubuntu: python3 and python3-venv), or name it: make PYTHON=/path/to/python3"; \
	} >&2; exit 1

# Reinstalls only when the pins or the project's own metadata change.
$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { $(NO_PYTHON); }
	@echo "Installing the pinned dependencies into $(VENV), once (a few minutes) ..."
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
