"""Compiles the Triton kernels of an evaluation or a conversation while its weights load.

Scores and answers on meta tensors launch what they launch with data; mmalign_kernels/warm_up.py
compiles it.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mmalign_kernels import warm_up
from mmalign_kernels.warm_up import META

from mmalign.config import ProjectorType
from mmalign.evaluation.requests import EncodedRequest
from mmalign.evaluation.scoring import make_plan, run_batches
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.decoder import Decoder
from mmalign.model.generate import Prompt, prompt_rows
from mmalign.model.generation_batches import cut_batches
from mmalign.model.generation_cache import BatchCache
from mmalign.model.hf_config import read_hf_config
from mmalign.model.llava import Llava
from mmalign.model.meta import IM_START, llava_on_meta
from mmalign.model.projector import kind_in
from mmalign.model.tiles import NEWLINE, Pixels, Tiles, num_image_tokens

LONG = 64  # tokens; attention takes other tiles for few
NEW_TOKENS = 2  # one of the prompt's pass, one of a decoding step


def compiled_kernels(
    weights: Path,
    dtype: torch.dtype,
    device: torch.device,
    scores: bool = False,
    answers: bool = False,
    pictures: bool = False,
) -> AbstractContextManager[None]:
    """Compiles the kernels of the model in a Hugging Face folder while the block runs.

    pictures: questions come with them, to a Llava.
    """
    program = EvaluationWithoutData.of_folder(weights, dtype, scores, answers, pictures)
    return warm_up.compiled_kernels(program, device)


@dataclass(frozen=True)
class EvaluationWithoutData:
    """Scores, answers or both on meta tensors."""

    decoder: DecoderConfig
    vision: VisionConfig | None  # None: answers about text
    projector_type: ProjectorType
    dtype: torch.dtype
    scores: bool
    answers: bool

    @classmethod
    def of_folder(
        cls, weights: Path, dtype: torch.dtype, scores: bool, answers: bool, pictures: bool
    ) -> "EvaluationWithoutData":
        decoder, vision, projector_type = DecoderConfig.from_hf(weights), None, "linear"
        if pictures:
            vision = VisionConfig.from_hf(weights)
            projector_type = kind_in(read_hf_config(weights).values, weights)
        return cls(decoder, vision, projector_type, dtype, scores, answers)

    def __call__(self) -> None:
        llava = llava_on_meta(self.decoder, self.vision, self.projector_type, self.dtype)
        if self.scores:
            score_without_data(llava.decoder)
        if self.answers:
            _answer_without_data(llava)


@torch.no_grad()
def score_without_data(decoder: Decoder) -> None:
    """Launches what run_plan launches."""
    decoder.eval()
    for length in (LONG, 1):
        ids = np.zeros(length, np.int32)
        plan = make_plan([EncodedRequest(ids, ids[-1:], 0)], [0], ["no data"], length)
        for _ in run_batches(decoder, plan, META):
            pass


@torch.no_grad()
def _answer_without_data(llava: Llava) -> None:
    """Launches what generate launches for a batch of prompts and in a decoding step."""
    llava.eval()
    ids, pixels = [IM_START] * LONG, None
    if llava.vision_tower is not None:
        pixels = _black(llava.vision_tower.config)
        num_tokens = num_image_tokens(pixels, llava.vision_tower.config.num_patches)
        ids += [llava.image_token_id] * num_tokens
    prompts = prompt_rows([Prompt(ids, pixels)], llava.image_token_id)
    for batch in cut_batches(prompts, NEW_TOKENS, cache_tokens=1):
        cache = BatchCache(llava, batch.num_rows)
        cache.read(list(batch.segments(NEW_TOKENS)))
        cache.read([prompt.segment([IM_START]) for prompt in batch.prompts])


def _black(vision: VisionConfig) -> Pixels:
    """A picture, on the CPU as those of files are."""
    pixels = torch.zeros(1, 3, vision.image_size, vision.image_size, dtype=torch.uint8)
    if not vision.grids:
        return pixels
    rows = torch.tensor([*range(vision.num_patches), NEWLINE])
    return Tiles(pixels, rows, vision.num_patches)
