# Everything runs from a clone: each target installs what it needs into .venv and .tools, once.
#
# Everything is tested with a CPU build of torch. Where pip is not offered one by default, name the
# index or the folder that has it in PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS before the first run.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv tools demo bench bench-gpu test-gpu lint test test-fast clean distclean

PYTHON ?= python3.11
PYTEST_ARGS ?=
# The Python of an environment with SGLang for a GPU; .venv has the CPU build of torch.
GPU_PYTHON ?= python3
BENCH_ARGS ?=
ON_GPU := PYTHONPATH=.:kernels:controller:kernels/bench $(GPU_PYTHON)
VENV_PYTHON := .venv/bin/python
INSTALLED := .venv/installed
STAND_INS := $(wildcard tests/cpu_engine/*.* tests/cpu_engine/sgl_kernel/*.py)

export PYTHON
export PATH := $(CURDIR)/.tools/bin:$(CURDIR)/.venv/bin:$(PATH)

help: ## Show this list
	@awk -F ': .*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(INSTALLED) ## Serve, burst, control: full budget against controlled, with a report in out/demo
	@$(VENV_PYTHON) -m sglang_alloc.demo

test: $(INSTALLED) ## Lint, types, import rules, then every test (real servers included)
	@$(MAKE) --no-print-directory tools || echo "going on: the tests that need them will fail" >&2
	@$(MAKE) --no-print-directory lint
	@$(VENV_PYTHON) -m pytest -n 2 --durations=25 $(PYTEST_ARGS)

test-fast: $(INSTALLED) ## The tests that start no server and need no tools
	@$(VENV_PYTHON) -m pytest -m "not server" tests/unit tests/kernels tests/controller $(PYTEST_ARGS)

lint: $(INSTALLED) ## Format, lint, types and import rules; changes nothing
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m mypy
	@.venv/bin/lint-imports

bench: $(INSTALLED) ## Latency against budget on this machine, beside stock SGLang
	@.venv/bin/sglang-alloc bench
	@PYTHONPATH=kernels/bench $(VENV_PYTHON) -m moe_bench --device cpu

bench-gpu: ## Routing, MoE layers and whole steps on a GPU, in the environment of GPU_PYTHON
	@$(ON_GPU) -m moe_bench $(BENCH_ARGS)

test-gpu: ## The tests of kernels and servers on a GPU, in the environment of GPU_PYTHON
	@KERNEL_TEST_DEVICE=cuda $(ON_GPU) -m pytest -c kernels/bench/pytest.ini --rootdir=. tests/kernels tests/gpu $(PYTEST_ARGS)

venv: $(INSTALLED) ## Create or update .venv

$(INSTALLED): requirements/serving-cpu.txt requirements/dev.txt pyproject.toml $(STAND_INS)
	@requirements/check_machine.sh
	@requirements/install_venv.sh

tools: $(INSTALLED) ## Put Helm, kubectl, Prometheus and promtool into .tools, and install chromium
	@$(VENV_PYTHON) deploy/install_tools.py
	@requirements/install_debian_tools.sh

clean: ## Remove what runs leave behind; keep .venv and .tools
	@rm -rf out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 -r rm -rf

distclean: clean ## Remove everything that was installed, too
	@rm -rf .venv .tools .cache
