#!/usr/bin/env bash
# Create a virtual environment with the locked packages and this project, editable.
#
#   bash scripts/setup_venv.sh .venv                     with the first suitable of python3.11, python3.12, python3
#   PYTHON=/opt/python3.12 bash scripts/setup_venv.sh .venv
#
# Installs with uv, from the same registry as pip, or with pip if uv is not available. An existing environment is updated,
# not recreated.
set -euo pipefail

venv=${1:?usage: setup_venv.sh FOLDER}
lock=requirements/server.lock
uv_version=0.13.9

fits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: ${PYTHON:-python3.11, python3.12 and python3}: no Python 3.11 or 3.12;" \
        "install one (Debian: apt-get install python3 python3-venv) or name it with make PYTHON=..." >&2
    exit 1
}

if ! fits "$venv/bin/python"; then
    python=$(find_python)
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "error: $python has no venv module with pip; on Debian: apt-get install python3-venv" >&2
        exit 1
    fi
    echo "creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi

echo "installing the locked packages into $venv (about 9 GB, some minutes the first time)"
if "$venv/bin/python" -m pip install --quiet "uv==$uv_version"; then
    install=("$venv/bin/uv" pip install --python "$venv/bin/python")
else
    install=("$venv/bin/python" -m pip install)
fi
"${install[@]}" --requirement "$lock"
# Without dependencies, which are locked, and with the locked setuptools.
"${install[@]}" --no-deps --no-build-isolation --editable .
