# SPDX-License-Identifier: Apache-2.0
# The interpreter: `make env PYTHON=/path/to/python`; without it tools/make_venv.sh finds one.
VENV ?= .venv
PYTHON ?=
PYTEST_FLAGS ?=
LOCK_FLAGS ?=
# Stage 2's routing in the demo: a strategy of --modality-routing, or a name in examples/emoji_tiny/strategies.yaml.
ROUTING ?= smar
DEMO_FLAGS ?=
CHAOS_FLAGS ?=
STUDY_FLAGS ?=

python := $(VENV)/bin/python
stamp := $(VENV)/.megatron_smar-installed
# Two test files at a time, the long ones first: a program that is starting leaves one of two cores idle.
two_at_a_time := --numprocesses 2 --dist loadfile --no-loadscope-reorder
lock := requirements.lock
native := $(wildcard megatron_smar/data/csrc/*)
typed := megatron_smar $(wildcard pretrain_vlm.py tools/*.py tools/*/*.py benchmarks/*.py)

.PHONY: help env lock demo study study-report test test-matrix test-cuda-path test-slurm chaos test-te test-gpu lint clean interpreter
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: $(stamp) ## create .venv and install the project into it (PYTHON= selects the interpreter, VENV= the folder)

# Installs only after one of these files has changed. The stamp is written last, so a failed install leaves none.
# The lock is complete and also has the build requirements. --no-deps, because pip resolves a package that is required with
# and without an extra twice, and then finds versions that are not in the lock.
$(stamp): pyproject.toml $(lock) setup.py $(native) | interpreter
	@rm -f $@
	$(python) -m pip install --disable-pip-version-check --no-deps --require-hashes -r $(lock)
	$(python) -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Order-only: a wrong PYTHON= is refused before anything is installed, and an up-to-date environment is not rebuilt.
interpreter:
	@tools/make_venv.sh "$(VENV)" "$(PYTHON)"

lock: ## update requirements.lock from pyproject.toml (LOCK_FLAGS=--upgrade raises all versions; PYTHON=)
	PYTHON="$(PYTHON)" tools/make_lock.sh $(LOCK_FLAGS)

# On the CPU, also on machines with GPUs, unless MEGATRON_SMAR_DEVICE=cuda is set.
demo study test test-matrix test-cuda-path test-slurm chaos: export MEGATRON_SMAR_DEVICE ?= cpu

demo: env ## generate data, train, resume and evaluate a tiny model; results in runs/demo (ROUTING=hard: runs/demo-hard)
	$(python) examples/emoji_tiny/run.py --routing $(ROUTING) $(DEMO_FLAGS)

study: env ## do the runs of docs/study that are missing, two at a time, each some minutes (STUDY_FLAGS='--hours 2')
	$(python) examples/study/run.py $(STUDY_FLAGS)

study-report: env ## write the study's tables and figures into docs/study/README.md
	$(python) examples/study/report.py --write docs/study/README.md

test: env ## run the tests (PYTEST_FLAGS= adds options)
	OMP_NUM_THREADS=1 $(python) -m pytest $(two_at_a_time) $(PYTEST_FLAGS) tests/chaos tests/slurm tests/functional tests/distributed tests/cuda_path tests/unit

test-matrix: env ## compare every parallel layout with one process, also when resumed; writes docs/exactness.md
	OMP_NUM_THREADS=1 EXACTNESS_TABLE=docs/exactness.md $(python) -m pytest --matrix $(PYTEST_FLAGS) tests/distributed
	OMP_NUM_THREADS=1 EXACTNESS_TABLE=docs/exactness.md $(python) -m pytest --matrix $(PYTEST_FLAGS) tests/functional/test_training.py
	OMP_NUM_THREADS=1 $(python) -m pytest --matrix -m matrix $(PYTEST_FLAGS) tests/functional tests/unit --ignore tests/functional/test_training.py

test-cuda-path: env ## the CUDA path as far as possible without a GPU: a simulated CUDA device, fake tensors, 8 to 1024 ranks
	OMP_NUM_THREADS=1 $(python) -m pytest --matrix --numprocesses 2 --dist loadfile $(PYTEST_FLAGS) tests/cuda_path

test-slurm: env ## launch jobs on a real SLURM of virtual nodes on this machine; needs root and Debian's slurm packages
	OMP_NUM_THREADS=1 $(python) -m pytest --matrix $(PYTEST_FLAGS) tests/slurm

chaos: env ## cause 30 faults in two jobs on that SLURM and compare them with undisturbed runs; writes docs/reliability.md
	OMP_NUM_THREADS=1 $(python) -m tests.chaos --write docs/reliability.md $(CHAOS_FLAGS)

# Transformer Engine is compiled against torch, which takes a quarter of an hour, in a separate environment.
test-te: env ## build Transformer Engine into .venv-te and check layers, checkpoints and optimizers with it; needs no GPU
	$(MAKE) env VENV=.venv-te
	tools/make_te.sh .venv-te
	OMP_NUM_THREADS=1 .venv-te/bin/python -m pytest $(PYTEST_FLAGS) tests/te

# Installs nothing: a machine with a GPU may have its own torch and no package index.
test-gpu: ## the first checks on one GPU, at most ten minutes: table, runs/gpu/report.json (PYTHON=, ALLOW_NONE=1, GPU_FLAGS=)
	$(or $(PYTHON),$(if $(wildcard $(python)),$(python),python3)) -m tests.gpu $(if $(ALLOW_NONE),--allow-none) $(GPU_FLAGS)

# Programs import their neighbors by name, and three are called run.py: mypy reads each folder of examples/ alone.
lint: env ## check style, format, the order of imports and types
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m tests.layout
	$(python) -m mypy $(typed)
	for folder in emoji_tiny smollm2_moe study; do \
	  MYPYPATH=examples/emoji_tiny:examples/$$folder $(python) -m mypy examples/$$folder/*.py || exit 1; done

clean: ## remove caches and build products; .venv and runs/ are kept
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(wildcard megatron_smar tools tests examples) -name __pycache__ -type d -prune -exec rm -rf {} +
