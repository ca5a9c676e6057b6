# `make demo` and `make test` do all set-up themselves, in a virtual environment of their own.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

BIN = $(VENV)/bin
export LLMCORE_WERROR = 1
# Where there is a compiler, an installation without the native kernels is a failure.
ifneq ($(shell command -v '$(firstword $(CXX))' 2>/dev/null),)
export LLMCORE_REQUIRE_NATIVE ?= 1
endif
SOURCES = $(shell find csrc kernels llmcore -name '*.cpp' -o -name '*.h' -o -name '*.cu*' -o -name '*.py')
PACKAGING = pyproject.toml setup.py Makefile scripts/install_torch.py

.PHONY: demo test test-all test-all-gpu test-all-others bench model check format build clean

demo: $(VENV)/installed
	$(BIN)/llmcore demo

test: $(VENV)/installed model
	$(BIN)/python -m pytest

# The full sweep: two runs side by side, for most tests keep one core busy. GPU kernels are executed in
# the first, whose report counts them; the native ones' wide sweeps, whole models and sanitizers are in the other.
GPU_TESTS = tests/gpu tests/ops/test_registry.py

test-all: $(VENV)/installed
	$(MAKE) --keep-going --jobs=2 --output-sync=target test-all-gpu test-all-others

test-all-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m '' -o cache_dir=.pytest_cache/gpu $(GPU_TESTS)

test-all-others: $(VENV)/installed model
	$(BIN)/python -m pytest -m '' $(GPU_TESTS:%=--ignore=%)

bench: $(VENV)/installed
	$(BIN)/llmcore bench

# The real models that some tests need; without a network they are skipped, with the reason.
model: $(VENV)/installed
	-$(BIN)/python -c 'from llmcore.models import minilm, smollm2; smollm2.obtain(); minilm.obtain()'

# Formatting, lint, types.
check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

build: $(VENV)/installed

# The package in editable mode, its native kernels built in place. Ninja rebuilds what changed.
$(VENV)/installed: $(VENV)/torch $(PACKAGING) $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[demo,bench,test]'
	touch $@

$(VENV)/torch: scripts/install_torch.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python scripts/install_torch.py '$(TORCH)'
	$(BIN)/python -m pip install --quiet 'setuptools>=77' 'pybind11>=3.0' 'ninja>=1.11'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info llmcore/_native*.so
