#!/usr/bin/env bash
# Everything that must pass: style, types, tests. Does all set-up. Arguments go to pytest, e.g. ./run_tests.sh -k resume
set -euo pipefail
cd "$(dirname "$0")"
source setup_env.sh requirements.txt requirements-dev.txt

# ffprobe is the independent judge of the videos, Chromium of the HTML report; both are Debian packages.
missing=()
command -v ffprobe >/dev/null || missing+=(ffmpeg)
command -v chromium >/dev/null || missing+=(chromium)
command -v chromedriver >/dev/null || missing+=(chromium-driver)
if [ "${#missing[@]}" -gt 0 ]; then
    echo "== installing ${missing[*]}"
    as_root=""
    [ "$(id -u)" -eq 0 ] || as_root="sudo"
    $as_root apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

ruff check .
mypy
python -m pytest "$@"
