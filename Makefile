# Every command of the README is a target here. `make` alone lists them.
#
# The targets need only make and Python 3.11 to 3.13: they create .venv and install the locked versions into it once,
# and again when a lock changes. Variables are given as `make up ENGINE=sim WORKERS=2`.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
RUNTIME := $(VENV)/.installed-runtime
RAY := $(VENV)/.installed-ray
DEV := $(VENV)/.installed-dev

# What `up` and `demo` take. Each is also an option of `inferq up`; an empty one means its default.
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

# What `ray-up` takes beside REDIS_URL and DATA_DIR: options of `inferq ray up`.
ADDRESS ?=
PORT ?=
RAY_OPTIONS = $(call option,--address,ADDRESS) $(call option,--data-dir,DATA_DIR)

# What `test` and `bench` hand on: make test ARGS="-k settle -x"
ARGS ?=

# What `chaos` takes; without a seed it draws one and says which.
SECONDS ?=
SEED ?=

.PHONY: help up demo ray-up ray-down test schemathesis chaos chaos-long fuzz model test-vllm test-node check format bench lock wheel-check install clean
help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-12s %s\n' "$$name" "$$text"; done

up: $(RUNTIME) ## Start the whole fabric here (ENGINE=sim for the simulated engine)
	@exec $(PY) -m inferq up $(UP_OPTIONS)

# HumanEval (openai/human-eval, MIT), where it lies beside the checkout; without it the demo asks prompts of its own.
PROMPTS ?= $(wildcard ../shared/data/humaneval.jsonl.gz)

demo: $(RUNTIME) ## Show it at work: a chat, a streamed chat, 20 prompts at once (PROMPTS=file)
	@exec $(PY) -m inferq demo $(UP_OPTIONS) $(call option,--prompts,PROMPTS)

ray-up: $(RAY) ## The same in Ray: Manager and Routers, for workers to join (REDIS_URL=...)
	@exec $(PY) -m inferq ray up $(RAY_OPTIONS) $(call option,--redis-url,REDIS_URL) $(call option,--port,PORT)

ray-down: $(RAY) ## Take it out of Ray again
	@exec $(PY) -m inferq ray down $(RAY_OPTIONS)

# pytest's exit code where ARGS choose no test of a part: that is none to fail, unless both parts have none.
NO_TESTS := 5

or_none = && chosen=0 || { code=$$?; [ $$code -eq $(NO_TESTS) ] || exit $$code; }

test: $(DEV) ## Run the tests that need no real vLLM
	@chosen=$(NO_TESTS); \
	$(PY) -m pytest -m "not vllm and not node and not alone" -n 3 --dist loadfile $(ARGS) $(or_none); \
	$(PY) -m pytest -m "not vllm and not node and alone" $(ARGS) $(or_none); \
	exit $$chosen

chaos: $(DEV) ## Kill everything under load and check the history (SECONDS=60 SEED=...)
	$(PY) -m tests.chaos $(call option,--seconds,SECONDS) $(call option,--seed,SEED) $(ARGS)

schemathesis: $(DEV) ## Try a running fleet against its OpenAPI document (URL=http://127.0.0.1:18000 EXAMPLES=100)
	$(VENV)/bin/schemathesis run $(or $(URL),http://127.0.0.1:18000)/openapi.json --checks not_a_server_error \
		--max-examples $(or $(EXAMPLES),100) --request-timeout 30 --continue-on-failure \
		--exclude-path-regex '/presence$$|/output$$|/events$$' $(ARGS)

chaos-long: $(DEV) ## The same for an hour
	$(PY) -m tests.chaos --seconds 3600 $(call option,--seed,SEED) $(ARGS)

fuzz: $(DEV) ## Feed odd inputs to every edge and see that all goes on (SECONDS=60 SEED=...)
	$(PY) -m tests.fuzz $(call option,--seconds,SECONDS) $(call option,--seed,SEED) $(ARGS)

# What `model` takes: orders of calls on each server, and calls in each.
EXAMPLES ?= 500
STEPS ?= 60

model: $(DEV) ## Compare the queue with its model, longer than the tests do (EXAMPLES=500 STEPS=60 SEED=...)
	INFERQ_MODEL_EXAMPLES=$(EXAMPLES) INFERQ_MODEL_STEPS=$(STEPS) $(PY) -m pytest \
		$(if $(SEED),--hypothesis-seed='$(SEED)') tests/contract/test_model.py -k any_order $(ARGS)

test-vllm: $(DEV) ## Run the tests against real vLLM (installs it the first time)
	$(PY) -m pytest -m vllm tests/vllm $(ARGS)

test-node: $(DEV) ## Run the tests with the openai package for Node (needs node, npm and its registry)
	$(PY) -m pytest -m node tests/node $(ARGS)

check: $(DEV) ## Formatting, lint, types, floors
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy examples
	$(VENV)/bin/lint-imports

format: $(DEV) ## Format and mend what lint can mend
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(DEV) ## Measure against the direct engine and a proxy without a queue
	$(PY) -m bench $(ARGS)

wheel-check: $(DEV) ## Build the wheel and run it from another folder
	sh scripts/wheel_check.sh $(PY)

lock: $(DEV) ## Write requirements/*.lock anew from pyproject.toml
	@sh scripts/lock.sh $(PY)

install: $(DEV) ## Only set up .venv

clean: ## Remove .venv, caches and build outputs; data in .inferq stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.inferq/*' -prune -exec rm -rf {} +

$(RUNTIME): requirements/build.lock requirements/runtime.lock pyproject.toml scripts/bootstrap.sh
	@sh scripts/bootstrap.sh $(VENV) runtime

$(RAY): requirements/build.lock requirements/ray.lock pyproject.toml scripts/bootstrap.sh
	@sh scripts/bootstrap.sh $(VENV) ray

$(DEV): requirements/build.lock requirements/dev.lock pyproject.toml scripts/bootstrap.sh
	@sh scripts/bootstrap.sh $(VENV) dev
