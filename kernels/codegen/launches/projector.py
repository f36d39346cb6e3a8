"""CLIP ViT-L/14 features into LLaMA2-7B and OpenLLaMA-3B: 27 images of 256 rows in 8,192 tokens."""

from collections.abc import Callable

import torch
from mmalign_kernels.triton.projector import project_image_features_bwd, project_image_features_fwd

from ..compiler import meta

IMAGE_ROWS, TOKENS, VISION = 6912, 8192, 1024
MEMORY_BOUND = {"_norm_kernel", "_rows_gradient_kernel"}
MATRIX = {"_project_kernel"}
NEEDS = {
    "weight and bias": (False, True, True, False, False),
    "and hidden states": (False, True, True, True, False),
    "everything": (True, True, True, True, True),
}


def _launches(columns):
    features, weight, vector = meta(IMAGE_ROWS, VISION), meta(columns, VISION), meta(columns)
    hidden, rstd = meta(TOKENS, columns), meta(TOKENS, 1, dtype=torch.float32)
    positions = meta(IMAGE_ROWS, dtype=torch.int64)
    name = f"project_image_features {columns}"
    launches: dict[str, Callable[[], object]] = {
        name: lambda: project_image_features_fwd(
            features, weight, vector, hidden, positions, vector, 1e-5
        )
    }
    for what, needs in NEEDS.items():
        launches[f"{name} backward, {what}"] = lambda needs=needs: project_image_features_bwd(
            features, weight, hidden, positions, vector, rstd, hidden, hidden, list(needs)
        )
    return launches


LAUNCHES = {name: run for columns in (4096, 3200) for name, run in _launches(columns).items()}
