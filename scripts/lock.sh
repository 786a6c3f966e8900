#!/usr/bin/env bash
# Resolve requirements/server.lock from pyproject.toml for Python 3.11 and 3.12; used by `make lock`.
#
#   bash scripts/lock.sh .venv/bin/uv
#
# Keeps locked versions that still fit; delete the file first to upgrade everything.
set -euo pipefail

uv=${1:?usage: lock.sh UV}
lock=requirements/server.lock

"$uv" pip compile pyproject.toml --extra server --extra gateway --extra train --extra dev --universal --python-version 3.11 \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet --output-file "$lock" >/dev/null
sed -i '1i # The server, training and test environment that `make` installs; made by `make lock`, not by hand.' "$lock"
