# One verb each. `make demo` and `make test` need Python 3.10 or newer and a package registry, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BUNDLED := audiomm/whisper-commands

.PHONY: demo test test-all parity kernels lint bench clean

demo: $(VENV)/installed ## Transcribe the recordings in examples/audio with the bundled model.
	@$(BIN)/audiomm transcribe examples/audio/*.flac --model $(BUNDLED)

# Side by side, a thread each: threads of several processes would wait for each other's cores.
test: $(VENV)/tested ## Run the fast tests.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

test-all: $(VENV)/tested ## Run the fast and the slow tests.
	@$(BIN)/python -m pytest -m "not parity and not gpu"

parity: $(VENV)/compared ## Compare with the reference implementation.
	@$(BIN)/python -m pytest -m parity tests

kernels: $(VENV)/triton ## Run the GPU's kernels in Triton's interpreter, and compile them for GPUs.
	@PYTHONPATH=$(VENV)/triton $(BIN)/python -m pytest -m "slow or not slow" tests/layers/test_kernels.py

lint: $(VENV)/linted ## Check style and types.
	@$(BIN)/ruff check src tests examples benchmarks
	@$(BIN)/ruff format --check src tests examples benchmarks
	@$(BIN)/mypy

bench: $(VENV)/measured ## Measure against the reference implementations, all in one run; BENCH=--quick for a smoke test.
	@$(BIN)/python benchmarks/run.py $(BENCH)

clean: ## Remove the virtual environment and caches.
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.py constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/tested: $(VENV)/installed
	$(PIP) -e ".[test]"
	@touch $@

$(VENV)/compared: $(VENV)/tested
	$(PIP) -e ".[parity]"
	$(PIP) --no-deps openai-whisper timm
	@touch $@

$(VENV)/measured: $(VENV)/tested
	$(PIP) -e ".[bench]"
	$(PIP) --no-deps openai-whisper
	@touch $@

# Beside the packages: torch for CPUs would take it for a compiler of its own.
$(VENV)/triton: $(VENV)/tested
	$(PIP) --no-deps --target $@ "triton>=3.5"

$(VENV)/linted: $(VENV)/installed
	$(PIP) -e ".[lint]"
	@touch $@
