"""An exported LLaVA folder works with transformers' processor: text and image to input ids."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.decoder import Decoder
from mmalign.model.hf import export_llava
from mmalign.model.layers import init_weights
from mmalign.model.llava import Llava
from mmalign.model.projector import Projector
from mmalign.model.vision_tower import VisionTower
from mmalign.tokenizer import Tokenizer


@pytest.mark.parametrize("num_added_tokens", [1, 3])
def test_processor_writes_our_ids_and_pixels(shared_data, tmp_path, num_added_tokens):
    tokenizer = Tokenizer.from_pretrained(shared_data / "llama_tokenizer")
    decoder = Decoder(
        DecoderConfig(
            vocab_size=32000 + num_added_tokens,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    tower = VisionTower(
        VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            layer_norm_eps=1e-5,
        )
    )
    init_weights(decoder, 0)
    init_weights(tower, 1)
    export_llava(Llava(decoder, tower, Projector(32, 32), tokenizer), tmp_path / "llava", tokenizer)

    processor = AutoProcessor.from_pretrained(tmp_path / "llava")
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    inputs = processor(
        text="What is  this?<im_patch>", images=Image.fromarray(pixels), return_tensors="pt"
    )
    question = tokenizer.encode("What is  this?")
    assert inputs["input_ids"][0].tolist() == [1, *question, *[tokenizer.image_token_id] * 4]
    ours = tower.normalize_pixels(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    torch.testing.assert_close(inputs["pixel_values"], ours, atol=1e-5, rtol=0)
