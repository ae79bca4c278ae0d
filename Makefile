# Needs make and Python >= 3.10; the rest goes into .venv. `make help` lists the targets.

PYTHON ?= python3
# The first install fetches torch. Arguments of pip for it alone, such as an --index-url that has CPU builds.
TORCH_ARGS ?=
REPORT ?= report.html

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Named after what was installed, not dated: a fresh checkout of the same files, or a switch of branches, costs nothing.
STAMP := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)

# Nothing here may wait for a person, or give up on a slow network.
export PIP_NO_INPUT := 1
export PIP_DEFAULT_TIMEOUT ?= 120
export PIP_RETRIES ?= 10
# Nothing but the install uses the network.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export WANDB_MODE := disabled
# Compiled modules are kept: the tests start Python many times.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo test test-numbers lint docs notebooks browser benchmarks clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s%s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## make .venv with the package (editable) and all that its tests need

# torch comes first, alone: asked for by another package, it would come in its newest release and with CUDA's gigabytes.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tl_looped needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	@echo "Installing into $(VENV): a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH_ARGS) --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[test]'
	@rm -f $(VENV)/installed-*
	@touch $@

demo: $(STAMP) ## write report.html with the embedded model
	$(BIN)/tl-looped report --out $(REPORT)
	@echo "The report is $(abspath $(REPORT)): open it in a browser"

test: lint docs browser ## check style and types, make the documentation, run the tests and the docstrings' examples
	$(PYTEST) tests tl_looped --doctest-modules

PYTEST = $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile $(UNCHECKED)
# Before Python 3.11 beartype can't read an Unpack of typing_extensions: there annotations are not checked.
UNCHECKED = $(shell $(BIN)/python -c 'import sys; print("--override-ini=addopts=-ra" * (sys.version_info < (3, 11)))')
# What compares printed, stored, fitted or chosen numbers: processors, kernels and threads round them in another way.
NUMBERS = $(foreach name,readme parity plain gradients model text lens exit dynamics attention stages report_,\
	$(or $(wildcard tests/test_$(name)*.py),$(error there is no tests/test_$(name)*.py)))

# Annotations are checked by `make test`; more threads than cores should sleep, not spin.
test-numbers: $(STAMP) ## run the tests of numbers, with ATEN_CPU_CAPABILITY and TL_LOOPED_TEST_THREADS as they are set
	JAXTYPING_DISABLE=1 OMP_WAIT_POLICY=passive $(PYTEST) --quiet $(NUMBERS) tl_looped --doctest-modules

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP) ## make the documentation, build/docs/index.html
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs

notebooks: $(STAMP) ## run the notebooks of demos/ again, and store what they show
	$(BIN)/python tests/notebooks.py

# Debian's packages where they can be had; else the tests that need a browser skip, and say why.
browser: ## install Chromium and its driver for the tests that look at the report
	@if [ -x /usr/bin/chromium ] && [ -x /usr/bin/chromedriver ]; then exit 0; fi; \
	skip() { echo "No Chromium: $$1. The tests that need a browser will be skipped."; exit 0; }; \
	command -v apt-get >/dev/null || skip "no apt-get here to install it with"; \
	if [ "$$(id -u)" = 0 ]; then sudo=; elif sudo -n true 2>/dev/null; then sudo="sudo -n"; \
	else skip "apt-get needs root; install the packages chromium and chromium-driver"; fi; \
	echo "Installing Debian's chromium and chromium-driver"; \
	{ $$sudo apt-get -qq update && $$sudo env DEBIAN_FRONTEND=noninteractive \
		apt-get -qq install --yes --no-install-recommends chromium chromium-driver; } </dev/null >/dev/null \
		|| skip "apt-get failed"

benchmarks: $(STAMP) ## run every script of benchmarks/
	@for script in $(wildcard benchmarks/[a-z]*.py); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean: ## remove .venv, the caches, dist and the report
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist report.html
	find tl_looped tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
