# SPDX-License-Identifier: Apache-2.0
# The interpreter: `make env PYTHON=/path/to/python`; without it tools/make_venv.sh finds one.
VENV ?= .venv
PYTHON ?=
PYTEST_FLAGS ?=

python := $(VENV)/bin/python
stamp := $(VENV)/.megatron_smar-installed
# Two files of tests at a time, the long ones first: programs that start leave one of two cores idle.
two_at_a_time := --numprocesses 2 --dist loadfile --no-loadscope-reorder
native := $(wildcard megatron_smar/data/csrc/*)
typed := megatron_smar $(wildcard pretrain_vlm.py tools/*.py tools/*/*.py)

.PHONY: help env demo test test-matrix lint clean interpreter
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: $(stamp) ## create .venv and install the project into it (PYTHON= picks the interpreter, VENV= the place)

# Installs only after what it depends on has changed; the stamp is written last, so a failed install leaves none.
$(stamp): pyproject.toml constraints.txt setup.py $(native) | interpreter
	@rm -f $@
	$(python) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	@touch $@

# Order-only: a wrong PYTHON= is told at once, while an environment that is up to date stays so.
interpreter:
	@tools/make_venv.sh "$(VENV)" "$(PYTHON)"

demo: env ## make data, train, resume and evaluate a tiny model; results in runs/demo
	$(python) examples/emoji_tiny/run.py

test: env ## run the tests (PYTEST_FLAGS= adds options)
	OMP_NUM_THREADS=1 $(python) -m pytest $(two_at_a_time) $(PYTEST_FLAGS) tests/functional tests/distributed tests/unit

test-matrix: env ## every parallel layout against one process, and resumed; writes docs/exactness.md
	OMP_NUM_THREADS=1 EXACTNESS_TABLE=docs/exactness.md $(python) -m pytest --matrix $(PYTEST_FLAGS) tests/distributed
	OMP_NUM_THREADS=1 $(python) -m pytest --matrix -m matrix $(PYTEST_FLAGS) tests/functional

lint: env ## check style, format and types
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy $(typed)

clean: ## remove caches and build products; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(wildcard megatron_smar tools tests examples) -name __pycache__ -type d -prune -exec rm -rf {} +
