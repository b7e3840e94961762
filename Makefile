# `make test` from a fresh clone sets everything up; see `make help`.

VENV ?= .venv
PYTHON ?= python3
# Installed before anything else, so that no other package chooses a build of torch. For a build without CUDA where
# the package index has none: make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# xfuser imports triton even on a CPU; installed only where torch has not brought its own.
TRITON ?= triton==3.9.0
EXTRAS ?= xdit,cache-dit,bench,dev
# For two cores. Tests of several ranks often wait for one another, so more of them run at a time.
WORKERS ?= 2
RANK_WORKERS ?= 3
# `make test-torch TORCH=2.11.0`: what may differ between versions of torch and Triton, without the frameworks. What
# a stream holds, which site has room for it, what ranks agree on, and what becomes of calls that do not fit together,
# is decided by bytes and not by torch.
TORCH_TESTS ?= tests/group tests/exchange tests/lockstep tests/conformance tests/kernels/test_arguments_of_one.py \
	$(addprefix --ignore=tests/group/lifecycle/test_,disagreement.py out_of_step.py refused_frames.py truth.py \
	budget.py eviction.py eviction_attack.py offload.py snapshot.py check.py failures.py nonfinite.py parting.py \
	steps.py) \
	$(addprefix --ignore=tests/group/test_,host_path.py agreement.py environment.py identity.py progressive_start.py \
	adaptive_order.py request.py shared_names.py vote.py) \
	$(addprefix --ignore=tests/lockstep/test_,relay.py raw_bits.py) \
	$(addprefix --ignore=tests/exchange/test_,dropped.py forward.py keyframe_sizes.py many_sends.py own_chunk.py \
	parts.py plans.py predicted.py rotation.py sizes.py targets.py transform_codec.py)
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
CODECS_ARGS ?=
CONFORMANCE_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
# Python compiles what is imported, when it is; all of torch and of the frameworks would take as long as their download.
INSTALL := $(PIP) install --quiet --no-compile
PYTEST := -m pytest --dist worksteal
# Ranks are forked from a worker, and a fork takes as long as the worker is large: so no worker has both these tests and
# those that compile kernels and load frameworks. Those come first, and compile what ranks use as well.
RANKS := $(addprefix tests/,conformance exchange group lockstep)
OTHERS := tests $(addprefix --ignore=,$(RANKS))
STAMP := $(VENV)/.installed
OTHER_VENV := $(VENV)-torch-$(patsubst torch==%,%,$(firstword $(TORCH)))
SOURCES := compactdist tests $(wildcard integrations benchmarks examples tools)

# Nothing is compiled when it is installed, so that each process would compile all it imports where this is set.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv venv-torch lint format test test-all test-torch conformance demo bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## the virtual environment, made once and again when pyproject.toml changes

$(STAMP): pyproject.toml
	@test -x $(PY) || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing $(TORCH)"
	@$(INSTALL) $(TORCH)
	@test -z "$(TRITON)" || $(PY) -c "import triton" 2>/dev/null || \
		{ echo "installing $(TRITON)"; $(INSTALL) --no-deps $(TRITON); }
	@echo "installing compactdist[$(EXTRAS)]"
	@$(INSTALL) --editable ".[$(EXTRAS)]"
	@touch $@

lint: $(STAMP) ## ruff, formatting, types, package list
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -c "$$CHECK_PACKAGES"

format: $(STAMP) ## let ruff repair and format what it can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

test: $(STAMP) ## lint, then every test but the slow ones
	@$(lint_and_import)
	@$(call both,-m "not slow" $(PYTEST_ARGS))

test-all: $(STAMP) ## lint, then every test
	@$(lint_and_import)
	@$(call both,$(PYTEST_ARGS))

venv-torch: ## an environment with another torch (TORCH=2.11.0), beside VENV
	@$(MAKE) --no-print-directory venv VENV="$(OTHER_VENV)" TORCH="torch==$(patsubst torch==%,%,$(TORCH))" \
		TRITON= EXTRAS=test

test-torch: venv-torch ## there, the quick tests of groups and whether kernels compile
	@$(OTHER_VENV)/bin/python $(PYTEST) -n $(RANK_WORKERS) -m "not slow" $(TORCH_TESTS) $(PYTEST_ARGS)

conformance: $(STAMP) ## run torch's own collectives against the wrapper and rewrite docs/conformance.md
	@$(PY) -m tests.conformance $(CONFORMANCE_ARGS)

demo: $(STAMP) ## see it work: writes into demo/
	@mkdir -p demo
	@$(VENV)/bin/compactdist demo $(DEMO_ARGS)

bench: $(STAMP) ## time a passed-through call, compressed collectives and codecs on this machine
	@$(PY) -m benchmarks.link.passthrough $(BENCH_ARGS)
	@$(PY) -m benchmarks.link.all_gather $(BENCH_ARGS)
	@$(VENV)/bin/compactdist bench codecs $(CODECS_ARGS)

clean: ## remove everything that was made, the virtual environment too
	@rm -rf $(VENV) $(VENV)-torch-* build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# lint, and beside it, for that leaves a core idle, the imports of all tests: Python compiles in a new environment what
# every worker would compile at its start
lint_and_import = $(PY) $(PYTEST) --collect-only -qq >/dev/null 2>&1 & importing=$$!; \
	$(MAKE) --no-print-directory lint; status=$$?; kill $$importing 2>/dev/null; exit $$status

# both parts of the tests, with these options; what fails in the first does not keep the second from running, and -k may
# find nothing in one of them (5)
both = status=0; none=0; \
	part() { $(PY) $(PYTEST) "$$@" || { code=$$?; [ $$code = 5 ] && none=$$((none + 1)) || status=$$code; }; }; \
	part -n $(WORKERS) $(1) $(OTHERS); \
	part -n $(RANK_WORKERS) $(1) $(RANKS); \
	[ $$none -lt 2 ] || status=5; \
	exit $$status

# pyproject.toml lists the packages by hand; a folder that is missing there would be missing in the wheel.
define CHECK_PACKAGES
import setuptools
from setuptools.config.pyprojecttoml import read_configuration
setup = read_configuration("pyproject.toml", expand=False)["tool"]["setuptools"]
adapters = {f"compactdist_{name}": f"integrations/{name}" for name in setuptools.find_packages("integrations")}
wrong = {*setuptools.find_packages(include=["compactdist", "compactdist.*"]), *adapters} ^ set(setup["packages"])
if wrong:
    raise SystemExit(f"pyproject.toml, tool.setuptools.packages: not as on disk: {sorted(wrong)}")
if setup["package-dir"] != {name: path for name, path in adapters.items() if "." not in name}:
    raise SystemExit(f"pyproject.toml, tool.setuptools.package-dir: not as on disk: {adapters}")
endef
export CHECK_PACKAGES
