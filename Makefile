# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED = 0

MARK := $(VENV)/installed

.PHONY: demo test test-long coverage test-fast check bench s3 clean

demo: $(MARK)
	$(BIN)/python -m jobs.demo

test: check
	$(BIN)/python -m pytest -n 3 --no-loadscope-reorder --durations=10 -m "not long" $(OPTIONS) tests

# Nodes, actors and requests that fail one after the other under sweeps: minutes, for CI and before a release.
test-long: $(MARK)
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder --durations=10 -m long tests

# The same, several minutes longer, and which lines no test of this process reaches.
coverage: $(MARK)
	$(BIN)/python -m pytest -n 4 --no-loadscope-reorder --cov --cov-report=term:skip-covered --cov-fail-under=90 tests

# No server, no Ray, no GPU: for every change, in a minute.
test-fast: $(MARK)
	$(BIN)/python -m pytest -n 3 -W error::ResourceWarning -W error::pytest.PytestUnraisableExceptionWarning \
		-m "not service and not slow and not long and not gpu" $(OPTIONS) tests

check: $(MARK)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(MARK)
	for script in benchmarks/[a-z]*.py; do $(BIN)/python -m benchmarks.$$(basename $$script .py) || exit 1; done

s3: $(MARK)
	$(BIN)/python -m smc.storage dev-server

$(MARK): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v[:2] <= (3, 14) and f"this is Python {v[0]}.{v[1]}, SpectralMC needs 3.11 to 3.14: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(MARK)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
