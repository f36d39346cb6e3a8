#!/usr/bin/env bash
# Everything that only a GPU can show, in parts of at most 8 minutes on one H100:
#
#   bash scripts/gpu_verify.sh                          # all parts
#   bash scripts/gpu_verify.sh --part build kernels     # build, correctness, kernels, train, evaluate
#   bash scripts/gpu_verify.sh --dry-run                # no GPU: everything short of the launches
#   bash scripts/gpu_verify.sh --part evaluate --data-root DATA --tokenizer LLAMA_FOLDER
#   bash scripts/gpu_verify.sh --part kernels --only "attention or adamw"    # as pytest -k
#
# Each part measures the card's own ceilings, writes bench/results/<gpu>/<part>.json (--results DIR:
# elsewhere) and can be repeated; `python scripts/render_results.py` makes bench/RESULTS.md of them.
# Needs, importable by $PYTHON (.venv/bin/python, else python3): torch, triton, numpy, matplotlib,
# nvidia-ml-py, pillow, pytest, pytest-benchmark, rich, safetensors, sentencepiece, tensorboard,
# tokenizers, tqdm, transformers, tyro (with typeguard and docstring-parser). They are checked
# first. For csrc/: nvcc and cmake; for the sanitizer: compute-sanitizer, on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
exec "$python" -m bench.verify "$@"
