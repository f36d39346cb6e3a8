"""Projector and first RMSNorm by the CUDA kernel of csrc/projector_rms_norm.cu, for Hopper.

Forward in bf16 and fp16; features and columns in multiples of 8. Anything else is an error.

The backward pass is Triton's and cuBLAS's. Its products need RMSNorm's gradient of every image row,
which depends on whole rows of three tensors. A product that gathered those rows itself would read
them once per column tile, 4 x 6MH bytes for dweight (1,024 features in tiles of 256), after a pass
of 6MH for the statistics. The existing path reads them once, writes M contiguous rows and passes
them to cuBLAS: 6MH + 2MH + 2MH, a third of that.
"""

from torch import Tensor

from ..projector import project_image_features_fwd as declared_fwd
from ..triton.projector import project_image_features_bwd
from .library import fake, operation

__all__ = ["project_image_features_bwd", "project_image_features_fwd"]


def project_image_features_fwd(
    image_features: Tensor,
    weight: Tensor,
    bias: Tensor,
    hidden_states: Tensor,
    image_positions: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (image_features, weight, bias, hidden_states, image_positions, norm_weight)
    return operation("project_image_features_fwd")(*(x.contiguous() for x in tensors), eps)


fake("project_image_features_fwd", declared_fwd.declaration)
