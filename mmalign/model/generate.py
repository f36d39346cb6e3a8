"""Generation with a KV cache: prompts of any lengths together, greedy or sampled, with images.

prompts -> batches that fit the cache -> prefill -> decoding steps of one token per running sequence

The cache has one block of rows per layer: the prefix that all prompts of a batch share, then what
the prompts about one picture share, the picture included, then each sequence's own rows. A prefix
is computed once. Nothing is padded. A decoding step packs the last tokens of the sequences that
have not ended.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmalign.command import progress_bar
from mmalign.errors import UserError
from mmalign.model.config import DecoderConfig
from mmalign.model.generation_batches import Batch, PromptRows, cut_batches
from mmalign.model.generation_cache import BatchCache
from mmalign.model.llava import Llava
from mmalign.model.sampling import TextStream, draw, sampling_probabilities
from mmalign.model.tiles import Pixels, num_image_tokens
from mmalign.tokenizer import Tokenizer

Reason = Literal["end", "stop", "length"]  # end-of-text token, stop string, max_new_tokens


@dataclass(frozen=True)
class Prompt:
    input_ids: Sequence[int]  # at least one; every patch of an image is an image_token_id
    pixels: Pixels | None = None  # computed once for prompts that hold one object
    draws: int | None = None  # with the seed decides its draws; None: its place in the list


@dataclass(frozen=True)
class GenerationOptions:
    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # 1: all
    seed: int = 0  # of a prompt's draws
    stop: tuple[str, ...] = ()  # texts that end a generation
    end_ids: tuple[int, ...] = ()  # tokens that do, besides end-of-sequence

    def __post_init__(self):
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (
                self.temperature == 0 or 1e-3 <= self.temperature <= 1e3,  # else logits overflow
                "0 (greedy), or a number from 0.001 to 1,000",
            ),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        for name, (is_valid, expected) in limits.items():
            if not is_valid:
                raise UserError(f"{name} is {getattr(self, name)}; expected {expected}")


@dataclass(frozen=True)
class Generation:
    token_ids: list[int]  # all that were generated, without the token that ends the text
    text: str  # up to the first stop string
    reason: Reason
    first_logprobs: tuple[float, ...] = ()  # of the tokens in `watch`, as the first new token


@torch.no_grad()
def generate(
    llava: Llava,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    cache_tokens: int = 16384,
    on_text: Callable[[int, str], None] = lambda index, text: None,
    progress: bool = False,
    watch: Sequence[int] = (),
) -> list[Generation]:
    """Continues every prompt, in order.

    cache_tokens: most tokens whose keys and values are held; a longer sequence runs alone. The
    other prompts of a batch change a generation by rounding alone. on_text(index of the prompt,
    new text) is called as text becomes final. progress: show a bar that counts prompts. watch:
    tokens whose log-probabilities as the first new token are wanted; with max_new_tokens 1 they
    cost one forward pass. Positions past max_position_embeddings extrapolate: the caller limits
    lengths. Raises UserError for an empty prompt, for images that do not match their prompt, and
    for logits that are not finite.
    """
    rows = prompt_rows(prompts, llava.image_token_id)
    for prompt in rows:
        _check(prompt, llava)
    draws = [i if prompt.draws is None else prompt.draws for i, prompt in enumerate(prompts)]
    sequences = [
        _Sequence(x, draw, options, tokenizer) for x, draw in zip(rows, draws, strict=True)
    ]
    ends = _end_ids(llava.decoder.config, tokenizer) | set(options.end_ids)
    training = llava.training
    llava.eval()
    with progress_bar(total=len(sequences), desc="generating", disable=not progress) as bar:
        for batch in cut_batches(rows, options.max_new_tokens, cache_tokens):
            running = [sequences[x.index] for x in batch.prompts]
            _run(batch, running, llava, options, ends, watch, on_text, bar)
    llava.train(training)
    return [x.result() for x in sequences]


class _Sequence:
    def __init__(self, rows: PromptRows, draws: int, options: GenerationOptions, tokenizer):
        self.rows, self.token_ids = rows, []
        self.reason: Reason | None = None
        self.first_logprobs: tuple[float, ...] = ()
        self.stream = TextStream(tokenizer, options.stop)
        self.random = np.random.default_rng((options.seed, draws))

    def add(self, token_id: int, ends: set[int], max_new_tokens: int) -> str:
        """Appends the next token; returns the text that became final."""
        if token_id in ends:
            self.reason = "end"
            return self.stream.finish()
        self.token_ids.append(token_id)
        text = self.stream.push(token_id)
        if self.stream.stopped:
            self.reason = "stop"
        elif len(self.token_ids) == max_new_tokens:
            text += self.stream.finish()
            self.reason = "stop" if self.stream.stopped else "length"
        return text

    def result(self) -> Generation:
        assert self.reason is not None, "still running"
        return Generation(self.token_ids, self.stream.text, self.reason, self.first_logprobs)


def prompt_rows(prompts: Sequence[Prompt], image_token_id: int) -> list[PromptRows]:
    """Where each prompt's images are, and which prompts show the same pixels."""
    rows, pictures = [], {}  # by the id of the pixels: prompts keep them alive
    for index, prompt in enumerate(prompts):
        ids = np.asarray(prompt.input_ids, np.int64)
        places = np.flatnonzero(ids == image_token_id)
        first, last = (int(places[0]), int(places[-1])) if len(places) else (len(ids), -1)
        picture = -1
        if prompt.pixels is not None:
            picture = pictures.setdefault(id(prompt.pixels), len(pictures))
        rows.append(PromptRows(index, ids, prompt.pixels, picture, first, last + 1))
    return rows


def _check(prompt: PromptRows, llava: Llava) -> None:
    name, ids = f"prompt {prompt.index}", prompt.ids
    vocab_size = llava.decoder.config.vocab_size
    if not len(ids):
        raise UserError(f"{name} is empty; there is nothing to continue")
    if ids.max() >= vocab_size:
        raise UserError(
            f"{name} holds the token {ids.max()}, but the model's vocabulary has {vocab_size}; "
            "tokenizer and model do not belong together. Give the tokenizer of this model"
        )
    if prompt.pixels is None:
        return
    if llava.vision_tower is None:
        raise UserError(f"{name} has an image, but this model has no vision tower")
    num_tokens = int((ids == llava.image_token_id).sum())
    expected = num_image_tokens(prompt.pixels, llava.vision_tower.config.num_patches)
    if num_tokens != expected:
        raise UserError(f"{name}: its images need {expected} image tokens, it holds {num_tokens}")


def _end_ids(config: DecoderConfig, tokenizer: Tokenizer) -> set[int]:
    of_model = config.eos_token_id
    of_model = of_model if isinstance(of_model, list) else [of_model]
    return {i for i in (*of_model, tokenizer.eos_token_id) if i is not None}


def _run(
    batch: Batch,
    running: list[_Sequence],
    llava: Llava,
    options: GenerationOptions,
    ends: set[int],
    watch: Sequence[int],
    on_text: Callable[[int, str], None],
    bar: Any,
) -> None:
    cache = BatchCache(llava, batch.num_rows)
    logits = cache.read(list(batch.segments(options.max_new_tokens)))
    if watch:
        logprobs = logits.float().log_softmax(1)[:, list(watch)].tolist()
        for x, values in zip(running, logprobs, strict=True):
            x.first_logprobs = tuple(values)
    while True:
        tokens = _choose(logits, running, options)
        for x, token_id in zip(running, tokens, strict=True):
            if text := x.add(token_id, ends, options.max_new_tokens):
                on_text(x.rows.index, text)
        bar.update(sum(x.reason is not None for x in running))
        running = [x for x in running if x.reason is None]
        if not running:
            return
        logits = cache.read([x.rows.segment(x.token_ids) for x in running])


def _choose(logits: Tensor, running: list[_Sequence], options: GenerationOptions) -> list[int]:
    """The next token of every sequence."""
    largest, greedy = logits.max(1)
    if not largest.isfinite().all():
        raise UserError(
            "the model gives logits that are not finite; its weights or its precision are broken "
            "(try fp32, or look for NaN in the weights)"
        )
    if options.temperature == 0:
        return greedy.tolist()
    uniforms = torch.tensor([x.random.random() for x in running], dtype=torch.float64)
    probabilities = sampling_probabilities(
        logits, options.temperature, options.top_k, options.top_p
    )
    return draw(probabilities, uniforms).tolist()
