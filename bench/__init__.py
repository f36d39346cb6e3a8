"""Benchmarks: `pytest bench/`, see conftest.py.

comparison -> operation (kernels: cases, variants, oracle; peers) -> bench_*.py
           -> train_step, models, samples, documents (programs)   -> bench_*.py
shapes      of the published models, and random data; peers: how each library is called
timing      interleaved rounds; measured_peaks: the machine, its copy bandwidth and matrix product
session     runs comparisons; render: RESULTS.md and plots from --benchmark-json
gpu         scripts/gpu_verify.sh: gpu_parts what runs, gpu_work in processes that append records;
            verdict: the table at its end, against what predict wrote down beforehand
compare_with_harness  scores of a folder beside lm-evaluation-harness's
"""

import sys
from pathlib import Path

import mmalign  # noqa: F401 (before PyTorch: it sets how OpenMP's threads wait, as in a run)

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))  # codegen is not installed
