"""Questions about pictures: ours against transformers' batched generate.

Both sides answer the same questions of different length, several about each picture, greedily: once
in a few tokens, and once by the log-odds of yes against no as the first of them, which needs one
forward pass. transformers pads on the left and runs at its fastest batch size of several, tried on
a part first; its processor would also decode every picture once a question, which is left out. The
answers of both sides are compared before anything is timed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.comparison import SCORE, Calls, Comparison, WrongResult, each
from bench.models import CPU_LARGE, LLAMA2_7B, Size, hugging_face_llava, random_llava
from bench.shapes import DEVICE, ON_GPU
from mmalign.model.generate import GenerationOptions, Prompt, generate
from mmalign.system import DTYPES

OURS, THEIRS = "mmalign", "transformers"
BATCH_SIZES = (1, 6, 18)
NUM_BEFORE, SHORTEST, LONGEST = 40, 8, 30  # tokens before the picture, and of a question
YES, NO = 3869, 1939  # LLaMA's ids of " Yes" and " No"
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}  # of log-odds


@dataclass
class Pictures(Comparison):
    size: Size
    num_pictures: int
    questions_per_picture: int  # POPE: 18
    num_new_tokens: int  # 1: log-odds alone
    precision: str
    rounds: int = 3
    variants: tuple[str, ...] = (OURS, THEIRS)
    batch_size: int = field(init=False, repr=False)  # transformers' fastest

    benchmark, direction = "pictures", SCORE

    @property
    def case(self) -> str:
        asked = "log-odds" if self.num_new_tokens == 1 else f"{self.num_new_tokens} new tokens"
        count = f"{self.num_pictures} pictures, {self.questions_per_picture} questions each"
        return f"{count}, {asked}, {self.size.name}, {self.precision}"

    def questions(self) -> list[Prompt]:
        """Those about one picture hold one tensor."""
        generator = torch.Generator().manual_seed(0)
        vision, vocabulary = self.size.vision, min(self.size.decoder.vocab_size, YES)

        def draw(length: int) -> list[int]:
            return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

        before, prompts = draw(NUM_BEFORE), []
        patches = [self.size.image_token_id] * vision.num_patches
        for _ in range(self.num_pictures):
            shape = (1, 3, vision.image_size, vision.image_size)
            pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
            count = (self.questions_per_picture,)
            lengths = torch.randint(SHORTEST, LONGEST, count, generator=generator)
            prompts += [Prompt(before + patches + draw(n), pixels) for n in lengths.tolist()]
        return prompts

    def calls(self, variants: Sequence[str]) -> Calls:
        model = random_llava(self.size, "finetune", DEVICE, DTYPES[self.precision]).eval()
        prompts = self.questions()
        sides = {OURS: partial(self._ours, model, prompts)}
        if THEIRS in variants:
            theirs = hugging_face_llava(model).eval()
            seconds = {}
            for batch_size in BATCH_SIZES:
                some = prompts[: self.questions_per_picture]
                begin = time.perf_counter()
                self._theirs(theirs, some, batch_size)
                seconds[batch_size] = time.perf_counter() - begin
            self.batch_size = min(seconds, key=seconds.__getitem__)
            sides[THEIRS] = partial(self._theirs, theirs, prompts, self.batch_size)
        found = {name: sides[name]() for name in variants}
        if len(found) == 2:
            self.compare(found[OURS], found[THEIRS])
        return Calls({name: sides[name] for name in variants})

    def compare(self, ours: Tensor, theirs: Tensor) -> None:
        """Raises WrongResult where log-odds differ by more than rounding."""
        difference = (ours - theirs).abs().max().item()
        if not difference <= TOLERANCE[self.precision]:
            raise WrongResult(OURS, f"log-odds differ by up to {difference}")

    def _ours(self, model, prompts: list[Prompt]) -> Tensor:
        """Log-odds of the first word, (num_questions,)."""
        options = GenerationOptions(max_new_tokens=self.num_new_tokens)
        tokenizer: Any = _NoText()
        found = generate(model, tokenizer, prompts, options, watch=(YES, NO))
        return torch.tensor([yes - no for yes, no in (x.first_logprobs for x in found)])

    @torch.no_grad()
    def _theirs(self, model, prompts: list[Prompt], batch_size: int) -> Tensor:
        odds = []
        for begin in range(0, len(prompts), batch_size):
            batch = prompts[begin : begin + batch_size]
            longest = max(len(x.input_ids) for x in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, x in enumerate(batch):
                ids[row, longest - len(x.input_ids) :] = torch.tensor(x.input_ids)
                mask[row, longest - len(x.input_ids) :] = 1
            pixels = torch.cat([x.pixels for x in batch if isinstance(x.pixels, Tensor)])
            preprocessing = self.size.vision.preprocessing
            mean, std = (
                torch.tensor(x).view(3, 1, 1)
                for x in (preprocessing.image_mean, preprocessing.image_std)
            )
            values = ((pixels / 255 - mean) / std).to(DEVICE, DTYPES[self.precision])
            found = model.generate(
                input_ids=ids.to(DEVICE),
                attention_mask=mask.to(DEVICE),
                pixel_values=values,
                max_new_tokens=self.num_new_tokens,
                min_new_tokens=self.num_new_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                return_dict_in_generate=True,
                output_logits=True,
            )
            first = found.logits[0].float()
            odds.append((first[:, YES] - first[:, NO]).cpu())
        return torch.cat(odds)

    def figures(self, variant: str, seconds: float) -> dict:
        questions = self.num_pictures * self.questions_per_picture
        info = {"samples_per_second": questions / seconds, "threads": torch.get_num_threads()}
        return info if variant == OURS else info | {"batch_size": self.batch_size}


class _NoText:
    """A tokenizer for token ids alone; nothing ends a text."""

    eos_token_id = None

    def decode(self, ids: Sequence[int]) -> str:
        return ""


if ON_GPU:
    COMPARISONS = [Pictures(LLAMA2_7B, 40, 18, num_new_tokens, "bf16") for num_new_tokens in (8, 1)]
else:
    COMPARISONS = [
        Pictures(CPU_LARGE, 2, 18, num_new_tokens, "fp32", rounds=2) for num_new_tokens in (8, 1)
    ]
test_pictures = each(COMPARISONS)
