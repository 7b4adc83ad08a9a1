# Targets for the commands of README.md and CONTRIBUTING.md. `make` alone lists them.
#
# They need only make and Python 3.11 to 3.13. They create .venv and install the locked versions there, again when a lock
# changes. Set variables like this: make up ENGINE=sim WORKERS=2

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
RUNTIME := $(VENV)/.installed-runtime
RAY := $(VENV)/.installed-ray
DEV := $(VENV)/.installed-dev

# Variables of `up` and `demo`, each also an option of `inferq up`. An empty one means the default.
ENGINE ?=
MODEL ?=
WORKERS ?=
SLOTS ?=
ROUTER_PORT ?=
MANAGER_PORT ?=
WORKER_PORT ?=
REDIS_URL ?=
ENGINE_URL ?=
DATA_DIR ?=
option = $(if $($(2)),$(1) '$($(2))')
UP_OPTIONS = $(call option,--engine,ENGINE) $(call option,--model,MODEL) $(call option,--workers,WORKERS) \
	$(call option,--slots,SLOTS) $(call option,--router-port,ROUTER_PORT) $(call option,--manager-port,MANAGER_PORT) \
	$(call option,--worker-port,WORKER_PORT) $(call option,--redis-url,REDIS_URL) \
	$(call option,--engine-url,ENGINE_URL) $(call option,--data-dir,DATA_DIR)

# Variables of `ray-up` besides REDIS_URL and DATA_DIR: options of `inferq ray up`.
ADDRESS ?=
PORT ?=
RAY_OPTIONS = $(call option,--address,ADDRESS) $(call option,--data-dir,DATA_DIR)

# Further arguments of `test`, `chaos`, `bench` and others: make test ARGS="-k settle -x"
ARGS ?=

# Variables of `chaos` and `fuzz`. Without a seed they draw one and print it.
SECONDS ?=
SEED ?=

.PHONY: help up demo ray-up ray-down test schemathesis chaos chaos-long fuzz model test-vllm test-llamacpp test-node check format bench bench-growth lock wheel-check install clean
help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-13s %s\n' "$$name" "$$text"; done

up: $(RUNTIME) ## Start every role on this machine (ENGINE=sim for the simulated engine)
	@exec $(PY) -m inferq up $(UP_OPTIONS)

# A file of prompts for the demo (.jsonl or .jsonl.gz). Empty: the package's own.
PROMPTS ?=

demo: $(RUNTIME) ## Run a chat, a streamed chat and 20 prompts at once (PROMPTS=file)
	@exec $(PY) -m inferq demo $(UP_OPTIONS) $(call option,--prompts,PROMPTS)

ray-up: $(RAY) ## Start Manager and Routers in Ray, for workers to join (REDIS_URL=...)
	@exec $(PY) -m inferq ray up $(RAY_OPTIONS) $(call option,--redis-url,REDIS_URL) $(call option,--port,PORT)

ray-down: $(RAY) ## Stop what ray-up started
	@exec $(PY) -m inferq ray down $(RAY_OPTIONS)

# pytest's exit code if ARGS select no test of a part. It is an error only if both parts have none.
NO_TESTS := 5

or_none = && chosen=0 || { code=$$?; [ $$code -eq $(NO_TESTS) ] || exit $$code; }

SIDE_BY_SIDE := --dist loadgroup --no-loadscope-reorder

# More at a time than a small machine has cores: most wait.
test: $(DEV) ## Run the tests that need no real vLLM
	@chosen=$(NO_TESTS); \
	$(PY) -m pytest --part units -n 3 $(SIDE_BY_SIDE) $(ARGS) $(or_none); \
	$(PY) -m pytest --part fleets -n 3 $(SIDE_BY_SIDE) $(ARGS) $(or_none); \
	$(PY) -m pytest --part alone $(ARGS) $(or_none); \
	exit $$chosen

chaos: $(DEV) ## Kill everything under load and check the history (SECONDS=60 SEED=...)
	$(PY) -m tests.chaos $(call option,--seconds,SECONDS) $(call option,--seed,SEED) $(ARGS)

schemathesis: $(DEV) ## Test a running fleet against its OpenAPI document (URL=http://127.0.0.1:18000 EXAMPLES=100)
	$(VENV)/bin/schemathesis run $(or $(URL),http://127.0.0.1:18000)/openapi.json --checks not_a_server_error \
		--max-examples $(or $(EXAMPLES),100) --request-timeout 30 --continue-on-failure \
		--exclude-path-regex '/session$$|/output$$|/events$$' $(ARGS)

chaos-long: $(DEV) ## Run chaos for an hour
	$(PY) -m tests.chaos --seconds 3600 $(call option,--seed,SEED) $(ARGS)

fuzz: $(DEV) ## Send odd inputs to every edge of a live fleet (SECONDS=60 SEED=...)
	$(PY) -m tests.fuzz $(call option,--seconds,SECONDS) $(call option,--seed,SEED) $(ARGS)

# Variables of `model`: sequences of calls on each server, and calls in each sequence.
EXAMPLES ?= 500
STEPS ?= 60

model: $(DEV) ## Compare the queue with its reference model, longer than the tests (EXAMPLES=500 STEPS=60 SEED=...)
	INFERQ_MODEL_EXAMPLES=$(EXAMPLES) INFERQ_MODEL_STEPS=$(STEPS) $(PY) -m pytest \
		$(if $(SEED),--hypothesis-seed='$(SEED)') tests/contract/test_model.py -k any_order $(ARGS)

test-vllm: $(DEV) ## Run the tests against real vLLM (installs it the first time)
	$(PY) -m pytest -m vllm tests/vllm $(ARGS)

test-llamacpp: $(DEV) ## Run the tests against real llama.cpp (builds it the first time; needs a C++ compiler)
	$(PY) -m pytest -m llamacpp tests/llamacpp $(ARGS)

test-node: $(DEV) ## Run the tests with the openai package for Node (needs node, npm and its registry)
	$(PY) -m pytest -m node tests/node $(ARGS)

check: $(DEV) ## Check formatting, lint, types and imports
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy examples
	$(VENV)/bin/mypy bench --exclude 'bench/peers/(.*_jobs|count|plot)' # they run in environments of their own
	$(VENV)/bin/lint-imports

format: $(DEV) ## Format, and fix what ruff can fix
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(DEV) ## Measure beside other systems, in one run of 20 minutes (ARGS=--quick: two; needs a C compiler)
	$(PY) -m bench $(ARGS)

bench-growth: $(DEV) ## Measure how cost grows with clients, workers, prompts, backlog, tenants and models
	$(PY) -m bench.growth $(ARGS)

wheel-check: $(DEV) ## Build the wheel and run it from another folder
	sh scripts/wheel_check.sh $(PY)

lock: $(DEV) ## Rewrite requirements/*.lock from pyproject.toml
	@sh scripts/lock.sh $(PY)

install: $(DEV) ## Set up .venv only

clean: ## Remove .venv, caches and build outputs, but not the data in .inferq
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.inferq/*' -prune -exec rm -rf {} +

$(RUNTIME): requirements/build.lock requirements/runtime.lock pyproject.toml scripts/bootstrap.sh
	@sh scripts/bootstrap.sh $(VENV) runtime

$(RAY): requirements/build.lock requirements/ray.lock pyproject.toml scripts/bootstrap.sh
	@sh scripts/bootstrap.sh $(VENV) ray

$(DEV): requirements/build.lock requirements/dev.lock pyproject.toml scripts/bootstrap.sh
	@sh scripts/bootstrap.sh $(VENV) dev
