"""The linear map from image features to the decoder's embedding space (LLaVA 1.0)."""

import math

from mmalign_kernels import project_image_features
from torch import Tensor, nn

from mmalign.model.layers import Linear, RMSNorm


class Projector(Linear):
    """weight (hidden_size, vision_hidden_size) and bias, drawn as torch.nn.Linear draws them."""

    def __init__(self, vision_hidden_size: int, hidden_size: int):
        super().__init__(vision_hidden_size, hidden_size, bias=True)
        bound = 1 / math.sqrt(vision_hidden_size)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, image_features: Tensor, hidden_states: Tensor, image_positions: Tensor, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """Writes the projected features into the packed embeddings and applies the first norm.

        image_features (num_images * num_patches, vision_hidden_size); hidden_states
        (total_tokens, hidden_size). Returns (hidden_states, normed), shaped as hidden_states.
        Without images it still joins the graph, so that its gradient is zero rather than missing.
        """
        return project_image_features(
            image_features.to(self.weight.dtype),
            self.weight,
            self.bias,
            hidden_states,
            image_positions,
            norm.weight,
            norm.eps,
        )
