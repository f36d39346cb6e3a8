#!/usr/bin/env bash
# Installs mmalign and runs the smallest study on the built-in toy world: both stages, evaluation of
# the base and the tuned language models, and a report with a verdict on each question.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh ""
jobs=$(($(nproc) < 2 ? 1 : 2))
.venv/bin/python scripts/study.py scripts/studies/quickstart.toml --jobs "$jobs" \
  --study.output "${1:-runs/quickstart}"
