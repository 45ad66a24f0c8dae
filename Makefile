# Two commands on a fresh machine: `make demo` and `make test`. Both create .venv and install into it first.
PYTHON ?= python3
DATA ?=
OUTPUT ?= demo-output
BIN := .venv/bin

.PHONY: install demo test test-heavy lint types format presets bench-model bench-ablation bench-ingest bench-train bench-segment bench-sweep bench-masks gpu audit clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is $$($(PYTHON) --version), but 3.11 or newer is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "installing into .venv: about 7 GB, some minutes, in which pip says nothing"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[pipeline,dev]'
	@touch $@

demo: install
	$(BIN)/python workflows/demo.py --output '$(OUTPUT)' $(if $(DATA),--data '$(DATA)')

# Two processes side by side for what starts no Ray, a thread each; then one after the other what does.
test: install lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not heavy and not ray'
	$(BIN)/python -m pytest -m 'not heavy and ray'

# What takes too long for `make test`, and is not in it: the demo on CamVid, twice; what befalls clusters and batch
# segmentations; the chain script by script, from a shell and as jobs, which `make test` has as one job.
test-heavy: install
	$(BIN)/python -m pytest -m heavy

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyright

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The benchmarks' presets, from the table in pipeline/recipes.py.
presets: install
	$(BIN)/python -m pipeline.recipes workflows/presets

# Benchmarks write their tables to tests/benchmarks/results/. DATA is the CamVid folder.
bench-model: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[benchmarks]'
	$(BIN)/python -m tests.benchmarks.model

bench-ablation: install
	$(BIN)/python -m tests.benchmarks.ablation --device cpu --data '$(DATA)'

bench-ingest: install
	$(BIN)/python -m tests.benchmarks.ingest --data '$(DATA)'

bench-train: install
	$(BIN)/python -m tests.benchmarks.train --data '$(DATA)'

bench-segment: install
	$(BIN)/python -m tests.benchmarks.segment

bench-sweep: install
	$(BIN)/python -m tests.benchmarks.sweep --data '$(DATA)'

bench-masks: install
	$(BIN)/python -m tests.benchmarks.masks --data '$(DATA)'

# Everything that needs a GPU, where PYTHON has torch, timm, safetensors, fsspec and Pillow; training's part where it has
# Ray as well. Meant to take at most ten minutes; it has not been run yet.
gpu:
	$(PYTHON) -m tests.benchmarks.model --device cuda
	$(PYTHON) -m tests.benchmarks.ablation --device cuda --data '$(DATA)' --deadline 180
	@if $(PYTHON) -c 'import ray'; then $(PYTHON) -m tests.benchmarks.train --device cuda --data '$(DATA)'; fi
	@if $(PYTHON) -c 'import ray, moto'; then $(PYTHON) -m tests.benchmarks.segment --device cuda --parts speed; fi

# Known vulnerabilities of the pinned versions, and licences: asks a public database, so it is not in `make test`. Strict,
# for else it passes where it cannot ask.
audit: install
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit==2.10.1 pip-licenses==5.5.5
	.venv-audit/bin/pip-licenses --python=$(BIN)/python --order=license
	.venv-audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

clean:
	rm -rf .venv .venv-audit demo-output build *.egg-info .pytest_cache .ruff_cache .hypothesis
