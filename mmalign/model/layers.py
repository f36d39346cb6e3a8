"""Layers shared by the decoder and the vision tower. Parameters start uninitialised."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from mmalign_kernels import (
    add_rms_norm,
    linear,
    pack_rows,
    rms_norm,
    swiglu,
    unpack_rows,
)
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.errors import UserError
from mmalign.model.config import DecoderConfig
from mmalign.model.positions import Positions
from mmalign.model.recompute import Recompute, checkpoint_from_residual, save_source_instead
from mmalign.model.rope import inverse_frequencies


class Linear(nn.Module):
    """x @ weight.T + bias, weight (out_features, in_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def forward_rows(self, x: Tensor, rows: Tensor, num_columns: int) -> Tensor:
        """forward(x), whose first num_columns columns are computed for `rows` alone.

        x (num_tokens, in_features), rows (num_rows,) -> (num_tokens, out_features), with zeros in
        these columns of the other rows.
        """
        first, others = self.split_rows(num_columns)
        computed = linear(pack_rows(x, rows), *first)  # (num_rows, num_columns)
        return torch.cat((unpack_rows(computed, rows, len(x)), linear(x, *others)), 1)

    def split_rows(self, num_columns: int) -> list[tuple[Tensor, Tensor | None]]:
        """(weight, bias) of the first num_columns columns of the result, and of the others."""
        sizes = num_columns, len(self.weight) - num_columns
        biases = (None, None) if self.bias is None else self.bias.split(sizes)
        return list(zip(self.weight.split(sizes), biases, strict=True))


class Embedding(nn.Module):
    def __init__(self, num_rows: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """Mostly just holds the weight: most norms are fused with the addition before them."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps


class Constants(nn.Module):
    """fp32 tables that move with the module but keep their precision under .to(bfloat16)."""

    def __init__(self, **tables: Tensor):
        super().__init__()
        self.set(**tables)

    def set(self, **tables: Tensor) -> None:
        for name, table in tables.items():
            assert table.dtype == torch.float32
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn, recurse=True):
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, table in self.named_buffers(recurse=False):
            self._buffers[name] = exact[name].to(table.device)
        return self


class RotaryTables(Constants):
    """cos and sin of position * frequency (rope.py), (num_positions, head_dim // 2).

    Positions past the end of the table extend it: rotary positions extrapolate by definition, and
    an image makes a sample longer than the text limit.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig, num_positions: int):
        self.inverse_frequencies, self.scale = inverse_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling
        )
        self.length_limit = config.length_limit
        super().__init__(**self._tables(num_positions))

    def _tables(self, num_positions: int) -> dict[str, Tensor]:
        positions = torch.arange(num_positions, device="cpu").float()
        # computed on the CPU, so every device rotates by the same numbers
        angles = torch.outer(positions, self.inverse_frequencies)
        return {"cos": angles.cos() * self.scale, "sin": angles.sin() * self.scale}

    def up_to(self, max_seqlen: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) with at least max_seqlen rows; UserError above the decoder's length_limit."""
        if self.length_limit is not None and max_seqlen > self.length_limit:
            raise UserError(
                f"a sequence has {max_seqlen} tokens, but this decoder computes at most "
                f"{self.length_limit}: its config.json has a sliding window or dynamic RoPE. "
                "Shorten the text, or use another decoder"
            )
        num_positions, device = len(self.cos), self.cos.device
        if max_seqlen > num_positions:
            with torch.inference_mode(False):  # a table grown while scoring also serves training
                grown = self._tables(max(max_seqlen, 2 * num_positions))
                self.set(**{name: table.to(device) for name, table in grown.items()})
        return self.cos, self.sin


class DecoderLayer(nn.Module):
    """One layer; ends with the next layer's norm, so that each addition is fused with one."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        hidden_size, qkv_sizes = config.hidden_size, config.qkv_sizes
        self.input_layernorm = RMSNorm(hidden_size, config.rms_norm_eps)
        self.qkv_proj = Linear(hidden_size, sum(qkv_sizes), bias=config.kind.qkv_bias)
        if config.kind.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.o_proj = Linear(qkv_sizes[0], hidden_size)
        self.post_attention_layernorm = RMSNorm(hidden_size, config.rms_norm_eps)
        self.gate_up_proj = Linear(hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, hidden_size)
        self.qk_norm, self.qkv_sizes = config.kind.qk_norm, qkv_sizes
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.recompute: Recompute = "none"

    def forward(
        self,
        normed: Tensor,
        residual: Tensor,
        next_norm: RMSNorm,
        positions: Positions,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One layer, on (total_tokens, hidden_size): normed is input_layernorm(residual).

        Returns (next_norm(new residual), new residual). With rows (num_rows,), each at most once,
        it returns these rows alone: after the last layer nothing reads the others, so of them only
        keys and values are computed.
        """

        def compute(normed: Tensor) -> tuple[Tensor, Tensor]:
            return self._compute(normed, residual, next_norm, positions, rows)

        if self._recomputes("full"):
            norm, has_dropout = self.input_layernorm, self._has_dropout
            return checkpoint_from_residual(compute, normed, residual, norm, has_dropout)
        return compute(normed)

    # With x the residual stream:
    #   qkv = qkv_proj(input_layernorm(x)), with q_norm and k_norm of every head where it has them
    #   x = x + o_proj(attention(qkv))
    #   gate, up = gate_up_proj(post_attention_layernorm(x))
    #   x = x + down_proj(silu(gate) * up)
    def _compute(
        self,
        normed: Tensor,
        residual: Tensor,
        next_norm: RMSNorm,
        positions: Positions,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        with self._saving_source(normed, residual, self.input_layernorm, "elementwise", "mlp"):
            if rows is None:
                qkv = self.qkv_proj(normed)  # (total_tokens, sum of qkv_sizes)
            else:
                qkv = self.qkv_proj.forward_rows(normed, rows, self.o_proj.weight.shape[1])
        if self.qk_norm:
            qkv = self._norm_heads(qkv)
        attended = positions.attend(qkv, self.num_attention_heads, self.num_key_value_heads)
        if rows is not None:  # attention itself takes all rows: it is 0.03% of a step's FLOPs
            attended, residual = pack_rows(attended, rows), pack_rows(residual, rows)
        norm = self.post_attention_layernorm
        normed, residual = add_rms_norm(self.o_proj(attended), residual, norm.weight, norm.eps)
        if self._recomputes("mlp"):
            args = normed, residual, norm, self._has_dropout
            output = checkpoint_from_residual(self._mlp, *args)
        else:
            with self._saving_source(normed, residual, norm, "elementwise"):
                output = self._mlp(normed)
        return add_rms_norm(output, residual, next_norm.weight, next_norm.eps)

    def _norm_heads(self, qkv: Tensor) -> Tensor:
        """Queries and keys normed, each head by itself: like qkv."""
        q, k, v = qkv.split(self.qkv_sizes, 1)
        head_dim = len(self.q_norm.weight)
        q = self.q_norm(q.reshape(-1, head_dim)).view_as(q)
        k = self.k_norm(k.reshape(-1, head_dim)).view_as(k)
        return torch.cat((q, k, v), 1)

    def _mlp(self, normed: Tensor) -> Tensor:
        gate_up = self.gate_up_proj(normed)  # (total_tokens, 2 * intermediate_size)
        # no backward pass reads the result of gate_up_proj, so its gradient may overwrite it
        activated = swiglu(gate_up, overwrite=True)  # (total_tokens, intermediate_size)
        with self._saving_source(activated, gate_up, swiglu, "elementwise"):
            return self.down_proj(activated)

    def _recomputes(self, *policies: Recompute) -> bool:
        return self.recompute in policies and torch.is_grad_enabled()

    def _saving_source(
        self,
        result: Tensor,
        source: Tensor,
        compute: Callable[[Tensor], Tensor],
        *policies: Recompute,
    ) -> AbstractContextManager:
        """save_source_instead under these policies, else nothing."""
        if self._recomputes(*policies):
            return save_source_instead(result, source, compute)
        return nullcontext()

    @property
    def _has_dropout(self) -> bool:
        return self.training and any(getattr(x, "dropout", 0) for x in self.children())


def init_weights(module: nn.Module, seed: int) -> None:
    """Random weights, the same on every device: norms 1, biases 0, all else normal(0, 0.02)."""
    generator = torch.Generator().manual_seed(seed)
    for owner in module.modules():
        is_norm = isinstance(owner, RMSNorm | LayerNorm)
        for name, parameter in owner.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
            elif is_norm:
                nn.init.ones_(parameter)
            else:
                parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
