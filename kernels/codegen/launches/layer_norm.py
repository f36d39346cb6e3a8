"""LayerNorm of the CLIP ViT-L/14 tower: hidden size 1024, 64 images of 257 tokens."""

from mmalign_kernels.triton.layer_norm import layer_norm_bwd, layer_norm_fwd

from ..compiler import meta

X, WEIGHT = meta(64 * 257, 1024), meta(1024)
MEMORY_BOUND = {"_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"}
PERSISTENT = {"_layer_norm_bwd_kernel"}
READERS = {"_column_sum_kernel"}
LAUNCHES = {
    "layer_norm 1024": lambda: layer_norm_fwd(X, WEIGHT, WEIGHT, 1e-5),
    "layer_norm backward 1024": lambda: layer_norm_bwd(X, X, WEIGHT, 1e-5),
}
