# `make demo` and `make test` create .venv first. It is created again when the lock or pyproject.toml changes.
#   make PYTHON=/path/to/python3.12 demo     use another interpreter (3.11 or 3.12)

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PORT ?= 30000
MINUTES ?= 15
# make compat: the SGLang release to compare with, e.g. VERSION=0.5.18
VERSION ?=
# make agent: the agent's input; empty: a built-in example
QUESTION ?=
# make agent: the server to use, e.g. BASE_URL=http://127.0.0.1:30000; empty: start one
BASE_URL ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo serve agent agent-bench bench-priors soak fuzz chaos compat test test-all test-newest-client check format lock clean

help:  ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-18s %s\n", $$1, $$2}'

setup: $(INSTALLED)  ## create .venv with the locked server environment (about 9 GB)

$(INSTALLED): pyproject.toml requirements/server.lock scripts/setup_venv.sh
	@PYTHON='$(PYTHON)' bash scripts/setup_venv.sh $(VENV)
	@touch $@

demo: $(INSTALLED)  ## serve the bundled models, replay the bundled traces with every router, print a comparison
	@$(BIN)/python scripts/demo.py

serve: $(INSTALLED)  ## serve the bundled models on 127.0.0.1:$(PORT)
	@$(BIN)/python -m whiflash_sglang.launch_server --demo --port $(PORT)

agent: $(INSTALLED)  ## run the example agent on QUESTION; starts a server unless BASE_URL is given
	@$(BIN)/python -m whiflash_agents.desk $(if $(QUESTION),"$(QUESTION)") $(if $(BASE_URL),--base-url $(BASE_URL))

agent-bench: $(INSTALLED)  ## run the example agent on 50 held-out tasks, with and without speculation
	@$(BIN)/python scripts/agent_bench.py

bench-priors: $(INSTALLED)  ## compare routers with and without priors: simulated, served, and on another domain
	@$(BIN)/python scripts/bench_priors.py

soak: $(INSTALLED)  ## serve from a too small KV pool for $(MINUTES) minutes, check for leaks
	@$(BIN)/python scripts/soak.py --minutes $(MINUTES)

fuzz: $(INSTALLED)  ## send 5,000 malformed requests, check that the server survives and its output is right
	@$(BIN)/python scripts/fuzz.py

chaos: MINUTES = 10
chaos: $(INSTALLED)  ## load and faults for $(MINUTES) minutes, check for wrong output, hangs and leaks
	@$(BIN)/python scripts/chaos.py --minutes $(MINUTES)

# The slowest files run first (tests/conftest.py). Three workers on two cores, since tests with servers mostly wait.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)  ## run the tests, including servers on this CPU; needs no network
	@$(PYTEST)

test-all: $(INSTALLED)  ## run the tests and the nightly ones
	@$(PYTEST) --nightly

test-newest-client: $(INSTALLED)  ## run the agents' tests with the newest langchain-openai, in a separate environment
	@bash scripts/test_newest_client.sh $(BIN)/python

compat: $(INSTALLED)  ## print the changes needed for SGLang $(VERSION); needs the network (docs/compat.md)
	@$(BIN)/python scripts/compat.py '$(VERSION)'

check: $(INSTALLED)  ## check lint, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED)  ## fix lint and formatting with ruff
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: $(INSTALLED)  ## regenerate requirements/server.lock from pyproject.toml
	@bash scripts/lock.sh $(BIN)/uv

clean:  ## remove .venv, caches and run outputs
	rm -rf $(VENV) .runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
