"""Every kind of tower and projector against transformers: features, logits, export."""

import json

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmalign.data.images import load_image
from mmalign.errors import UserError
from mmalign.model.config import VisionConfig
from mmalign.model.hf import export_llava, export_vision_tower, load_llava, load_vision_tower
from mmalign.model.hf.names import vision_parts
from mmalign.model.kinds import TOWERS
from tests.model.kinds import hf_decoder
from tests.model.test_vision_tower import images
from tests.model.tiny import NUM_PATCHES, TOKENIZER, assert_same, mixed_samples, pack, randomize

SIZES = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3, patch_size=14
)
CLIP, SIGLIP = (CLIPVisionConfig, CLIPVisionModel), (SiglipVisionConfig, SiglipVisionModel)
TOWER_KINDS = {
    "clip": (CLIP, {}),
    "clip-336": (CLIP, dict(image_size=336)),
    "clip-laion": (CLIP, dict(hidden_act="gelu")),
    "siglip-base": (SIGLIP, {}),
    "siglip-so400m": (SIGLIP, dict(hidden_size=144, num_attention_heads=2)),  # head_dim 72
}
LAYERS = (-1, -2)


def hf_tower(kind: str, **changes):
    (config, model), settings = TOWER_KINDS[kind]
    return randomize(model(config(**(SIZES | dict(image_size=28) | settings | changes))))


def theirs_of(kind: str, tower, layer: int, decoder: str = "llama-3", act: str = "gelu"):
    """LlavaForConditionalGeneration around this tower and a small decoder."""
    text = hf_decoder(decoder)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text.config,
        projector_hidden_act=act,
        image_token_index=TOKENIZER.image_token_id,
        image_seq_length=(tower.config.image_size // 14) ** 2,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default" if kind.startswith("clip") else "full",
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    return randomize(LlavaForConditionalGeneration(config))


def normalised(tower, pixels):
    """With the mean and deviation of each kind, written out apart from the program's own."""
    mean, std = (0.5,) * 3, (0.5,) * 3
    if tower.config.model_type == "clip_vision_model":
        mean = (0.48145466, 0.4578275, 0.40821073)
        std = (0.26862954, 0.26130258, 0.27577711)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (mean, std))
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", TOWER_KINDS)
def test_features_and_gradients_equal_transformers(tmp_path, kind, layer):
    theirs = theirs_of(kind, hf_tower(kind), layer)
    theirs.save_pretrained(tmp_path)
    tower = load_vision_tower(tmp_path).requires_grad_(True)
    pixels = images(tower.config.image_size)[:2]
    features = tower(pixels)
    hidden = theirs.model.vision_tower(normalised(tower, pixels), output_hidden_states=True)
    expected = hidden.hidden_states[layer][:, tower.config.num_class_tokens :].flatten(0, 1)
    assert expected.std() > 0.5
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)
    features.square().sum().backward()
    expected.square().sum().backward()
    for key, part in vision_parts(tower.config).items():
        owner = theirs.model.vision_tower.get_parameter(key)
        gradient = tower.get_parameter(part.parameter).grad
        if owner.grad is not None and "k_proj.bias" not in key:
            assert_same(gradient[part.rows].reshape(part.shape), owner.grad, key)


@pytest.mark.parametrize("kind", ("clip-laion", "siglip-base", "siglip-so400m"))
def test_tower_round_trip(tmp_path, kind):
    theirs = hf_tower(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    tower = load_vision_tower(tmp_path / "theirs")
    export_vision_tower(tower, tmp_path / "ours")
    loaded, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    for name, parameter in loaded.named_parameters():  # without SigLIP's pooling head
        assert torch.equal(parameter, theirs.get_parameter(name)), name
    assert load_vision_tower(tmp_path / "ours").config == tower.config


def test_tower_of_a_whole_siglip(tmp_path):
    vision = SIZES | dict(image_size=28)
    text = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    theirs = randomize(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)))
    theirs.save_pretrained(tmp_path)
    tower = load_vision_tower(tmp_path)
    weight = theirs.vision_model.embeddings.patch_embedding.weight
    assert torch.equal(tower.patch_embedding.weight, weight.flatten(1))


@pytest.mark.parametrize("act", ("linear", "gelu"))
@pytest.mark.parametrize("kind", ("clip", "siglip-so400m"))
@pytest.mark.parametrize("decoder", ("llama-3.2", "mistral", "qwen2", "qwen3"))
def test_logits_equal_llava_and_its_export(tmp_path, kind, decoder, act):
    theirs = theirs_of(kind, hf_tower(kind), -2, decoder, act)
    if act == "linear":
        second = theirs.model.multi_modal_projector.linear_2
        torch.nn.init.eye_(second.weight)
        torch.nn.init.zeros_(second.bias)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_llava(tmp_path / "theirs", TOKENIZER)
    assert model.vision_tower.config.num_patches == NUM_PATCHES
    samples = mixed_samples()
    with torch.no_grad():
        logits = model.hidden_states(pack(samples)) @ model.decoder.lm_head.weight.T
        for hf in (theirs, exported(model, tmp_path / "ours")):
            expected = torch.cat([logits_of(hf, model.vision_tower, x) for x in samples])
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def exported(model, folder):
    export_llava(model, folder)
    kind = LlavaForConditionalGeneration
    loaded, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return loaded.eval()


def logits_of(hf, tower, sample):
    pixels = {"pixel_values": normalised(tower, sample.pixels)} if len(sample.pixels) else {}
    return hf(input_ids=sample.input_ids[None], **pixels).logits[0]


def test_siglip_pixels_are_those_of_transformers(tmp_path):
    from PIL import Image

    hf_tower("siglip-base").save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    tower = load_vision_tower(tmp_path)
    assert not tower.config.preprocessing.do_center_crop
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (40, 33, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(picture.numpy()).save(tmp_path / "picture.png")
    pixels = load_image(tmp_path / "picture.png", tower.config.preprocessing)
    processor = SiglipImageProcessor.from_pretrained(tmp_path)
    theirs = processor(Image.open(tmp_path / "picture.png"), return_tensors="pt")["pixel_values"]
    ours = tower.normalize_pixels(pixels[None])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2.01 * 2 / 255)  # two levels, as CLIP


def test_laion_pixels_are_normalised_with_its_own_mean_and_deviation(tmp_path):
    hf_tower("clip-laion").save_pretrained(tmp_path)
    settings = {"size": 28, "crop_size": 28, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    tower = load_vision_tower(tmp_path)
    pixels = images(28)
    torch.testing.assert_close(tower.normalize_pixels(pixels), (pixels / 255 - 0.5) / 0.5)


@pytest.mark.parametrize("model_type", TOWERS)
def test_left_out_values_are_those_of_transformers(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = VisionConfig.from_hf(tmp_path)
    default = CLIPVisionConfig() if config.kind.is_clip else SiglipVisionConfig()
    for name in vars(config).keys() - {"preprocessing", "vision_feature_layer", "grids"}:
        assert getattr(config, name) == getattr(default, name), name


def test_a_class_token_that_the_decoder_would_read_is_refused(tmp_path):
    theirs = theirs_of("clip", hf_tower("clip"), -2)
    theirs.config.vision_feature_select_strategy = "full"
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="vision_feature_select_strategy is 'full'"):
        load_vision_tower(tmp_path)
