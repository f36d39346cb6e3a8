"""Compiles the Triton kernels of a run before its first step (mmalign_kernels/warm_up.py).

Once per node: otherwise every rank would compile them for itself.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from mmalign_kernels import warm_up
from mmalign_kernels.warm_up import META

from mmalign.batch import PackedBatch
from mmalign.config import TrainConfig
from mmalign.data.loader import Step
from mmalign.data.templates import trains_image_tokens
from mmalign.distributed import DistributedContext
from mmalign.evaluation.warm_up import score_without_data
from mmalign.flops import Workload
from mmalign.model.llava import Llava, prefix_key_values
from mmalign.model.meta import llava_on_meta
from mmalign.system import DTYPES
from mmalign.tokenizer import Tokenizer
from mmalign.training.build import MIN_PREFIX_TOKENS, check_vocabulary
from mmalign.training.trainer import Trainer

TOKENS, PREFIX = 1024, 32  # no kernel depends on their number


@contextmanager
def compiled_kernels(
    config: TrainConfig, ranks: DistributedContext, tokenizer: Tokenizer
) -> Iterator[None]:
    """Compiles the kernels of the run while the block runs, which ends when all nodes have them."""
    compiling = nullcontext()
    if ranks.device.type == "cuda" and os.environ.get("LOCAL_RANK", "0") == "0":
        program = RunWithoutData.of_run(config, tokenizer)
        compiling = warm_up.compiled_kernels(program, ranks.device)
    with compiling:
        yield
    ranks.barrier()


@dataclass(frozen=True)
class RunWithoutData:
    """One optimizer step on meta tensors, and a batch of scores where the run evaluates."""

    config: TrainConfig
    workload: Workload  # with the rows of image tokens

    @classmethod
    def of_run(cls, config: TrainConfig, tokenizer: Tokenizer) -> "RunWithoutData":
        workload = Workload.from_config(config)
        num_rows = workload.decoder.vocab_size
        num_rows += 0 if config.data.text_only else check_vocabulary(config, tokenizer)
        decoder = replace(workload.decoder, vocab_size=num_rows)
        return cls(config, replace(workload, decoder=decoder))

    def __call__(self) -> None:
        batch, model = self._batch(), self._model()
        trainer = Trainer(self.config, DistributedContext(0, 1, META), model, num_steps=2)
        trainer.train_step(Step(1, [], [batch], batch.num_loss_tokens, TOKENS))
        if self._prefix_length:  # a short one takes other tiles than a long one
            prefix_key_values(model.decoder, range(MIN_PREFIX_TOKENS))
        if self.config.evaluation.every:
            model.with_decoder(score_without_data)

    def _model(self) -> Llava:
        config, workload = self.config, self.workload
        model = llava_on_meta(
            workload.decoder,
            workload.vision,
            workload.projector_type,
            DTYPES[config.precision],
            config.shortcuts,
            range(self._prefix_length),
        )
        model.set_trainable(config.stage, config.lora, trains_image_tokens(config))
        _, policy, num_layers = config.micro_batching
        model.decoder.set_recompute(policy, num_layers)
        return model.train()

    def _batch(self) -> PackedBatch:
        """Two samples, with an image each where there are images."""
        vision = self.workload.vision
        size, patches = (vision.image_size, vision.num_patches) if vision else (1, 0)
        pixels = torch.empty(2 if vision else 0, 3, size, size, dtype=torch.uint8, device=META)
        numbers = {"dtype": torch.int32, "device": META}
        return PackedBatch(
            input_ids=torch.empty(TOKENS, dtype=torch.int64, device=META),
            target_ids=torch.empty(TOKENS, dtype=torch.int64, device=META),
            position_ids=torch.empty(TOKENS, **numbers),
            cu_seqlens=torch.empty(3, **numbers),
            max_seqlen=TOKENS // 2,
            num_loss_tokens=TOKENS // 4,
            pixel_values=pixels,
            image_positions=torch.empty(2 * patches, dtype=torch.int64, device=META),
            prefix_length=self._prefix_length,
        )

    @property
    def _prefix_length(self) -> int:
        config = self.config
        return PREFIX if config.stage == "pretrain" and config.shortcuts.frozen_prefix else 0
