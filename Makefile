# Two commands matter: `make demo` and `make test`. Both work on a fresh machine with Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test coverage quantised oldest docs install clean figures sanitize

demo: $(VENV)/.library
	$(BIN)/engram demo

# Files of tests in two processes with a thread each: most tests are too small for two threads. Those with slow tests begin (tests/conftest.py).
TWO_AT_A_TIME := --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test: $(VENV)/.developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO_AT_A_TIME) --durations=10

# The same tests, a quarter slower, and what they leave out.
coverage: $(VENV)/.developer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO_AT_A_TIME) --cov=engram --cov-report=term:skip-covered

# Base models in 4 and 8 bits. bitsandbytes is not among what `make test` installs: peft imports it in every process where it is, a second each.
quantised: $(VENV)/.developer
	$(PIP) bitsandbytes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/models/test_quantised.py

# The least versions that pyproject.toml allows, of libraries and of what tests need. They warn, their help is laid out otherwise, and some
# models are not in them: what fails for that is not ours. Downloads gigabytes (that torch has no build for CPUs alone among the wheels).
OLDEST := .venv-oldest
oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip install --python $(OLDEST)/bin/python --resolution lowest-direct --editable ".[dev]"
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(TWO_AT_A_TIME) -W default --deselect tests/cli/test_cli.py::test_help_is_as_recorded

# Every public name with its docstring, as web pages in build/docs.
docs: $(VENV)/.developer
	$(BIN)/python docs/api.py

install: $(VENV)/.developer

# torch comes first and pinned: resolving it together with the rest can pull another, much larger build.
$(VENV)/.library: pyproject.toml constraints.txt setup.py $(wildcard src/engram/native/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.developer: $(VENV)/.library
	$(PIP) --editable ".[dev]"
	touch $@

# Most of the figures that are quoted; several hours on two cores. Left out: benchmarks/decode.py and train_step.py beside engram-peft, which need
# --peer-python, the Python of an environment that has it; runs of many hours (sweeps, the bundled model), whose commands stand in their recipes.
figures: $(VENV)/.developer
	$(BIN)/python benchmarks/demo_seeds.py
	$(BIN)/python benchmarks/knowledge.py
	$(BIN)/python benchmarks/baselines.py
	$(BIN)/python benchmarks/capacity.py
	$(BIN)/python benchmarks/larger_models.py
	$(BIN)/python benchmarks/readers.py
	$(BIN)/python benchmarks/routing.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/train_step.py --rows 100000 10000000 --kinds frozen sparse --out results/train_step_rows.json
	$(BIN)/engram bench --rounds 101 --json results/bench.json
	$(BIN)/python benchmarks/formats.py
	$(BIN)/python benchmarks/larger_than_memory.py
	$(BIN)/python benchmarks/joint_training.py
	$(BIN)/python benchmarks/readme_tables.py
	$(BIN)/python benchmarks/pictures.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The native core under the address and undefined-behaviour sanitisers; any finding stops the run.
SANITIZED := build/sanitized
sanitize: $(VENV)/.developer
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r src tests pyproject.toml setup.py README.md LICENSE $(SANITIZED)/
	cd $(SANITIZED) && rm -f src/engram/native/*.so && \
		CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" \
		$(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=src $(abspath $(BIN))/python -m pytest -p no:cacheprovider \
		tests/native tests/tables tests/hashing tests/layers/test_few_positions.py tests/layers/test_whole_sequences.py \
		tests/ops/test_gated.py
