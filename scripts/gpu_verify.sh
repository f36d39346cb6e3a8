#!/usr/bin/env bash
# Everything that only a GPU can show (bench/gpu.py): build, correctness, kernels, train, evaluate.
#
# Its arguments are those of bench/gpu.py; MMALIGN_SHARED_DATA=DIR evaluates on real documents.
#
# $PYTHON (.venv/bin/python, else python3) needs what scripts/test.sh installs. csrc/ needs nvcc and
# cmake, the sanitizer compute-sanitizer, all on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
exec "$python" -m bench.gpu "$@"
