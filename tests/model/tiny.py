"""Small random models of transformers, and packed batches of random samples for them."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from mmalign_kernels import linear_cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from mmalign.batch import IGNORE_INDEX, PackedBatch
from mmalign.config import DataConfig, LoraConfig, TrainConfig
from mmalign.data.templates import trains_image_tokens
from mmalign.model.decoder import Decoder
from mmalign.model.hf import load_decoder, load_projector, load_vision_tower
from mmalign.model.llava import Llava
from mmalign.model.projector import Projector

VOCAB_SIZE = 103  # the last three are <im_patch>, <im_start>, <im_end>
TOKENIZER = SimpleNamespace(image_token_id=100, im_start_id=101, im_end_id=102)
END = 2  # the end-of-text token
IMAGE_SIZE, PATCH_SIZE, NUM_PATCHES = 28, 14, 4

GROUPED_QUERY = dict(
    hidden_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=160,
    max_position_embeddings=16,  # shorter than the samples: the tables have to grow
)
HEAD_DIM_100 = dict(hidden_size=200, num_attention_heads=2, intermediate_size=136)
TIED = dict(
    hidden_size=64,
    num_attention_heads=4,
    intermediate_size=96,
    tie_word_embeddings=True,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 5e5},
)
SHAPES = {"grouped-query": GROUPED_QUERY, "head-dim-100": HEAD_DIM_100, "tied": TIED}


class Letters:
    """A tokenizer whose every token is a letter."""

    image_token_id, eos_token_id = TOKENIZER.image_token_id, END

    def decode(self, ids) -> str:
        return "".join(chr(48 + i) for i in ids)


def llama_config(**shape) -> LlamaConfig:
    return LlamaConfig(vocab_size=VOCAB_SIZE, num_hidden_layers=2, **shape)


def clip_config(**changes) -> CLIPVisionConfig:
    shape = dict(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    return CLIPVisionConfig(**(shape | changes))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights with a realistic spread, so that norms, biases and logits all matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.2 * values
        elif parameter.ndim < 2:
            values = 0.2 * values
        elif "embed" not in name:
            values = values / parameter[0].numel() ** 0.5
        parameter.data.copy_(values)
    return model.eval()


def hf_llama(**shape) -> LlamaForCausalLM:
    return randomize(LlamaForCausalLM(llama_config(**shape)))


def hf_clip(**changes) -> CLIPVisionModel:
    return randomize(CLIPVisionModel(clip_config(**changes)))


def hf_llava(**shape) -> LlavaForConditionalGeneration:
    """LLaVA 1.0's linear projector in the layout of LLaVA 1.5: linear_2 is the identity."""
    config = LlavaConfig(
        vision_config=clip_config(),
        text_config=llama_config(**shape),
        projector_hidden_act="linear",
        image_token_index=TOKENIZER.image_token_id,
        image_seq_length=NUM_PATCHES,
        tie_word_embeddings=shape.get("tie_word_embeddings", False),
    )
    model = randomize(LlavaForConditionalGeneration(config))
    second = model.model.multi_modal_projector.linear_2
    nn.init.eye_(second.weight)
    nn.init.zeros_(second.bias)
    return model


def ours(hf_model: PreTrainedModel, folder: Path, **options) -> Llava:
    """The same LLaVA, through a saved folder; options of Llava."""
    hf_model.save_pretrained(folder)
    decoder, tower = load_decoder(folder), load_vision_tower(folder)
    projector = Projector(48, decoder.config.hidden_size)
    model = Llava(decoder, tower, projector, TOKENIZER, **options)
    model.load_projector(load_projector(folder))
    return model.eval()


def stage(name: str, template: str = "v1", **lora) -> TrainConfig:
    return TrainConfig(
        stage=name, data=DataConfig(template=template), lora=LoraConfig(dropout=0.0, **lora)
    )


def set_trainable(model: Llava, config: TrainConfig) -> None:
    model.set_trainable(config.stage, config.lora, trains_image_tokens(config))


@dataclass(frozen=True)
class TinySample:
    input_ids: Tensor  # (length,) int64
    labels: Tensor  # (length,) int64, unshifted
    pixels: Tensor  # (num_images, 3, IMAGE_SIZE, IMAGE_SIZE) uint8


def random_sample(length: int, num_images: int = 0, seed: int = 0) -> TinySample:
    """`length` text tokens; every image stands at the front between <im_start> and <im_end>."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 100, (length,), generator=generator)
    patches = [TOKENIZER.image_token_id] * NUM_PATCHES
    image = torch.tensor([TOKENIZER.im_start_id, *patches, TOKENIZER.im_end_id])
    labels = torch.where(torch.rand(length, generator=generator) < 0.6, text, IGNORE_INDEX)
    shape = (num_images, 3, IMAGE_SIZE, IMAGE_SIZE)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return TinySample(
        torch.cat([text[:1], *[image] * num_images, text[1:]]),
        torch.cat([labels[:1], *[torch.full_like(image, IGNORE_INDEX)] * num_images, labels[1:]]),
        pixels,
    )


def mixed_samples() -> list[TinySample]:
    """Text only, one token, one image, two images, longer than max_position_embeddings."""
    shapes = [(9, 0), (1, 0), (7, 1), (12, 2), (40, 1)]
    return [random_sample(*shape, seed=i) for i, shape in enumerate(shapes)]


def text_samples() -> list[TinySample]:
    return [random_sample(length, seed=length) for length in (9, 1, 40)]


def pack(samples: list[TinySample]) -> PackedBatch:
    """Written apart from the program's own packing."""
    input_ids = torch.cat([sample.input_ids for sample in samples])
    shifted = [F.pad(sample.labels[1:], (0, 1), value=IGNORE_INDEX) for sample in samples]
    lengths = [len(sample.input_ids) for sample in samples]
    target_ids = torch.cat(shifted)
    return PackedBatch(
        input_ids=input_ids,
        target_ids=target_ids,
        position_ids=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        num_loss_tokens=int((target_ids != IGNORE_INDEX).sum()),
        pixel_values=torch.cat([sample.pixels for sample in samples]),
        image_positions=(input_ids == TOKENIZER.image_token_id).nonzero().squeeze(1),
    )


HEADER = torch.tensor([1, 17, 5, 9, 44, 23, 8, 31, 60, 12])


def following(samples: list[TinySample]) -> list[TinySample]:
    """The samples behind one header, without a target in it or in the first token after it."""
    unsupervised = torch.full_like(HEADER, IGNORE_INDEX)
    return [
        replace(
            sample,
            input_ids=torch.cat((HEADER, sample.input_ids)),
            labels=torch.cat((unsupervised, unsupervised[:1], sample.labels[1:])),
        )
        for sample in samples
    ]


def without_prefix(samples: list[TinySample]) -> PackedBatch:
    """What pack_samples makes of samples that follow HEADER, with the tests' own packing."""
    length = len(HEADER)
    cut = [
        replace(sample, input_ids=sample.input_ids[length:], labels=sample.labels[length:])
        for sample in samples
    ]
    batch = pack(cut)
    return replace(batch, position_ids=batch.position_ids + length, prefix_length=length)


def hidden_states_of(decoder: Decoder, samples: list[TinySample]) -> Tensor:
    """The decoder's output for packed text, (total_tokens, hidden_size)."""
    batch = pack(samples)
    positions = decoder.packed_positions(batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
    return decoder(batch.input_ids, positions)


def loss_of(decoder: Decoder, samples: list[TinySample]) -> Tensor:
    hidden_states, batch = hidden_states_of(decoder, samples), pack(samples)
    return linear_cross_entropy(hidden_states, decoder.lm_head.weight, batch.target_ids)


def hf_pixels(pixels: Tensor) -> Tensor:
    """What transformers' own processor makes of images that have the right size."""
    size = {"height": pixels.shape[2], "width": pixels.shape[3]}
    processor = CLIPImageProcessor(size=size, crop_size=size)
    return processor(list(pixels.numpy()), return_tensors="pt")["pixel_values"]


def hf_logits(model: PreTrainedModel, sample: TinySample) -> Tensor:
    images = {"pixel_values": hf_pixels(sample.pixels)} if len(sample.pixels) else {}
    return model(input_ids=sample.input_ids[None], **images).logits[0]


def hf_loss_sum(model: PreTrainedModel, samples: list[TinySample]) -> Tensor:
    """Sum over the supervised tokens, one sample after the other."""
    losses = [
        F.cross_entropy(hf_logits(model, sample)[:-1], sample.labels[1:], reduction="sum")
        for sample in samples
    ]
    return torch.stack(losses).sum()


def hf_parameter(model: PreTrainedModel, key: str) -> nn.Parameter:
    """The parameter of a LlamaForCausalLM by its published key, also inside a LLaVA model."""
    if isinstance(model, LlavaForConditionalGeneration) and key.startswith("model."):
        key = "model.language_model." + key.removeprefix("model.")
    return model.get_parameter(key)


def assert_same(actual: Tensor | None, expected: Tensor, name: str = "", ratio: float = 1e-5):
    """The error is a small part of the whole tensor's size: single small entries may cancel."""
    assert actual is not None and actual.shape == expected.shape, name
    error = ((actual - expected).norm() / expected.norm().clamp_min(1e-6)).item()
    assert error < ratio, f"{name}: relative error {error:.2e}"
