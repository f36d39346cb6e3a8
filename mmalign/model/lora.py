"""LoRA: low-rank adapters on the projections of every decoder layer, all seven or some.

W x + (alpha / rank) * B A dropout(x), the formula of arXiv 2106.09685 with the defaults of PEFT.
Two projections are fused here (q, k, v and gate, up), but each part has its own adapter and its
own dropout mask, so the result is that of seven separate adapters.
"""

import math

import torch
from mmalign_kernels import linear, pack_rows, unpack_rows
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.config import LoraConfig
from mmalign.errors import UserError
from mmalign.model.decoder import Decoder
from mmalign.model.layers import Linear


class LoraLinear(Linear):
    """A frozen Linear whose rows are split into parts; those that are targets have an adapter."""

    def __init__(self, base: Linear, parts: dict[str, int], config: LoraConfig):
        """parts: name of each projection -> its rows in base.weight; config.targets are adapted."""
        assert sum(parts.values()) == len(base.weight)
        nn.Module.__init__(self)
        self.part_sizes = tuple(parts.values())
        self.adapted = [name for name in parts if name in config.targets]
        self.adapter_of = [self.adapted.index(x) if x in self.adapted else None for x in parts]
        self.weight, self.bias = base.weight, base.bias
        self.scaling, self.dropout = config.alpha / config.rank, config.dropout
        in_features, bound = base.weight.shape[1], 1 / math.sqrt(base.weight.shape[1])
        self.lora_a = nn.ParameterList()  # (rank, in_features) each
        self.lora_b = nn.ParameterList()  # (part_size, rank) each
        for name in self.adapted:
            # kaiming_uniform(a=sqrt(5)), drawn in fp32 on the CPU: the same on every device
            a = torch.empty(config.rank, in_features, device="cpu").uniform_(-bound, bound)
            self.lora_a.append(nn.Parameter(a.to(base.weight)))
            self.lora_b.append(nn.Parameter(base.weight.new_zeros(parts[name], config.rank)))

    def forward(self, x: Tensor) -> Tensor:
        updates = [self._update(x, part) for part in range(len(self.part_sizes))]
        result = linear(x, self.weight, self.bias)
        return torch.add(result, torch.cat(updates, 1), alpha=self.scaling)

    def forward_rows(self, x: Tensor, rows: Tensor, num_columns: int) -> Tensor:
        """As Linear.forward_rows; the num_columns columns have to be the first part."""
        assert num_columns == self.part_sizes[0]
        own, others = self.split_rows(num_columns)
        packed = pack_rows(x, rows)
        first = torch.add(linear(packed, *own), self._update(packed, 0), alpha=self.scaling)
        updates = [self._update(x, part) for part in range(1, len(self.part_sizes))]
        rest = torch.add(linear(x, *others), torch.cat(updates, 1), alpha=self.scaling)
        return torch.cat((unpack_rows(first, rows, len(x)), rest), 1)

    def _update(self, x: Tensor, part: int) -> Tensor:
        adapter = self.adapter_of[part]
        if adapter is None:
            return x.new_zeros(len(x), self.part_sizes[part])
        dropped = F.dropout(x, self.dropout, self.training)
        return linear(linear(dropped, self.lora_a[adapter]), self.lora_b[adapter])

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """weight + scaling * B A, multiplied in fp32 and rounded once."""
        merged = self.weight.float().split(self.part_sizes)
        parts = [
            weight if i is None else weight + self.scaling * self._product(i)
            for i, weight in zip(self.adapter_of, merged, strict=True)
        ]
        return torch.cat(parts).to(self.weight.dtype)

    def _product(self, adapter: int) -> Tensor:
        return self.lora_b[adapter].float() @ self.lora_a[adapter].float()


def add_lora(decoder: Decoder, config: LoraConfig) -> None:
    """Replaces the projections of every layer that config.targets names by adapted ones, in place.

    The adapters are drawn from torch's CPU generator: seed it first. Raises UserError for a rank
    without a target.
    """
    if not config.targets:
        raise UserError(
            f"--lora.rank {config.rank}, but --lora.targets names no projection. Name one or more, "
            "or give --lora.rank 0"
        )
    hidden, intermediate = decoder.config.hidden_size, decoder.config.intermediate_size
    fused = {
        "qkv_proj": dict(
            zip(("q_proj", "k_proj", "v_proj"), decoder.config.qkv_sizes, strict=True)
        ),
        "o_proj": {"o_proj": hidden},
        "gate_up_proj": {"gate_proj": intermediate, "up_proj": intermediate},
        "down_proj": {"down_proj": hidden},
    }
    for layer in decoder.layers:
        for name, parts in fused.items():
            if parts.keys() & set(config.targets):
                setattr(layer, name, LoraLinear(getattr(layer, name), parts, config))


@torch.no_grad()
def merge_lora(decoder: Decoder) -> None:
    """Adds every adapter to its weight and removes it, in place."""
    for layer in decoder.layers:
        for name, module in list(layer.named_children()):
            if isinstance(module, LoraLinear):
                merged = Linear(module.weight.shape[1], module.weight.shape[0])
                merged.weight = nn.Parameter(module.merged_weight(), requires_grad=False)
                merged.bias = module.bias
                setattr(layer, name, merged)
