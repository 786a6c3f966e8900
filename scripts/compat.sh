#!/usr/bin/env bash
# What would have to change for another release of SGLang; used by `make compat VERSION=0.5.18`.
#
#   bash scripts/compat.sh .venv/bin/python 0.5.18
#
# The release is put into a folder of its own, .runs/compat/0.5.18 (about 130 MB), without what it depends on: it is read
# and not imported. Exit status 0: nothing has to change; 1: something has to; 2: it could not be looked at.
set -euo pipefail

python=${1:?usage: compat.sh PYTHON VERSION}
version=${2:-}
if [[ ! $version =~ ^[0-9]+(\.[0-9]+)*((rc|\.post)[0-9]+)?$ ]]; then
    echo "error: VERSION '$version': no release of SGLang; name one, e.g. make compat VERSION=0.5.18" >&2
    exit 2
fi

folder=.runs/compat/$version
if [[ ! -f $folder/.complete ]]; then
    rm -rf "$folder"
    if ! "$python" -m pip install --quiet --no-deps --disable-pip-version-check --target "$folder" "sglang==$version"; then
        echo "error: SGLang $version could not be installed into $folder; see above" >&2
        exit 2
    fi
    touch "$folder/.complete"
fi
exec "$python" -m contract "$folder"
