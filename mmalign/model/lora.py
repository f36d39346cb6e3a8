"""LoRA: low-rank adapters on the seven projections of every decoder layer.

W x + (alpha / rank) * B A dropout(x), the formula of arXiv 2106.09685 with the defaults of PEFT.
Two projections are fused here (q, k, v and gate, up), but each part has its own adapter and its
own dropout mask, so the result is that of seven separate adapters.
"""

import math
from typing import TYPE_CHECKING

import torch
from mmalign_kernels import linear, pack_rows, unpack_rows
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.config import LoraConfig
from mmalign.model.layers import Linear

if TYPE_CHECKING:
    from mmalign.model.decoder import Decoder


class LoraLinear(Linear):
    """A frozen Linear whose rows are split into parts, each with an adapter (lora_a, lora_b)."""

    def __init__(self, base: Linear, part_sizes: tuple[int, ...], config: LoraConfig):
        assert sum(part_sizes) == len(base.weight) and base.bias is None
        nn.Module.__init__(self)
        self.weight, self.bias = base.weight, None
        self.scaling, self.dropout = config.alpha / config.rank, config.dropout
        in_features, bound = base.weight.shape[1], 1 / math.sqrt(base.weight.shape[1])
        self.lora_a = nn.ParameterList()  # (rank, in_features) each
        self.lora_b = nn.ParameterList()  # (part_size, rank) each
        for size in part_sizes:
            # kaiming_uniform(a=sqrt(5)), drawn in fp32 on the CPU: the same on every device
            a = torch.empty(config.rank, in_features, device="cpu").uniform_(-bound, bound)
            self.lora_a.append(nn.Parameter(a.to(base.weight)))
            self.lora_b.append(nn.Parameter(base.weight.new_zeros(size, config.rank)))

    def forward(self, x: Tensor) -> Tensor:
        updates = [self._update(x, part) for part in range(len(self.lora_a))]
        return torch.add(linear(x, self.weight), torch.cat(updates, 1), alpha=self.scaling)

    def pruned(self, x: Tensor, rows: Tensor, num_columns: int) -> Tensor:
        """As of Linear; the first part is the columns of these rows."""
        assert num_columns == len(self.lora_b[0])
        weight, others = self.weight.split((num_columns, len(self.weight) - num_columns))
        kept = pack_rows(x, rows)
        first = torch.add(linear(kept, weight), self._update(kept, 0), alpha=self.scaling)
        updates = [self._update(x, part) for part in range(1, len(self.lora_a))]
        rest = torch.add(linear(x, others), torch.cat(updates, 1), alpha=self.scaling)
        return torch.cat((unpack_rows(first, rows, len(x)), rest), 1)

    def _update(self, x: Tensor, part: int) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        return linear(linear(dropped, self.lora_a[part]), self.lora_b[part])

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """weight + scaling * B A, multiplied in fp32 and rounded once."""
        products = [b.float() @ a.float() for a, b in zip(self.lora_a, self.lora_b, strict=True)]
        return (self.weight.float() + self.scaling * torch.cat(products)).to(self.weight.dtype)


def add_lora(decoder: "Decoder", config: LoraConfig) -> None:
    """Replaces the projections of every layer by adapted ones, in place.

    The draw of the adapters comes from torch's CPU generator: seed it first.
    """
    intermediate_size = decoder.config.intermediate_size
    for layer in decoder.layers:
        parts = {
            "qkv_proj": decoder.config.qkv_sizes,
            "o_proj": (decoder.config.hidden_size,),
            "gate_up_proj": (intermediate_size, intermediate_size),
            "down_proj": (decoder.config.hidden_size,),
        }
        for name, part_sizes in parts.items():
            setattr(layer, name, LoraLinear(getattr(layer, name), part_sizes, config))


@torch.no_grad()
def merge_lora(decoder: "Decoder") -> None:
    """Adds every adapter to its weight and removes it, in place."""
    for layer in decoder.layers:
        for name, module in list(layer.named_children()):
            if isinstance(module, LoraLinear):
                merged = Linear(module.weight.shape[1], module.weight.shape[0])
                merged.weight = nn.Parameter(module.merged_weight(), requires_grad=False)
                setattr(layer, name, merged)
