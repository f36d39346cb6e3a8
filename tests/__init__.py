import mmalign  # noqa: F401 (before PyTorch: it sets how OpenMP's threads wait, as in a run)
