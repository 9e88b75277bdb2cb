#!/usr/bin/env bash
# Sourced by run_pipeline.sh and run_tests.sh: a virtual environment in .venv with the pinned requirements, made once.
# usage: source setup_env.sh requirements.txt [more requirements files]
set -euo pipefail

PYTHON="${PYTHON:-}"
if [ -z "$PYTHON" ]; then
    for candidate in python3.11 python3.12 python3; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
            PYTHON="$candidate"
            break
        fi
    done
fi
[ -n "$PYTHON" ] || { echo "Python 3.11 or 3.12 is needed; install it, or name it: PYTHON=/path/to/python3.11 $0" >&2; exit 2; }

STAMP=".venv/installed-$(cat "$@" | sha256sum | cut -c1-16)"
if [ ! -f "$STAMP" ]; then
    echo "== installing into .venv (once): $*"
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    # torch first: with its CPU build in place, no other requirement pulls in CUDA libraries.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep -E '^torch==' requirements.txt | cut -d' ' -f1)"
    for file in "$@"; do
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file"
    done
    touch "$STAMP"
fi
# shellcheck disable=SC1091
source .venv/bin/activate
