"""Losses of 20 optimizer steps of each stage against a plain Hugging Face loop."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    get_cosine_schedule_with_warmup,
)

from mmalign.batch import IGNORE_INDEX
from mmalign.config import TrainConfig
from mmalign.tokenizer import Tokenizer
from mmalign.training.build import build_dataset
from mmalign.training.loop import train
from tests.training.conftest import IMAGE_SIZE
from tests.training.helpers import losses, small_config

STEPS = 20


def hugging_face_model(config: TrainConfig, num_added_tokens: int) -> torch.nn.Module:
    """LlavaForConditionalGeneration with one linear projector and mean rows for new tokens."""
    llama = LlamaForCausalLM.from_pretrained(config.model.decoder)
    clip = CLIPVisionModel.from_pretrained(config.model.vision_tower)
    old_vocab = llama.config.vocab_size
    llama.resize_token_embeddings(old_vocab + num_added_tokens, mean_resizing=False)
    for table in (llama.get_input_embeddings(), llama.get_output_embeddings()):
        table.weight.data[old_vocab:] = table.weight.data[:old_vocab].mean(dim=0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=clip.config,
            text_config=llama.config,
            image_token_index=old_vocab,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )
    model.model.vision_tower.load_state_dict(clip.state_dict())
    model.model.language_model.load_state_dict(llama.model.state_dict())
    model.lm_head.load_state_dict(llama.lm_head.state_dict())
    weights = torch.load(config.model.projector, weights_only=True)
    projector = torch.nn.Linear(32, 48)
    projector.weight.data = weights["model.mm_projector.weight"].clone()
    projector.bias.data = weights["model.mm_projector.bias"].clone()
    model.model.multi_modal_projector = projector
    return model.train()


def choose_parameters(model, stage: str, first_trained_row: int | None) -> list[torch.nn.Parameter]:
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if stage == "finetune":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    elif first_trained_row is not None:  # stage 1 trains the rows of <im_start> and <im_end> alone
        table = model.model.language_model.embed_tokens.weight.requires_grad_(True)
        mask = torch.zeros_like(table)
        mask[first_trained_row:] = 1
        table.register_hook(lambda gradient: gradient * mask)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def padded_batch(dataset, indices: list[int], image_root: str) -> dict[str, torch.Tensor]:
    encoded = [dataset.encode(i) for i in indices]
    longest = max(len(sample.input_ids) for sample in encoded)
    input_ids = torch.zeros(len(encoded), longest, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    attention_mask = torch.zeros_like(input_ids)
    for row, sample in enumerate(encoded):
        length = len(sample.input_ids)
        input_ids[row, :length] = torch.tensor(sample.input_ids, dtype=torch.long)
        labels[row, :length] = torch.tensor(sample.labels, dtype=torch.long)
        attention_mask[row, :length] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    images = [Image.open(x).convert("RGB") for sample in encoded for x in sample.images]
    if images:
        crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop)
        batch["pixel_values"] = processor(images, return_tensors="pt").pixel_values
    return batch


def hugging_face_losses(config: TrainConfig, num_added_tokens: int) -> list[float]:
    tokenizer = Tokenizer.from_pretrained(config.model.decoder)
    dataset = build_dataset(config, tokenizer)
    model = hugging_face_model(config, num_added_tokens)
    trains_rows = config.data.use_im_start_end and config.data.template != "plain"
    first_row = tokenizer.im_start_id if trains_rows else None
    parameters = choose_parameters(model, config.stage, first_row)
    optimizer = torch.optim.AdamW(parameters, lr=config.optimizer.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.2 * STEPS), STEPS)
    num_samples = len(json.loads(Path(config.data.path).read_text()))
    history = []
    for step in range(STEPS):
        first = step * config.global_batch_size
        indices = [(first + i) % num_samples for i in range(config.global_batch_size)]
        batch = padded_batch(dataset, indices, config.data.image_root)
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


@pytest.mark.parametrize(
    ("stage", "template", "use_im_start_end", "num_added_tokens"),
    [
        ("pretrain", "plain", True, 3),
        ("pretrain", "v0", True, 3),
        ("finetune", "v1", True, 3),
        ("finetune", "llava_llama_2", False, 1),
    ],
)
def test_losses_equal_a_hugging_face_loop(
    small_world, tmp_path, stage, template, use_im_start_end, num_added_tokens
):
    config = small_config(
        small_world,
        tmp_path,
        stage,
        num_steps=STEPS,
        micro_batch_tokens=700,  # several micro-batches a step
        data={"template": template, "use_im_start_end": use_im_start_end},
    )
    train(config)
    ours, theirs = losses(tmp_path), hugging_face_losses(config, num_added_tokens)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=0)
    assert theirs[0] - theirs[-1] > 0.05  # it learned: 500 times the tolerance
