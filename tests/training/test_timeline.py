"""Categories of hand-written traces, and the roofline bounds of a small step counted by hand."""

import pytest
import torch

from mmalign.config import LoraConfig, ShortcutConfig, TrainConfig
from mmalign.flops import Workload, step_flops
from mmalign.model.config import DecoderConfig
from mmalign.training.profile.roofline import MeasuredPeaks, roofline_bounds
from mmalign.training.profile.timeline import (
    ATTENTION,
    COMMUNICATION,
    COPIES,
    DATA_WAIT,
    ELEMENTWISE,
    IDLE,
    LOSS,
    MATRIX,
    NORMS,
    OPTIMIZER,
    timeline,
)
from tests.model import tiny

STEP = {"ph": "X", "cat": "user_annotation", "name": "step 7", "ts": 0, "dur": 100, "tid": 1}


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def microseconds(events: list[dict]) -> dict[str, float]:
    measured = timeline([STEP, *events])
    assert measured.wall == pytest.approx(100e-6)
    return {name: round(t * 1e6, 6) for name, t in measured.seconds.items() if t > 1e-12}


def test_on_a_cpu_the_innermost_operation_has_the_instant():
    operations = [
        event("user_annotation", "data wait", 0, 10),
        event("cpu_op", "aten::mm", 2, 5),  # the loader's own work
        event("user_annotation", "forward", 10, 50),
        event("user_annotation", "layer 0", 11, 48),
        event("cpu_op", "aten::linear", 12, 10),
        event("cpu_op", "aten::addmm", 13, 8),
        event("cpu_op", "aten::add", 22, 3),
        event("user_annotation", "mmalign::rotary_attention_fwd", 25, 15),
        event("cpu_op", "aten::bmm", 26, 5),
        event("user_annotation", "mmalign::add_rms_norm_fwd", 40, 6),
        event("user_annotation", "mmalign::linear_cross_entropy_fwd", 46, 4),
        event("cpu_op", "aten::mm", 47, 2),
        event("cpu_op", "aten::clone", 50, 3),
        event("cpu_op", "aten::copy_", 51, 1),
        event("user_annotation", "optimizer", 60, 20),
        event("user_annotation", "mmalign::adamw_step", 61, 10),
        event("cpu_op", "aten::mm", 0, 100, tid=2),  # another thread
        event("cpu_op", "aten::mm", 120, 10),  # after the step
    ]
    assert microseconds(operations) == {
        DATA_WAIT: 10,
        MATRIX: 8,
        ELEMENTWISE: 2 + 3,  # what aten::linear does around the product, and the addition
        ATTENTION: 15,
        NORMS: 6,
        LOSS: 4,
        COPIES: 3,
        OPTIMIZER: 20,
        IDLE: 100 - 71,
    }


def test_on_a_gpu_kernels_belong_to_what_launched_them():
    launch, kernel = "cuda_runtime", "kernel"
    host = [
        event("user_annotation", "data wait", 0, 12),
        event("user_annotation", "mmalign::rms_norm_fwd", 12, 4),
        event("cuda_driver", "cuLaunchKernelEx", 13, 1, correlation=1),
        event("cpu_op", "aten::mm", 16, 4),
        event(launch, "cudaLaunchKernelExC", 17, 1, correlation=2),
        event("user_annotation", "mmalign::linear_cross_entropy_fwd", 20, 4),
        event("cpu_op", "aten::mm", 20.5, 3),
        event(launch, "cudaLaunchKernel", 21, 1, correlation=3),
        event("user_annotation", "mmalign::rotary_attention_bwd", 30, 4, tid=9),  # autograd
        event("cuda_driver", "cuLaunchKernelEx", 31, 1, tid=9, correlation=4),
        event("cpu_op", "aten::add", 34, 4, tid=9),
        event(launch, "cudaLaunchKernel", 35, 1, tid=9, correlation=5),
        event("cpu_op", "aten::item", 40, 60),  # waits for the device
    ]
    device = [
        event(kernel, "_rms_norm_kernel", 5, 15, 7, correlation=1),  # over the data wait: ahead
        event(kernel, "nvjet_tst_128x256", 20, 20, 7, correlation=2),
        event(kernel, "nvjet_tst_64x256", 40, 10, 7, correlation=3),
        event(kernel, "_attention_bwd_kernel", 52, 20, 7, correlation=4),
        event(kernel, "vectorized_elementwise_kernel", 72, 3, 7, correlation=5),
        event(kernel, "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 60, 30, 20, correlation=6),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 85, 10, 21, correlation=8),
    ]
    assert microseconds(host + device) == {
        DATA_WAIT: 5,
        NORMS: 15,
        MATRIX: 20,
        LOSS: 10,
        ATTENTION: 20,
        ELEMENTWISE: 3,
        COMMUNICATION: 15,  # what the attention and the addition do not hide
        COPIES: 5,
        IDLE: 100 - 93,
    }


def test_bounds_are_flops_and_bytes_over_the_peaks(small_world):
    samples = tiny.text_samples()
    batch = tiny.pack(samples)
    step = type("Step", (), {"batches": [batch, batch]})
    decoder = DecoderConfig(103, 64, 96, 2, 4, 2, 16)
    workload = Workload(decoder, None, "finetune", LoraConfig())
    parameter = torch.nn.Parameter(torch.zeros(10, 10))
    config = TrainConfig("finetune", shortcuts=ShortcutConfig(last_layer_rows=False))
    peaks = MeasuredPeaks(1.0, 1e12)
    bounds = roofline_bounds(workload, [step], {"p": parameter}, torch.float32, peaks, config)
    flops, tokens = step_flops(workload, step.batches), 2 * 50
    assert bounds[MATRIX] == flops.projections / 1e12 and bounds[LOSS] == flops.lm_head / 1e12
    # rms_norm: 2 of x forward, 3 backward; four add_rms_norms: 4 and 4; weights and their gradients
    norm_rows = 5 + 4 * 8
    weights = 2 * (3 + 4 * 3)  # of 2 micro-batches: read forward and backward, gradient written
    assert bounds[NORMS] == 4 * 64 * (norm_rows * tokens + weights)
    assert bounds[ELEMENTWISE] == 4 * tokens * (2 * 8 * 96 + 2 * 64)  # SwiGLU 3 + 5; embeddings
    # parameter and two moments read and written, gradient read twice (its norm)
    assert bounds[OPTIMIZER] == 100 * 4 * 8
    assert bounds[DATA_WAIT] == bounds[IDLE] == 0 and bounds[COMMUNICATION] is None
