"""Compiles the Triton kernels of a run before its first step: on several cores, once per node.

Otherwise Triton compiles a kernel when it is first launched, one after the other, and every rank of
a node does so for itself. Here processes share the kernels of one step of two layers on meta
tensors, while the run reads its data and weights. What it saves is not measured yet.
"""

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from mmalign_kernels import dispatch
from mmalign_kernels.triton import launch

from mmalign.batch import PackedBatch
from mmalign.config import TrainConfig
from mmalign.data.loader import Step
from mmalign.data.templates import trains_image_tokens
from mmalign.distributed import DistributedContext
from mmalign.flops import Workload
from mmalign.model.decoder import Decoder
from mmalign.model.llava import Llava
from mmalign.model.projector import Projector
from mmalign.model.vision_tower import VisionTower
from mmalign.system import DTYPES
from mmalign.tokenizer import Tokenizer
from mmalign.training.build import check_vocabulary
from mmalign.training.trainer import Trainer

log = logging.getLogger("mmalign")
LAYERS = 2  # one between others, and the last one
TOKENS, PREFIX = 1024, 32  # no kernel depends on their number
MOST_PROCESSES = 8
META = torch.device("meta")


@dataclass(frozen=True)
class Shapes:
    """What decides which kernels a run needs."""

    config: TrainConfig
    workload: Workload  # with the rows of image tokens


@contextmanager
def compiled_kernels(
    config: TrainConfig, ranks: DistributedContext, tokenizer: Tokenizer
) -> Iterator[None]:
    """Compiles the kernels of the run while the block runs, which ends when all nodes have them."""
    processes = []
    first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
    if ranks.device.type == "cuda" and first_of_node and dispatch.forced_backend() != "reference":
        workload = Workload.from_config(config)
        num_rows = workload.decoder.vocab_size
        num_rows += 0 if config.data.text_only else check_vocabulary(config, tokenizer)
        workload = replace(workload, decoder=replace(workload.decoder, vocab_size=num_rows))
        gpu = launch.gpu(torch.empty(0, device=ranks.device))
        cores = len(os.sched_getaffinity(0))
        processes = start(Shapes(config, workload), gpu, min(max(cores // 2, 1), MOST_PROCESSES))
    try:
        yield
        finish(processes)
    finally:
        for process in processes:
            process.kill()
    ranks.barrier()


def start(shapes: Shapes, gpu: launch.Gpu, num_processes: int) -> list[subprocess.Popen]:
    processes = []
    for share in range(num_processes):
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(pickle.dumps((shapes, gpu, share, num_processes)))
        process.stdin.close()
        processes.append(process)
    return processes


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """Names of the compiled kernels. Where that failed: a warning, since the first step does it."""
    names = []
    for process in processes:
        assert process.stdout is not None and process.stderr is not None
        output, errors = (x.read().decode() for x in (process.stdout, process.stderr))
        if process.wait():
            reason = errors.strip().rpartition("\n")[2]
            log.warning("kernels are compiled at their first launch, not before it: %s", reason)
        names += output.split()
    return names


# ---- in a process of its own ----


def step_without_data(shapes: Shapes) -> None:
    """One optimizer step on meta tensors: it launches every kernel that a step launches."""
    batch = _batch(shapes)
    trainer = Trainer(shapes.config, DistributedContext(0, 1, META), _model(shapes), num_steps=2)
    trainer.train_step(Step(1, [], [batch], batch.num_loss_tokens, TOKENS))


def _model(shapes: Shapes) -> Llava:
    config, workload = shapes.config, shapes.workload
    decoder_config = replace(workload.decoder, num_hidden_layers=LAYERS)
    with META:
        decoder, tower, projector = Decoder(decoder_config), None, None
        if workload.vision:
            tower = VisionTower(replace(workload.vision, num_hidden_layers=LAYERS))
            projector = Projector(workload.vision.hidden_size, decoder_config.hidden_size)
        tokens: Any = SimpleNamespace()
        tokens.image_token_id, tokens.im_start_id, tokens.im_end_id = 0, 1, 2  # any of its rows
        prefix_ids = range(_prefix_length(config))
        model = Llava(decoder, tower, projector, tokens, config.shortcuts, prefix_ids)
        model.to(META, DTYPES[config.precision])
        model.set_trainable(config.stage, config.lora, trains_image_tokens(config))
    model.decoder.set_recompute(config.micro_batching.recompute, None)
    return model.train()


def _batch(shapes: Shapes) -> PackedBatch:
    """Two samples, with an image each where there are images."""
    vision = shapes.workload.vision
    size, patches = (vision.image_size, vision.num_patches) if vision else (1, 0)
    numbers = {"dtype": torch.int32, "device": META}
    return PackedBatch(
        input_ids=torch.empty(TOKENS, dtype=torch.int64, device=META),
        target_ids=torch.empty(TOKENS, dtype=torch.int64, device=META),
        position_ids=torch.empty(TOKENS, **numbers),
        cu_seqlens=torch.empty(3, **numbers),
        max_seqlen=TOKENS // 2,
        num_loss_tokens=TOKENS // 4,
        pixel_values=torch.empty(2 if vision else 0, 3, size, size, dtype=torch.uint8, device=META),
        image_positions=torch.empty(2 * patches, dtype=torch.int64, device=META),
        prefix_length=_prefix_length(shapes.config),
    )


def _prefix_length(config: TrainConfig) -> int:
    return PREFIX if config.stage == "pretrain" and config.shortcuts.frozen_prefix else 0


def main() -> None:
    shapes, gpu, share, num_shares = pickle.load(sys.stdin.buffer)
    from mmalign_kernels.triton.compile_only import compile_only  # only here is Triton sure

    names = compile_only(gpu, share, num_shares)
    with dispatch.use_backend("triton"):
        step_without_data(shapes)
    print(*dict.fromkeys(names))


if __name__ == "__main__":
    main()
