#!/usr/bin/env bash
# Test the clients with the newest packages that they may be installed beside: langchain-openai, openai, langgraph.
#
#   bash scripts/test_newest_client.sh .venv/bin/python [pytest's arguments]
#
# Beside the server these are pinned by what SGLang allows; an agent has an environment of its own, without SGLang and
# torch. Such an environment is made in .runs/newest-client, brought up to date each time; this needs the network.
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
# The tests are to run on the working tree, which the folder they are started in puts first.
"$venv/bin/python" -m pip uninstall --quiet --yes whiflash-sglang
"$venv/bin/python" - <<'VERSIONS'
import importlib.metadata

names = ("langchain-openai", "langchain-core", "langgraph", "openai", "pydantic")
print("newest clients:", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
VERSIONS
"$venv/bin/python" -m pytest "${tests[@]}" "$@"
