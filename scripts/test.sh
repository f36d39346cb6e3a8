#!/usr/bin/env bash
# Installs everything the tests need and runs all of them: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/basedpyright --pythonpath .venv/bin/python
# one torch thread a process: the tests are small, and pytest-xdist uses the cores
export OMP_NUM_THREADS=1
.venv/bin/python -m pytest -n "${MMALIGN_TEST_PROCESSES:-auto}" "$@"
