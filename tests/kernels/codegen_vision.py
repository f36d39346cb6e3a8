"""The CLIP ViT-L/14 tower: hidden size 1024, 4096 in its MLP; 64 images of 257 tokens."""

from mmalign_kernels.vision_triton import (
    layer_norm_bwd,
    layer_norm_fwd,
    quick_gelu_bwd,
    quick_gelu_fwd,
)

from .codegen import meta

ROWS = 64 * 257
X, WEIGHT, WIDE = meta(ROWS, 1024), meta(1024), meta(ROWS, 4096)
MEMORY_BOUND = {"_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel", "_quick_gelu_kernel"}
PERSISTENT = {"_layer_norm_bwd_kernel"}
READERS = {"_column_sum_kernel"}
LAUNCHES = {
    "layer_norm 1024": lambda: layer_norm_fwd(X, WEIGHT, WEIGHT, 1e-5),
    "layer_norm backward 1024": lambda: layer_norm_bwd(X, X, WEIGHT, 1e-5),
    "quick_gelu 4096": lambda: quick_gelu_fwd(WIDE),
    "quick_gelu backward 4096": lambda: quick_gelu_bwd(WIDE, WIDE),
}
