#!/usr/bin/env bash
# Test the clients with the newest versions of their dependencies: langchain-openai, openai, langgraph.
#
#   bash scripts/test_newest_client.sh .venv/bin/python [pytest's arguments]
#
# With the server installed, SGLang pins these; an agent's environment has neither SGLang nor torch. This script creates
# such an environment in .runs/newest-client and updates it on every run, which needs the network.
set -euo pipefail

python=${1:?usage: test_newest_client.sh PYTHON [PYTEST ARGUMENTS]}
shift
venv=.runs/newest-client
tests=(tests/unit/test_chat.py tests/unit/test_chat_standard.py tests/unit/test_agent_hints.py tests/unit/test_desk.py
    tests/unit/test_tasks.py)

if [[ ! -x "$venv/bin/python" ]]; then
    "$python" -m venv --clear "$venv"
fi
"$venv/bin/python" -m pip install --quiet --upgrade --upgrade-strategy eager . pytest pytest-timeout langchain-tests
# Run the tests on the working tree, which is first on the path.
"$venv/bin/python" -m pip uninstall --quiet --yes whiflash-sglang
"$venv/bin/python" - <<'VERSIONS'
import importlib.metadata

names = ("langchain-openai", "langchain-core", "langgraph", "openai", "pydantic")
print("newest clients:", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
VERSIONS
"$venv/bin/python" -m pytest "${tests[@]}" "$@"
