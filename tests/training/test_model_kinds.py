"""Other decoders, towers and projectors: losses of a Hugging Face loop, exports that load."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    get_cosine_schedule_with_warmup,
)

from mmalign.batch import IGNORE_INDEX
from mmalign.model.hf import export_llava, load_llava
from mmalign.model.vision_tower import VisionTower
from mmalign.tokenizer import Tokenizer
from mmalign.training.build import build_dataset
from mmalign.training.loop import train
from tests.model.kinds import hf_decoder
from tests.model.test_tower_kinds import hf_tower
from tests.training.helpers import losses, small_config, small_loop
from tests.training.test_equals_hugging_face import padded_batch

STEPS = 5
KINDS = [
    ("qwen2", "siglip-base"),
    ("qwen3", "clip"),
    ("mistral", "siglip-so400m"),
    ("llama-3.2", "clip-laion"),
]


@pytest.mark.parametrize(("decoder", "tower"), KINDS)
def test_losses_equal_a_hugging_face_loop(small_world, tmp_path, decoder, tower):
    folders = tmp_path / "decoder", tmp_path / "tower"
    hf_decoder(decoder, vocab_size=330, max_position_embeddings=512).save_pretrained(folders[0])
    hf_tower(tower).save_pretrained(folders[1])
    shutil.copy(small_world.decoder / "tokenizer.model", folders[0])
    config = small_config(
        small_world,
        tmp_path / "run",
        num_steps=STEPS,
        optimizer={"learning_rate": 1e-3},
        model={
            "decoder": str(folders[0]),
            "vision_tower": str(folders[1]),
            "projector": "",
            "projector_type": "mlp2x_gelu",
        },
        data={"use_im_start_end": False, "image_aspect_ratio": "pad"},
    )
    start, tokenizer = tmp_path / "start", Tokenizer.from_pretrained(folders[0])
    untrained = small_loop(replace(config, run_dir=tmp_path / "untrained")).trainer.model
    export_llava(untrained, start, tokenizer)
    expected = their_losses(config, build_dataset(config, tokenizer), start)
    train(config)
    ours = losses(config.run_dir)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), atol=1e-4, rtol=0)
    assert expected[0] - expected[-1] > 0.05
    check_export(config.run_dir / "export" / "llava", untrained.vision_tower)


def their_losses(config, dataset, folder: Path) -> list[float]:
    model = LlavaForConditionalGeneration.from_pretrained(folder).train()
    model.model.vision_tower.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.2 * STEPS), STEPS)
    num_samples = len(json.loads(Path(config.data.path).read_text()))
    processor, history = LlavaImageProcessorPil.from_pretrained(folder), []
    for step in range(STEPS):
        first = step * config.global_batch_size
        indices = [(first + i) % num_samples for i in range(config.global_batch_size)]
        batch = padded_batch(dataset, indices, config.data.image_root)
        images = [Image.open(x) for sample in map(dataset.encode, indices) for x in sample.images]
        batch["pixel_values"] = processor(images, return_tensors="pt")["pixel_values"]
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


def check_export(folder: Path, tower: VisionTower) -> None:
    """transformers and we read it alike, the padding included."""
    kind = LlavaForConditionalGeneration
    theirs, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    again = load_llava(folder, Tokenizer.from_pretrained(folder))
    assert again.vision_tower is not None and again.vision_tower.config == tower.config
    assert tower.config.preprocessing.do_pad
    embeddings = theirs.model.language_model.embed_tokens.weight
    assert torch.equal(again.decoder.embed_tokens.weight, embeddings)
