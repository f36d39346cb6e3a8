#!/usr/bin/env bash
# Everything that only a GPU can show, in at most 8 minutes (bench/gpu.py has the arguments):
#
#   bash scripts/gpu_verify.sh [--wheels DIR] [--data DIR] [--more] [--dry-run] [--cpu-rehearsal]
#
# --wheels DIR, the first argument: packages that the machine lacks, as scripts/collect_wheels.sh
# collects them; they are unpacked beside the machine's own, for this run alone.
#
# $PYTHON (.venv/bin/python, else python3) needs PyTorch for CUDA, Triton, transformers, pytest and
# pytest-xdist. csrc/ needs nvcc and cmake on PATH, --more compute-sanitizer.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
if [ "${1:-}" = --wheels ]; then
  site="$(mktemp -d)"
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$2"/*.whl
  export PYTHONPATH="$PYTHONPATH:$site"
  shift 2
fi
absent="$("$python" - <<'EOF'
from importlib.util import find_spec

needed = "torch triton transformers pytest xdist numpy PIL pyarrow safetensors scipy"
needed += " sentencepiece tokenizers tqdm tyro"
print(*(name for name in needed.split() if find_spec(name) is None))
EOF
)"
if [ -n "$absent" ]; then
  echo "$python has no $absent. Name a Python that has them (PYTHON=...), or give their wheels:" \
    "bash scripts/collect_wheels.sh DIR, then --wheels DIR" >&2
  exit 1
fi
export PYTHONUNBUFFERED=1
"$python" -m bench.gpu "$@"
