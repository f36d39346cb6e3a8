#!/usr/bin/env bash
# Installs mmalign and runs the whole experiment on the built-in toy world:
# pretrain, finetune, evaluation of the base and the tuned language model, report.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh ""
.venv/bin/python scripts/reproduce.py tiny --output "${1:-runs/quickstart}"
