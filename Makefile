# What one does with redmesh from a clone. `make` alone prints the targets.
# Needs only make, git and Python 3.11 or newer; each target installs what it needs.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# Targets run one after another; only `check` installs the engine beside linting.
ifndef BESIDE
.NOTPARALLEL:
endif
MAKEFLAGS += --no-print-directory

# Which engine `demo` runs: auto (vLLM), vllm, or sim (no weights, nothing to install).
ENGINE ?= auto
# Which models `demo` serves.
MODELS ?= deploy/models/demo.json
# More options for `redmesh up`, such as UP="--detach --port 9000".
UP ?=
# More options for the benchmark, such as BENCH="--rounds 9 --workload stream" or BENCH="--plot".
BENCH ?=
# Request traces for `bench-routing`, in Mooncake's or Azure's format, and more options for it.
TRACE ?=
ROUTING ?=
# More options for pytest, such as PYTEST="-x -k ledger".
PYTEST ?=

UV := .tools/bin/uv
BIN := .venv/bin
ENGINE_HOME := $(or $(REDMESH_ENGINE_HOME),.engine)
PEERS := .tools/peers
# How many tests may run at the same time, where they share the machine without harm.
JOBS ?= $(shell nproc)
SHARED := $(BIN)/pytest --dist loadfile --numprocesses
# One more than cores where tests mostly wait: for timeouts, for faults that last. Meshes use a third
# of two cores then, and take 460 s instead of 620.
WAITING := $(shell echo $$(( $(JOBS) > 1 ? $(JOBS) + 1 : 1 )))

# An active environment of the calling shell is not the one meant.
unexport VIRTUAL_ENV
# Our own modules are compiled once, too, and not by each of a mesh's processes.
unexport PYTHONDONTWRITEBYTECODE
export UV_PYTHON_DOWNLOADS := never
# Where the machine has certificates of its own, trust those: a company's proxy is among them.
ifneq ($(wildcard /etc/ssl/certs/ca-certificates.crt),)
export UV_SYSTEM_CERTS ?= 1
endif

.PHONY: help
help: ## Print this list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

##@ Run

.PHONY: demo
demo: setup $(if $(filter sim,$(ENGINE)),,engine) ## Serve MODELS behind two proxies (ENGINE=sim: at once, without vLLM)
	@deploy/bootstrap/system.sh demo || echo "going on: only the commands printed below want them"
	@exec $(BIN)/redmesh up --models $(MODELS) --engine $(ENGINE) $(UP)

.PHONY: down
down: setup ## Stop a mesh that was started detached
	@exec $(BIN)/redmesh down

##@ Install

.PHONY: setup
setup: ## Install uv into .tools and the locked packages into .venv (PYTHON=… chooses another Python)
	@deploy/bootstrap/uv.sh
	@deploy/bootstrap/sync.sh
	@$(BIN)/python -m services.proxy.carrier.compiled

.PHONY: engine
engine: setup ## Install vLLM into an environment of its own, .engine
	@deploy/bootstrap/system.sh engine
	@$(BIN)/python deploy/engine/install.py --home $(ENGINE_HOME)

.PHONY: system
system: setup ## Install the system packages that the tests need (as root), or name them
	@deploy/bootstrap/system.sh tests
	@$(BIN)/python -m services.proxy.carrier.compiled

##@ Check

.PHONY: test
test: check ## Install everything and run all that CI runs

.PHONY: check
check: setup system ## Lint, then run all tests
	@$(MAKE) --jobs=2 --output-sync=line BESIDE=1 lint engine
	@$(MAKE) test-fast test-slow

.PHONY: lint
lint: setup system ## Run ruff, pyright, import-linter and luacheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	rm -rf .state/lua
	$(BIN)/python -m shared.registry.scripts --out .state/lua
	luacheck --quiet --config .luacheckrc .state/lua

.PHONY: test-fast
test-fast: setup system ## Run the tests that need neither vLLM nor a mesh, with coverage
	rm -f .coverage .coverage.*
	$(SHARED) $(WAITING) -m "not (engine or mesh or timed or alone or long)" --cov --cov-report=term --durations=10 $(PYTEST)

.PHONY: test-slow
test-slow: test-long test-mesh test-alone test-engine ## Run all other tests

.PHONY: test-long
test-long: setup system ## Run long computations
	$(BIN)/pytest --dist worksteal --numprocesses $(JOBS) -m "long and not (engine or mesh or timed or alone)" $(PYTEST)

.PHONY: test-mesh
test-mesh: setup system ## Run whole meshes and what keeps bounds of seconds, several at a time
	$(SHARED) $(WAITING) -m "(mesh or timed) and not (engine or alone)" --durations=15 $(PYTEST)

.PHONY: test-alone
test-alone: setup system ## Run the tests that put the machine under load, one after another
	$(BIN)/pytest -m "alone and not engine" --durations=15 $(PYTEST)

.PHONY: test-engine
test-engine: setup system engine ## Run the tests on real vLLM, one after another
	$(BIN)/pytest -m engine --durations=15 $(PYTEST)

##@ Measure

.PHONY: bench
bench: setup ## Measure what the proxy costs, in turns with nginx and the peers (half an hour, two quiet cores)
	@deploy/bootstrap/system.sh bench || echo "going on: what is missing is said below"
	@$(BIN)/python -m services.proxy.carrier.compiled
	@exec $(BIN)/python -m tests.bench $(BENCH)

.PHONY: bench-peers
bench-peers: setup ## Install vllm-router and sglang-router, for `make bench` to measure beside ours
	$(UV) venv --quiet --allow-existing --python $(BIN)/python $(PEERS)
	$(UV) pip sync --quiet --require-hashes --python $(PEERS)/bin/python tests/bench/peers.lock

.PHONY: bench-routing
bench-routing: setup ## Compare routing policies in virtual time on TRACE, or on the sample that ships
	@exec $(BIN)/python -m tests.routing $(TRACE) $(ROUTING)

##@ Maintain

.PHONY: fmt
fmt: ## Mend and format the code
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

.PHONY: lock
lock: setup ## Resolve uv.lock and the locks of engine and peers anew (LOCK=--upgrade: newer versions)
	$(UV) lock $(LOCK)
	UV=$(CURDIR)/$(UV) deploy/engine/lock.sh $(LOCK)
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	  --no-header $(LOCK) --output-file tests/bench/peers.lock tests/bench/peers.in

.PHONY: demo-model
demo-model: engine ## Train the demo model on its FAQ (four minutes)
	nice $(ENGINE_HOME)/bin/python deploy/models/demo/train.py

.PHONY: clean
clean: ## Remove caches and build output; environments stay
	rm -rf .state build dist docs/_build .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f .coverage .coverage.*
	find . -name __pycache__ -not -path './.venv/*' -not -path './.engine/*' \
	  -not -path './.tools/*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## Remove the environments as well
	rm -rf .venv .engine .tools
