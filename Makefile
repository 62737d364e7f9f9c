# `make demo` and `make test` each work on a fresh clone: they make .venv and install first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo test test-slow docs wheel-test faults bench figures check format clean

setup: $(STAMP)

# pip chooses torch and torchvision as the pair that open-clip-torch needs; see docs/install.md.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/cxr-cache demo demo

# A test that hangs shows where all its threads are, and fails.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --max-worker-restart 1 \
	  -m 'not slow and not faults' -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true

# The second half computes as processors do that know less than this one: what rounds elsewhere must
# still hold there.
NUMERIC := tests/training tests/encoders tests/models/test_heads.py

test-slow: setup
	$(BIN)/python -m pytest -q -m slow
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \
	  $(BIN)/python -m pytest -q -m 'not slow and not faults' $(NUMERIC)
	ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default \
	  $(BIN)/python -m pytest -q -m 'not slow and not faults' $(NUMERIC)

# The site of docs/ in build/site; a warning, a dead link or anchor is an error. The variable silences a
# notice of the theme's authors about versions of MkDocs to come.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Builds wheel and source distribution, installs the wheel with all that it needs into an empty
# environment (gigabytes, from the network), and runs the demo there.
wheel-test: setup
	$(BIN)/python scripts/wheel_test.py

faults: setup
	$(BIN)/python -m pytest -q -s -m faults tests/faults

# About twenty minutes, on a machine that does nothing else; figures also go to a folder of
# benchmarks/ that is named by the processor, and from there into docs/performance.md.
# scripts/bench_growth.py takes as long again, and is not part of it.
bench: setup
	$(BIN)/python scripts/bench_search.py
	$(BIN)/python scripts/bench_finetune.py
	$(BIN)/python scripts/bench_tokens.py
	$(BIN)/python scripts/bench_extract.py
	$(BIN)/python scripts/bench_decode.py
	$(BIN)/python scripts/bench_statistics.py
	$(BIN)/python scripts/bench_table.py

# Which cheap figures in README and docs are stale; with the data, for example
# make figures FIGURES='--tables indiana_csv --images indiana_256 --embeddings mobilenet.npz'.
figures: setup
	$(BIN)/python scripts/figures.py $(FIGURES)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) demo build .mypy_cache .pytest_cache .ruff_cache *.egg-info
