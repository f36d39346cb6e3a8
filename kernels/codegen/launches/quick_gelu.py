"""Quick GELU of the CLIP ViT-L/14 tower: 4096 columns, 64 images of 257 tokens."""

from mmalign_kernels.triton.quick_gelu import quick_gelu_bwd, quick_gelu_fwd

from ..compiler import meta

X = meta(64 * 257, 4096)
MEMORY_BOUND = {"_quick_gelu_kernel"}
LAUNCHES = {
    "quick_gelu 4096": lambda: quick_gelu_fwd(X),
    "quick_gelu backward 4096": lambda: quick_gelu_bwd(X, X),
}
