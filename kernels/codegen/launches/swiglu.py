"""SwiGLU at the widths of OpenLLaMA-3B and LLaMA2-7B."""

from mmalign_kernels.triton.swiglu import swiglu_bwd, swiglu_fwd

from ..compiler import meta

ROWS = 16384
MEMORY_BOUND = {"_swiglu_fwd_kernel", "_swiglu_bwd_kernel"}
LAUNCHES = {}
for _columns in (8640, 11008):
    _y, _gate_up = meta(ROWS, _columns), meta(ROWS, 2 * _columns)
    LAUNCHES[f"swiglu {_columns}"] = lambda x=_gate_up: swiglu_fwd(x)
    LAUNCHES[f"swiglu backward {_columns}"] = lambda y=_y, x=_gate_up: swiglu_bwd(y, x)
