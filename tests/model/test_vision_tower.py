"""The vision tower against transformers' CLIPVisionModel."""

import pytest
import torch

from mmalign.model.hf import load_vision_tower
from mmalign.model.hf.names import vision_parts
from tests.model.tiny import assert_same, hf_clip, hf_pixels


def images(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.uint8)


def expected_features(theirs, pixels: torch.Tensor) -> torch.Tensor:
    output = theirs(hf_pixels(pixels), output_hidden_states=True)
    return output.hidden_states[-2][:, 1:].flatten(0, 1)


@pytest.fixture
def models(tmp_path):
    theirs = hf_clip()
    theirs.save_pretrained(tmp_path)
    return theirs, load_vision_tower(tmp_path)


@pytest.mark.parametrize("image_size, num_patches", [(28, 4), (70, 25), (33, 4)])
def test_features_equal_transformers(tmp_path, image_size, num_patches):
    """33 is not a multiple of the patch size: CLIP's convolution leaves the rest out."""
    theirs = hf_clip(image_size=image_size)
    theirs.save_pretrained(tmp_path)
    tower, pixels = load_vision_tower(tmp_path), images(image_size)
    features = tower(pixels)
    assert tower.config.num_patches == num_patches
    assert features.shape == (3 * num_patches, 48)
    with torch.no_grad():
        expected = expected_features(theirs, pixels)
    assert expected.std() > 0.5
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)


def test_images_do_not_see_each_other(models):
    _, tower = models
    pixels = images(28)
    alone = torch.cat([tower(pixels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(tower(pixels), alone, rtol=1e-5, atol=1e-5)


def test_the_unused_last_layer_is_not_computed(models):
    _, tower = models
    expected = tower(images(28))
    for parameter in (*tower.layers[-1].parameters(), *tower.post_layernorm.parameters()):
        parameter.data.fill_(float("nan"))
    assert torch.equal(tower(images(28)), expected)


def test_a_frozen_tower_keeps_no_graph(models):
    _, tower = models
    assert not any(p.requires_grad for p in tower.parameters())
    assert not tower(images(28)).requires_grad


def test_a_tower_that_trains_has_the_gradients_of_transformers(models):
    theirs, tower = models
    tower.requires_grad_(True)
    tower(images(28)).square().sum().backward()
    expected_features(theirs, images(28)).square().sum().backward()
    for key, part in vision_parts(tower.config).items():
        if "layers.2" in key or "post_layernorm" in key or "k_proj.bias" in key:
            continue  # not computed; moving all keys does not change a softmax: gradient 0
        gradient = tower.get_parameter(part.parameter).grad[part.rows].reshape(part.shape)
        expected = theirs.get_parameter(key).grad
        assert_same(gradient, expected, key)


def test_bf16_normalises_pixels_in_fp32(tmp_path):
    hf_clip().save_pretrained(tmp_path)
    tower, pixels = load_vision_tower(tmp_path, torch.bfloat16), images(28)
    assert tower(pixels).dtype == torch.bfloat16
    assert torch.equal(tower.normalize_pixels(pixels), hf_pixels(pixels).to(torch.bfloat16))
