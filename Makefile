PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test slow check parity plans plan-tables bench soak checkpoints lock clean
.DEFAULT_GOAL := install

# Everything pinned and hashed; the package itself is installed in place.
install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Synthesised speech, a tiny model, SFT, GRPO, three word error rates and a report; SEED=1 gives other ones.
SEED ?= 0
demo: install
	$(BIN)/python scripts/demo.py demo --seed $(SEED)

test: install
	$(BIN)/python -m pytest

# What takes long: runs over eight devices, over two processes, and others.
slow: install
	$(BIN)/python -m pytest -m slow

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# Comparison with the published implementation. "+cpu" names torch's CPU build: it can never become the CUDA one.
parity: .parity/installed
	.parity/bin/python -m pytest parity --dist load

.parity/installed: requirements.txt parity/requirements.txt pyproject.toml
	$(PYTHON) -m venv .parity
	.parity/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.txt -r parity/requirements.txt
	.parity/bin/pip install --quiet --disable-pip-version-check --no-deps torch==2.13.0+cpu
	.parity/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# The 30B model's programs compiled for a v4-8 without one, and held to what is promised of them.
plans: install
	$(BIN)/python -m pytest plans -n 0

# Writes docs/plans.md again: all plans of the page, half an hour on two cores.
plan-tables: install
	$(BIN)/python scripts/plan_tables.py

# Writes docs/benchmarks.md again: ours and transformers by turns, an hour or two on two cores that are free.
bench: install .parity/installed
	$(BIN)/python benchmarks/run.py

# 20,000 requests through the engine: nothing lost, nothing twice, memory flat; a few minutes.
soak: install
	$(BIN)/python benchmarks/soak.py

# Random checkpoints of true shapes (12 GB of disk): made, read, used, written; AUDIO=clip.wav is transcribed.
checkpoints: install
	$(BIN)/python benchmarks/true_shapes.py checkpoints $(if $(AUDIO),--audio $(AUDIO))

# Rewrites the pins from pyproject.toml; needs uv.
lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header -o requirements.txt --upgrade
	uv pip compile parity/requirements.in -c requirements.txt --overrides parity/overrides.txt --universal \
		--python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header -o parity/requirements.txt

clean:
	rm -rf .venv .parity demo
