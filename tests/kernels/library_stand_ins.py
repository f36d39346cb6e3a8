"""Modules that look like the libraries and compute in plain fp64 PyTorch, sample by sample.

Every function has exactly the recorded parameters, so a call that the library would refuse fails
here, too; what it stands in for asserts what the library's own checks demand of its tensors.
"""

import sys
from collections import Counter
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import torch
from mmalign_kernels import dispatch, libraries

from .library_signatures import declared

calls = Counter()  # of the stand-ins, by name


def _scores(q, k, causal, scale):
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -1e30)
    return scores


def _by_sample(q, k, v, cu_seqlens, max_seqlen):
    """Rows of a sample, and its q, k and v in fp64, keys repeated for every query head."""
    assert cu_seqlens.dtype == torch.int32 and q.shape[2] % 8 == 0
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1
    assert cu_seqlens.diff().max() <= max_seqlen
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(group, 1) for x in (k, v))
    for begin, end in zip(cu_seqlens, cu_seqlens[1:], strict=False):
        yield slice(begin, end), *(x[begin:end] for x in (q, k, v))


def attend(q, k, v, cu_seqlens, max_seqlen, causal, scale):
    """out (total_tokens, heads, head_dim) and logsumexp (heads, total_tokens)."""
    outs, sums = [], []
    for _, *parts in _by_sample(q, k, v, cu_seqlens, max_seqlen):
        scores = _scores(*parts[:2], causal, scale)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(2), parts[2]))
        sums.append(scores.logsumexp(2))
    return torch.cat(outs), torch.cat(sums, 1)


def attend_bwd(grad, q, k, v, out, logsumexp, cu_seqlens, max_seqlen, causal, scale):
    """dq, dk, dv by the formula of flash attention, from what the forward pass kept."""
    assert grad.is_contiguous() and grad.dtype == q.dtype and out.shape == grad.shape
    assert logsumexp.shape == (q.shape[1], len(q)) and logsumexp.is_contiguous()
    grads = [torch.zeros_like(q.double()) for _ in range(3)]
    for rows, *parts in _by_sample(q, k, v, cu_seqlens, max_seqlen):
        probs = (_scores(*parts[:2], causal, scale) - logsumexp[:, rows, None].double()).exp()
        g, o = grad[rows].double(), out[rows].double()
        inner = torch.einsum("qhd,khd->hqk", g, parts[2]) - (g * o).sum(2).t()[..., None]
        inner = probs * inner * scale
        grads[0][rows] = torch.einsum("hqk,khd->qhd", inner, parts[1])
        grads[1][rows] = torch.einsum("hqk,qhd->khd", inner, parts[0])
        grads[2][rows] = torch.einsum("hqk,qhd->khd", probs, g)
    summed = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in grads[1:])
    return tuple(x.to(q.dtype) for x in (grads[0], *summed))


def _forward(q, *arguments):
    out, logsumexp = attend(q, *arguments)
    return out.to(q.dtype), logsumexp.float()


def _offsets(a: dict) -> tuple:
    assert a["cu_seqlens_q"] is a["cu_seqlens_k"] and a["max_seqlen_q"] == a["max_seqlen_k"]
    return a["cu_seqlens_q"], a["max_seqlen_q"]


def _flash_fwd(**a):
    assert {a["window_size_left"], a["window_size_right"]} <= {-1, None}, "no window"
    assert a.get("dropout_p", 0.0) == 0.0 and not a["softcap"] and a.get("return_lse", True)
    out = _forward(a["q"], a["k"], a["v"], *_offsets(a), a["causal"], a["softmax_scale"])
    return *out, None, None


def _flash_bwd(**a):
    assert {a["window_size_left"], a["window_size_right"]} <= {-1, None} and a["softcap"] == 0.0
    assert a["deterministic"] == torch.are_deterministic_algorithms_enabled()
    causal = a["causal"] if "causal" in a else a["is_causal"]
    logsumexp = a["softmax_lse"] if "softmax_lse" in a else a["lse"]
    grads = attend_bwd(
        *(a["dout"], a["q"], a["k"], a["v"], a["out"], logsumexp, *_offsets(a)),
        *(causal, a["softmax_scale"]),
    )
    if a["dq"] is None:
        return grads
    for grad, name in zip(grads, ("dq", "dk", "dv"), strict=True):
        assert a[name].dtype == grad.dtype and a[name].stride(2) == 1
        a[name].copy_(grad)
    return torch.empty(0)  # softmax_d


class BlockDiagonalMask:
    """As xformers': made from lengths on the host."""

    def __init__(self, lengths: list[int], causal: bool = False):
        self.lengths, self.causal = lengths, causal

    def make_causal(self):
        return BlockDiagonalMask(self.lengths, causal=True)

    @property
    def samples(self) -> tuple:
        bounds = torch.tensor([0, *self.lengths], device="cpu").cumsum(0).int()
        return bounds, max(self.lengths), self.causal


def _mask(q_seqlen, kv_seqlen, device):
    assert kv_seqlen is None and all(isinstance(x, int) for x in q_seqlen) and device is not None
    return BlockDiagonalMask(q_seqlen)


def _xformers_fwd(query, key, value, attn_bias, p, scale, op, output_dtype):
    assert p == 0.0 and query.shape == key.shape == value.shape and query.shape[0] == 1
    out, logsumexp = _forward(query[0], key[0], value[0], *attn_bias.samples, scale)
    return out[None], logsumexp[None]


def _xformers_bwd(grad, output, lse, query, key, value, attn_bias, p, scale, op):
    tensors = (x[0] for x in (grad, query, key, value, output, lse))
    return tuple(x[None] for x in attend_bwd(*tensors, *attn_bias.samples, scale))


def _rms_fwd(input, normalized_shape, gamma, epsilon):
    assert input.is_contiguous() and normalized_shape == [input.shape[1]] == list(gamma.shape)
    wide = input.double()
    rstd = (wide.square().mean(1) + epsilon).rsqrt()
    return [(wide * rstd[:, None] * gamma.double()).to(input.dtype), rstd.float()]


def _rms_bwd(dout, invvar, input_or_output, normalized_shape, gamma, epsilon, memory_efficient):
    assert dout.is_contiguous() and input_or_output.is_contiguous() and not memory_efficient
    assert normalized_shape == list(gamma.shape) and invvar.shape == (len(dout),)
    x = input_or_output.double()
    normed = x * invvar.double()[:, None]
    weighted = dout.double() * gamma.double()
    grad = (weighted - normed * (weighted * normed).mean(1, True)) * invvar.double()[:, None]
    return [grad.to(dout.dtype), (dout.double() * normed).sum(0).to(gamma.dtype)]


def _adam(chunk_size, noop_flag, tensor_lists, inv_scale=None, **a):
    assert noop_flag.dtype == torch.int32 and not noop_flag.any() and chunk_size > 0
    assert a["mode"] == a["bias_correction"] == 1, "decoupled decay, corrected moments"
    for g, p, m, v in zip(*tensor_lists, strict=True):
        g = g.double() * (1.0 if inv_scale is None else inv_scale.double())
        m.copy_(a["beta1"] * m.double() + (1 - a["beta1"]) * g)
        v.copy_(a["beta2"] * v.double() + (1 - a["beta2"]) * g * g)
        m_hat = m.double() / (1 - a["beta1"] ** int(a["step"]))
        v_hat = v.double() / (1 - a["beta2"] ** int(a["step"]))
        update = m_hat / (v_hat.sqrt() + a["epsilon"]) + a["weight_decay"] * p.double()
        p.copy_(p.double() - float(a["lr"]) * update)


def _adam_capturable(**a):
    tensors = {"lr": torch.float32, "step": torch.int32, "inv_scale": torch.float32}
    assert all(a[name].dtype == dtype for name, dtype in tensors.items())
    _adam(**a)


BODIES = {
    "flash_attn.flash_attn_interface._flash_attn_varlen_forward": _flash_fwd,
    "flash_attn.flash_attn_interface._flash_attn_varlen_backward": _flash_bwd,
    "flash_attn_interface._flash_attn_forward": _flash_fwd,
    "flash_attn_interface._flash_attn_backward": _flash_bwd,
    "flash_attn.cute.interface._flash_attn_fwd": _flash_fwd,
    "flash_attn.cute.interface._flash_attn_bwd": _flash_bwd,
    "xformers.ops.memory_efficient_attention_forward_requires_grad": _xformers_fwd,
    "xformers.ops.memory_efficient_attention_backward": _xformers_bwd,
    "xformers.ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens": _mask,
    "fused_layer_norm_cuda.rms_forward_affine": _rms_fwd,
    "fused_layer_norm_cuda.rms_backward_affine": _rms_bwd,
    "amp_C.multi_tensor_adam": _adam,
    "amp_C.multi_tensor_adam_capturable": _adam_capturable,
}


def _counted(name: str):
    def body(**arguments):
        calls[name.rpartition(".")[2]] += 1
        return BODIES[name](**arguments)

    return declared(name, body)


def _install_modules(monkeypatch) -> None:
    made: dict[str, ModuleType] = {}
    for name in BODIES:
        module, _, function = name.rpartition(".")
        owner, _, method = module.rpartition(".")
        if method == "BlockDiagonalMask":
            BlockDiagonalMask.from_seqlens = staticmethod(_counted(name))
            module, function, value = owner, method, BlockDiagonalMask
        else:
            value = _counted(name)
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in made:
                made[path] = ModuleType(path)
                made[path].__path__ = []  # a package, with nothing on disk
                made[path].__spec__ = SimpleNamespace(name=path)
                monkeypatch.setitem(sys.modules, path, made[path])
        setattr(made[module], function, value)


def _varlen_fwd(q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, debug, **a):
    calls["_flash_attention_forward"] += 1
    assert cum_q is cum_k and max_q == max_k and dropout_p == 0.0 and not debug
    out, logsumexp = _forward(q, k, v, cum_q, max_q, is_causal, a["scale"])
    unused = torch.empty(0)
    return out, logsumexp, torch.zeros(2, dtype=torch.uint64), unused, unused.clone()


def _varlen_bwd(
    grad, q, k, v, out, logsumexp, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, rng, _, **a
):  # fmt: skip
    calls["_flash_attention_backward"] += 1
    assert cum_q is cum_k and max_q == max_k and dropout_p == 0.0 and rng.shape == (2,)
    return attend_bwd(grad, q, k, v, out, logsumexp, cum_q, max_q, is_causal, a["scale"])


def _install_torch_varlen(monkeypatch) -> torch.library.Library:
    """CPU kernels of torch's own operators: torch itself checks the arguments."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("_flash_attention_forward", _varlen_fwd, "CPU")
    kernels.impl("_flash_attention_backward", _varlen_bwd, "CPU")
    return kernels


def forget() -> None:
    """What is cached of the installed libraries."""
    libraries.find.cache_clear()
    dispatch._choose.cache_clear()


def install(monkeypatch, dtypes: tuple[torch.dtype, ...] = (torch.float32,)):
    """All stand-ins, allowed on the CPU and in `dtypes`; a generator that ends by removing them."""
    forget()
    calls.clear()
    _install_modules(monkeypatch)
    kernels = _install_torch_varlen(monkeypatch)
    for name, library in list(libraries.LIBRARIES.items()):
        here = replace(library, device="cpu", dtypes=(*library.dtypes, *dtypes))
        monkeypatch.setitem(libraries.LIBRARIES, name, here)
    yield calls
    kernels._destroy()
    forget()
