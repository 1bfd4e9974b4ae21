#!/usr/bin/env bash
# Creates or completes the environment .venv from the hash-locked requirements. Needs Python 3.11 to 3.13 and 7 GB.
set -euo pipefail
cd "$(dirname "$0")"
fail() { echo "setup: $1" >&2; exit 1; }

if [ ! -x .venv/bin/uv ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null ||
        fail "$python is not Python 3.11 to 3.13; name one that is: PYTHON=python3.12 bash setup.sh"
    [ "$(df -Pk . | awk 'NR == 2 {print $4}')" -gt 7000000 ] || fail "the environment needs 7 GB of disk space; free some"
    "$python" -m venv .venv || fail "$python cannot make virtual environments; install it with its venv module (python3-venv)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check uv
fi
.venv/bin/uv pip install --quiet --python .venv --require-hashes -r requirements.lock
.venv/bin/uv pip install --quiet --python .venv --no-deps --no-build-isolation -e .
