# `make demo` and `make test` set up .venv first, once; it is set up anew when the lock or pyproject.toml changes.
#   make PYTHON=/path/to/python3.12 demo     another interpreter (3.11 or 3.12)

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PORT ?= 30000
MINUTES ?= 15
# make compat: another release of SGLang, e.g. VERSION=0.5.18
VERSION ?=
# make agent: what to ask it; none: a question of its own
QUESTION ?=
# make agent: the server to ask, e.g. BASE_URL=http://127.0.0.1:30000; none: one is started
BASE_URL ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo serve agent agent-bench bench-priors soak fuzz chaos compat contract test test-all test-newest-client check format lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-18s %s\n", $$1, $$2}'

setup: $(INSTALLED)  ## create .venv with the locked server environment (about 9 GB)

$(INSTALLED): pyproject.toml requirements/server.lock scripts/setup_venv.sh
	@PYTHON='$(PYTHON)' bash scripts/setup_venv.sh $(VENV)
	@touch $@

demo: $(INSTALLED)  ## serve the bundled models, replay the bundled traces under every policy, print the comparison
	@$(BIN)/python scripts/demo.py

serve: $(INSTALLED)  ## serve the bundled models on 127.0.0.1:$(PORT)
	@$(BIN)/python -m whiflash_sglang.launch_server --demo --port $(PORT)

agent: $(INSTALLED)  ## ask the example agent a QUESTION, or one of its own; a server is started unless BASE_URL is given
	@$(BIN)/python -m whiflash_agents.desk $(if $(QUESTION),"$(QUESTION)") $(if $(BASE_URL),--base-url $(BASE_URL))

agent-bench: $(INSTALLED)  ## the example agent live on 50 held-out tasks, with and without speculation
	@$(BIN)/python scripts/agent_bench.py

bench-priors: $(INSTALLED)  ## both routers with and without priors: on paper, served, and in another world
	@$(BIN)/python scripts/bench_priors.py

soak: $(INSTALLED)  ## serve from a KV pool that is too small for $(MINUTES) minutes, see what is left behind
	@$(BIN)/python scripts/soak.py --minutes $(MINUTES)

fuzz: $(INSTALLED)  ## send a server 5,000 hostile requests, see that it lives on and gives the right text
	@$(BIN)/python scripts/fuzz.py

chaos: MINUTES = 10
chaos: $(INSTALLED)  ## load and faults at once for $(MINUTES) minutes: no wrong text, nobody waits for ever, nothing leaks
	@$(BIN)/python scripts/chaos.py --minutes $(MINUTES)

# The files that take longest are handed out first (tests/conftest.py); three at a time on two cores, as servers wait.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)  ## the tests, real servers on this CPU included; needs no network
	@$(PYTEST)

test-all: $(INSTALLED)  ## the same and those that are only worth running at night
	@$(PYTEST) --nightly

test-newest-client: $(INSTALLED)  ## the agents' tests with the newest langchain-openai, in an environment of its own
	@bash scripts/test_newest_client.sh $(BIN)/python

compat: $(INSTALLED)  ## what would have to change for SGLang $(VERSION); needs the network (docs/compat.md)
	@bash scripts/compat.sh $(BIN)/python '$(VERSION)'

contract: $(INSTALLED)  ## record anew which names of SGLang the server uses, after our code has come to use others
	@$(BIN)/python -m contract --record

check: $(INSTALLED)  ## lint, formatting, types of the core
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED)  ## let ruff fix what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: $(INSTALLED)  ## resolve requirements/server.lock anew from pyproject.toml
	@bash scripts/lock.sh $(BIN)/uv

clean:  ## remove .venv, caches and run outputs
	rm -rf $(VENV) .runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
