"""Parameters of the library functions that the backends call, as their sources declare them.

Names, kinds and defaults; annotations are left out. pybind11 functions without named arguments
take them by position only.
"""

from collections.abc import Callable
from typing import NamedTuple


class Recorded(NamedTuple):
    source: str  # repository, version or commit, file
    parameters: str


_FA = "Dao-AILab/flash-attention"
_FA2 = f"{_FA} v2.8.3 flash_attn/flash_attn_interface.py"
_FA3 = f"{_FA} 0251105a hopper/flash_attn_interface.py"
_FA4 = f"{_FA} 0251105a flash_attn/cute/interface.py"
_XFORMERS = "facebookresearch/xformers 0.0.33 115df95f xformers/ops/fmha"  # 0.0.35: same in mslk
_APEX = "NVIDIA/apex 6424da3b csrc"

_OFFSETS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
_NONE_OFFSETS = "cu_seqlens_q=None, cu_seqlens_k=None"

SIGNATURES = {
    "flash_attn.flash_attn_interface._flash_attn_varlen_forward": Recorded(
        _FA2,
        f"q, k, v, {_OFFSETS}, dropout_p, softmax_scale, causal, window_size_left=-1, "
        "window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, "
        "block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False",
    ),
    "flash_attn.flash_attn_interface._flash_attn_varlen_backward": Recorded(
        _FA2,
        f"dout, q, k, v, out, softmax_lse, dq, dk, dv, {_OFFSETS}, dropout_p, softmax_scale, "
        "causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, "
        "rng_state=None, zero_tensors=False",
    ),
    "flash_attn_interface._flash_attn_forward": Recorded(
        _FA3,
        f"q, k, v, k_new=None, v_new=None, qv=None, out_=None, {_NONE_OFFSETS}, "
        "cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, "
        "max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, "
        "rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, "
        "softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, "
        "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, "
        "num_splits=1, pack_gqa=None, sm_margin=0",
    ),
    "flash_attn_interface._flash_attn_backward": Recorded(
        _FA3,
        f"dout, q, k, v, out, softmax_lse, {_NONE_OFFSETS}, sequed_q=None, sequed_k=None, "
        "max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, "
        "is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, "
        "deterministic=False, sm_margin=0",
    ),
    "flash_attn.cute.interface._flash_attn_fwd": Recorded(
        _FA4,
        f"q, k, v, qv=None, {_NONE_OFFSETS}, seqused_q=None, seqused_k=None, max_seqlen_q=None, "
        "max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, "
        "softcap=None, window_size_left=None, window_size_right=None, learnable_sink=None, "
        "tile_mn=None, mma_pv_is_rs=None, intra_wg_overlap=None, num_threads=384, num_splits=1, "
        "pack_gqa=None, _arch=None, score_mod=None, mask_mod=None, block_sparse_tensors=None, "
        "return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None, "
        "q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, "
        "scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False",
    ),
    "flash_attn.cute.interface._flash_attn_bwd": Recorded(
        _FA4,
        "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, "
        "window_size_left=None, window_size_right=None, m_block_size=64, n_block_size=128, "
        "num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, "
        "dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, "
        f"V_in_regs=False, {_NONE_OFFSETS}, seqused_q=None, seqused_k=None, max_seqlen_q=None, "
        "max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None, "
        "score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, "
        "block_sparse_tensors=None, dlse=None, learnable_sink=None",
    ),
    "xformers.ops.memory_efficient_attention_forward_requires_grad": Recorded(
        f"{_XFORMERS}/__init__.py",
        "query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None",
    ),
    "xformers.ops.memory_efficient_attention_backward": Recorded(
        f"{_XFORMERS}/__init__.py",
        "grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None",
    ),
    "xformers.ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens": Recorded(
        f"{_XFORMERS}/attn_bias.py", "q_seqlen, kv_seqlen=None, *, device=None"
    ),
    "fused_layer_norm_cuda.rms_forward_affine": Recorded(
        f"{_APEX}/layer_norm_cuda.cpp", "input, normalized_shape, gamma, epsilon, /"
    ),
    "fused_layer_norm_cuda.rms_backward_affine": Recorded(
        f"{_APEX}/layer_norm_cuda.cpp",
        "dout, invvar, input_or_output, normalized_shape, gamma, epsilon, memory_efficient, /",
    ),
    "amp_C.multi_tensor_adam": Recorded(
        f"{_APEX}/amp_C_frontend.cpp",
        "chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, "
        "bias_correction, weight_decay, /",
    ),
    "amp_C.multi_tensor_adam_capturable": Recorded(
        f"{_APEX}/amp_C_frontend.cpp",
        "chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, "
        "bias_correction, weight_decay, inv_scale, /",
    ),
}


def declared(name: str, body: Callable) -> Callable:
    """A function with the recorded parameters of `name`, which hands them to body by name."""
    scope = {"body": body}
    exec(f"def function({SIGNATURES[name].parameters}): return body(**locals())", scope)
    return scope["function"]
