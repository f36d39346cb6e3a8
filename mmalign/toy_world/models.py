"""The toy world's tokenizer, language model and vision tower, trained in a minute or two."""

import io
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from mmalign_kernels import linear_cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.batch import IGNORE_INDEX
from mmalign.command import progress_bar
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.decoder import Decoder
from mmalign.model.layers import LayerNorm, Linear, RMSNorm, init_weights
from mmalign.model.vision_tower import VisionTower
from mmalign.tokenizer import Tokenizer
from mmalign.toy_world.scenes import (
    COLOURS,
    IMAGE_SIZE,
    RADIUS,
    RARE_COLOURS,
    SHAPES,
    Scene,
    render,
)
from mmalign.toy_world.texts import listing
from mmalign.toy_world.words import PLACES

PAGE_TOKENS = 384  # tokens of every text in the language model's training
PAGES_PER_STEP = 4
PICTURES_PER_STEP = 48
WORDS = (*SHAPES, *COLOURS, *RARE_COLOURS, *RADIUS, *PLACES)  # the labels of the vision tower


def train_tokenizer(texts: list[str], vocab_size: int, path: Path) -> Tokenizer:
    """A BPE with LLaMA's settings: byte fallback, split digits, a prepended blank."""
    model = io.BytesIO()  # a file name would become part of the model's bytes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        max_sentence_length=1 << 20,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return Tokenizer.from_pretrained(path)


# ---- the language model ----


def train_decoder(
    pages: list[str], tokenizer: Tokenizer, config: DecoderConfig, steps: int, seed: int
) -> Decoder:
    """A language model of the corpus, with pages truncated to PAGE_TOKENS."""
    decoder = Decoder(config)
    init_weights(decoder, seed)
    _widen(decoder)
    rows = _rows(pages, tokenizer)

    def loss(chosen: list[int]) -> Tensor:
        input_ids = torch.from_numpy(rows[chosen])
        target_ids = F.pad(input_ids[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        ends = (len(chosen) + 1) * PAGE_TOKENS
        cu_seqlens = torch.arange(0, ends, PAGE_TOKENS, dtype=torch.int32)
        position_ids = torch.arange(PAGE_TOKENS, dtype=torch.int32).repeat(len(chosen))
        positions = decoder.packed_positions(position_ids, cu_seqlens, PAGE_TOKENS)
        hidden_states = decoder(input_ids.flatten(), positions)
        loss_sum = linear_cross_entropy(hidden_states, decoder.lm_head.weight, target_ids)
        return loss_sum / (len(chosen) * (PAGE_TOKENS - 1))

    batches = _batches(len(rows), PAGES_PER_STEP, seed)
    _optimize(list(decoder.parameters()), loss, batches, steps, 4e-3, "language model")
    return decoder


def _rows(pages: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """(num_pages, PAGE_TOKENS) int64; every second page starts with BOS, as conversations do."""
    rows, bos = [], tokenizer.bos_token_id
    assert bos is not None
    for index, page in enumerate(pages):
        ids = [bos] * (index % 2) + tokenizer.encode(page)
        if len(ids) >= PAGE_TOKENS:
            rows.append(ids[:PAGE_TOKENS])
    return np.array(rows, dtype=np.int64)


# ---- the vision tower ----


def train_vision_tower(
    scenes: list[Scene], config: VisionConfig, steps: int, seed: int
) -> VisionTower:
    """A tower whose patches, hidden_states[-2], predict the words of the caption.

    Images and words are contrasted as in SigLIP (arXiv 2303.15343): a word's score for an image is
    the sigmoid of the best match among its patches (as in FILIP, arXiv 2111.07783), with target 1
    if the image's listing has the word. The layer after hidden_states[-2] is never computed and
    keeps its initial weights.
    """
    assert config.image_size == IMAGE_SIZE
    tower = VisionTower(config)
    init_weights(tower, seed)
    _widen(tower)
    words = Linear(config.hidden_size, len(WORDS), bias=True)
    init_weights(words, seed + 1)
    pictures = torch.stack([_pixels(scene) for scene in scenes])
    labels = torch.tensor([[float(w in listing(scene)) for w in WORDS] for scene in scenes])

    def loss(chosen: list[int]) -> Tensor:
        patches = F.layer_norm(tower(pictures[chosen]), (config.hidden_size,))
        scores = words(patches).unflatten(0, (len(chosen), config.num_patches)).amax(1)
        return F.binary_cross_entropy_with_logits(scores, labels[chosen])

    never_computed = (*tower.layers[config.num_layers_used :], tower.post_layernorm)
    unused = {id(p) for part in never_computed for p in part.parameters()}
    used = [p for p in tower.parameters() if id(p) not in unused]
    batches = _batches(len(scenes), PICTURES_PER_STEP, seed)
    _optimize([*used, *words.parameters()], loss, batches, steps, 2e-3, "vision tower")
    _centre(tower, pictures[:200])
    return tower


@torch.no_grad()
def _centre(tower: VisionTower, pictures: Tensor) -> None:
    """Gives the features mean 0 and standard deviation 0.3, about that of the decoder's embeddings.

    A linear projector learns slowly from features with a large common offset. Every layer
    normalises its input, so the residual stream can be scaled as a whole.
    """
    scale = 0.3 / tower(pictures).std(0).square().mean().sqrt()
    read = tower.layers[: tower.config.num_layers_used]
    outputs = [part for layer in read for part in (layer.out_proj, layer.fc2)]
    assert tower.pre_layrnorm is not None  # a CLIP's
    for part in (tower.pre_layrnorm, *outputs):
        for parameter in part.parameters():
            parameter.mul_(scale)
    read[-1].fc2.get_parameter("bias").sub_(tower(pictures).mean(0))


def _pixels(scene: Scene) -> Tensor:
    """(3, IMAGE_SIZE, IMAGE_SIZE) uint8."""
    return torch.from_numpy(np.array(render(scene))).permute(2, 0, 1)


# ---- both ----


def _widen(module: nn.Module) -> None:
    """Scales init_weights' 0.02, meant for wide models, up to the scale of these narrow ones."""
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            if isinstance(owner, Linear) and parameter.ndim == 2:
                parameter.data.mul_(50 / math.sqrt(parameter.shape[1]))
            elif not isinstance(owner, LayerNorm | RMSNorm | Linear):
                parameter.data.mul_(10)  # embeddings of tokens, positions and the class
    if isinstance(module, VisionTower):
        module.position_embedding.weight.data.mul_(4)


def _batches(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches of indices below count, without end, each epoch in another order."""
    rng = random.Random(f"order {seed}")
    epochs = (rng.sample(range(count), count) for _ in itertools.count())
    order = itertools.chain.from_iterable(epochs)
    while True:
        yield list(itertools.islice(order, batch_size))


def _optimize(
    parameters: list[nn.Parameter],
    loss: Callable[[list[int]], Tensor],
    batches: Iterator[list[int]],
    steps: int,
    learning_rate: float,
    name: str,
) -> None:
    """AdamW with a short warm-up and cosine decay to a twentieth.

    Each of two threads takes half a batch: they meet once per step. Two threads that share each
    operation meet hundreds of times, and other programs on their cores delay every meeting.
    """

    def gradients(half: list[int]) -> tuple[float, Sequence[Tensor]]:
        value = loss(half)
        return value.item(), torch.autograd.grad(value, parameters)

    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        for step in (bar := progress_bar(range(steps), desc=f"toy world: {name}", leave=False)):
            warm = min(1.0, (step + 1) / 20)
            scale = warm * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * scale
            batch = next(batches)
            (value, first), (other, second) = threads.map(gradients, (batch[::2], batch[1::2]))
            for parameter, *halves in zip(parameters, first, second, strict=True):
                parameter.grad = torch.stack(halves).mean(0)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % 20 == 0:
                bar.set_postfix_str(f"loss {(value + other) / 2:.3f}")
