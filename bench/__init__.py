"""Benchmarks: `pytest bench/`, see conftest.py.

comparison -> operation (kernels: cases, variants, oracle; peers) -> bench_*.py
           -> train_step, models, samples, documents (programs)   -> bench_*.py
shapes      of the published models, and random data; peers: how each library is called
timing      interleaved rounds; measured_peaks: the machine, its copy bandwidth and matrix product
render      RESULTS.md and plots from --benchmark-json; gpu: the runner of scripts/gpu_verify.sh
"""
