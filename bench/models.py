"""LLaVA models with random weights, the same ones for our program and for Hugging Face's.

Ours is drawn on its device, without files; Hugging Face's parameters are views of ours, so that two
models of 7B need the memory of one and nothing has to be compared or copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bench import shapes
from mmalign.config import LoraConfig, ShortcutConfig, Stage
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.decoder import Decoder
from mmalign.model.hf.names import Part, decoder_parts, vision_parts
from mmalign.model.layers import LayerNorm, RMSNorm
from mmalign.model.llava import Llava
from mmalign.model.projector import Projector
from mmalign.model.vision_tower import VisionTower

M = TypeVar("M", bound=nn.Module)
SPREAD = 0.02  # standard deviation of random weights
NUM_IMAGE_TOKENS = 3  # <im_patch>, <im_start>, <im_end> follow the decoder's own vocabulary


@dataclass(frozen=True)
class Size:
    name: str
    decoder: DecoderConfig  # without the rows of the image tokens
    vision: VisionConfig

    @property
    def image_token_id(self) -> int:
        return self.decoder.vocab_size


def _small(num_layers: int, hidden_size: int, intermediate_size: int, tower_width: int) -> Size:
    decoder = replace(
        shapes.SMALL_DECODER,
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
    )
    tower = replace(
        shapes.SMALL_VISION,
        hidden_size=tower_width,
        intermediate_size=4 * tower_width,
        num_attention_heads=tower_width // 64,
    )
    return Size(f"{num_layers} layers, {hidden_size} wide", decoder, tower)


CPU_SMALL = _small(4, 256, 688, 128)
CPU_LARGE = _small(12, 768, 2048, 256)
LLAMA2_7B = Size("llama2-7b", shapes.LLAMA2_7B, shapes.CLIP_VIT_L_14)
OPENLLAMA_3B = Size("openllama-3b", shapes.OPENLLAMA_3B, shapes.CLIP_VIT_L_14)


def random_decoder(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    return _drawn(Decoder, config, device, dtype)


def random_llava(size: Size, stage: Stage, device: torch.device, dtype: torch.dtype) -> Llava:
    """Ours, with what `stage` trains marked; template plain, so no rows of image tokens."""
    vocab_size = size.decoder.vocab_size + NUM_IMAGE_TOKENS
    decoder = random_decoder(replace(size.decoder, vocab_size=vocab_size), device, dtype)
    tower = _drawn(VisionTower, size.vision, device, dtype)
    projector = Projector(size.vision.hidden_size, size.decoder.hidden_size).to(device, dtype)
    model = Llava(decoder, tower, projector, FollowingTokens(size.image_token_id))
    model.set_trainable(stage, LoraConfig(), train_image_tokens=False)
    return model.train()


def with_shortcuts(
    model: Llava, stage: Stage, shortcuts: ShortcutConfig, prefix_ids: Sequence[int]
) -> Llava:
    """Another model of the same weights."""
    tokens = FollowingTokens(model.image_token_id)
    parts = model.decoder, model.vision_tower, model.projector, tokens
    other = Llava(*parts, shortcuts=shortcuts, prefix_ids=prefix_ids).train()
    other.set_trainable(stage, LoraConfig(), train_image_tokens=False)
    return other


@dataclass
class FollowingTokens:
    """The image tokens, from the first id after the vocabulary on."""

    image_token_id: int

    def __post_init__(self):
        self.im_start_id, self.im_end_id = self.image_token_id + 1, self.image_token_id + 2


def _drawn(kind: Callable[..., M], config, device: torch.device, dtype: torch.dtype) -> M:
    """Norms 1, biases 0, all else normal(0, SPREAD); no second copy exists at any time."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = kind(config)
    finally:
        torch.set_default_dtype(previous)
    generator = torch.Generator(device).manual_seed(0)
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
            elif isinstance(owner, RMSNorm | LayerNorm):
                nn.init.ones_(parameter)
            else:
                parameter.data.normal_(0, SPREAD, generator=generator)
    return module.to(device)


# ---- Hugging Face's, on the same storage ----


def hugging_face_llava(model: Llava) -> LlavaForConditionalGeneration:
    """LLaVA with one linear projector (LLaVA 1.0); trains what `model` trains."""
    assert model.vision_tower is not None and model.projector is not None
    tower, projector = model.vision_tower.config, model.projector
    fields: dict[str, Any] = dict(
        vision_config=CLIPVisionConfig(**tower.to_hf(torch.float32)),
        text_config=_llama_config(model.decoder.config),
        image_token_index=model.image_token_id,
        image_seq_length=tower.num_patches,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        theirs: Any = LlavaForConditionalGeneration(LlavaConfig(**fields))
        linear = nn.Linear(tower.hidden_size, model.decoder.config.hidden_size)
        theirs.model.multi_modal_projector = linear
    views = _views(decoder_parts(model.decoder.config), model.decoder)
    language = {
        key.replace("model.", "model.language_model.", 1): view for key, view in views.items()
    }
    vision = _views(vision_parts(tower), model.vision_tower)
    linear = {f"model.multi_modal_projector.{k}": v for k, v in projector.named_parameters()}
    _share(theirs, language | {f"model.vision_tower.{k}": v for k, v in vision.items()} | linear)
    _fill_buffers(theirs, next(projector.parameters()).device)
    return theirs.train()


def hugging_face_llama(decoder: Decoder) -> LlamaForCausalLM:
    with torch.device("meta"):
        theirs = LlamaForCausalLM(_llama_config(decoder.config))
    _share(theirs, _views(decoder_parts(decoder.config), decoder))
    _fill_buffers(theirs, decoder.norm.weight.device)
    return theirs.eval()


def _llama_config(config: DecoderConfig) -> LlamaConfig:
    fields = asdict(config)
    del fields["model_type"], fields["rope_scaling"], fields["sliding_window"]
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    fields |= {"rope_parameters": rope, "attn_implementation": "sdpa"}
    return LlamaConfig(**fields)


def _views(parts: dict[str, Part], module: nn.Module) -> dict[str, nn.Parameter]:
    """Hugging Face's key -> a parameter on the rows of ours."""
    ours = dict(module.named_parameters(remove_duplicate=False))
    return {
        key: nn.Parameter(
            ours[part.parameter].detach()[part.rows].view(part.shape),
            requires_grad=ours[part.parameter].requires_grad,
        )
        for key, part in parts.items()
    }


def _share(theirs: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    names = {name.replace(".vision_model.", "."): name for name, _ in theirs.named_parameters()}
    assert names.keys() == parameters.keys(), names.keys() ^ parameters.keys()
    for key, parameter in parameters.items():
        owner, _, name = names[key].rpartition(".")
        assert theirs.get_parameter(names[key]).shape == parameter.shape, key
        setattr(theirs.get_submodule(owner), name, parameter)


def _fill_buffers(theirs: nn.Module, device: torch.device) -> None:
    """The two tables that transformers computes while it builds a model; here it built on meta."""
    parents: list[Any] = list(theirs.modules())
    for parent in parents:
        if hasattr(parent, "rotary_emb"):
            parent.rotary_emb = LlamaRotaryEmbedding(parent.config).to(device)
        if "position_ids" in dict(parent.named_buffers(recurse=False)):
            parent.position_ids = torch.arange(parent.position_ids.shape[-1], device=device)[None]
    assert not any(buffer.is_meta for buffer in theirs.buffers())
