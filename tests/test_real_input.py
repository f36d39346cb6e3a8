"""Both stages and the evaluation on real photos, real instructions and the real tokenizer."""

import json
import shutil
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mmalign.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from mmalign.data.samples import read_samples
from mmalign.evaluation.evaluation import evaluate_model
from mmalign.training.loop import train
from tests.training.helpers import losses


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sample(sample_id: str, question: str, answer: str, image: str | None, **extra) -> dict:
    question = f"<image>\n{question}" if image else question
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": sample_id, "conversations": turns, **({"image": image} if image else {}), **extra}


@pytest.fixture(scope="module")
def real_world(shared_data, tmp_path_factory) -> Path:
    """Real texts on the photos at hand (the COCO images themselves are not), and small models."""
    root = tmp_path_factory.mktemp("real")
    llava = shared_data / "llava"
    photos = cycle(sorted(path.name for path in (llava / "images").iterdir()))
    captions = [
        sample(entry["id"], "Describe the image.", caption, next(photos))
        for entry in json_lines(llava / "caps_boxes_coco2014_val_80.jsonl")
        for caption in entry["captions"][:1]
    ]
    instructions = [
        sample(f"coco-{i}", entry["instruction"], entry["output"], next(photos), type=entry["type"])
        for i, entry in enumerate(json_lines(llava / "coco2014_val_gpt4_qa_30x3.jsonl"))
    ]
    questions = json_lines(llava / "question.jsonl")
    answers = {
        entry["question_id"]: entry for entry in json_lines(llava / "answer_vicuna-13b.jsonl")
    }
    instructions += [
        sample(f"text-{q['question_id']}", q["text"], answers[q["question_id"]]["text"], None)
        for q in questions
    ]
    (root / "captions.json").write_text(json.dumps(captions))
    (root / "instructions.json").write_text(json.dumps(instructions))
    save_models(root)
    shutil.copy(shared_data / "llama_tokenizer" / "tokenizer.model", root / "decoder")
    return root


def save_models(root: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(root / "decoder")
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
    )
    CLIPVisionModel(vision).save_pretrained(root / "vision_tower")


def test_both_stages_and_the_evaluation(real_world, shared_data, tmp_path):
    pretrain = TrainConfig(
        stage="pretrain",
        run_dir=tmp_path / "pretrain",
        model=ModelConfig(str(real_world / "decoder"), str(real_world / "vision_tower")),
        data=DataConfig(
            path=str(real_world / "captions.json"),
            image_root=str(shared_data / "llava" / "images"),
            template="plain",
            num_workers=2,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=0),
        global_batch_size=8,
        num_steps=8,
        precision="fp32",
        device="cpu",
    )
    train(pretrain)
    finetune = replace(
        pretrain,
        stage="finetune",
        run_dir=tmp_path / "finetune",
        model=replace(pretrain.model, projector=str(pretrain.run_dir)),
        data=replace(
            pretrain.data, path=str(real_world / "instructions.json"), template="llava_llama_2"
        ),
    )
    train(finetune)
    for run in (pretrain, finetune):
        assert losses(run.run_dir)[-1] < losses(run.run_dir)[0] - 0.05

    results = evaluate_model(
        finetune.run_dir,
        ["truthfulqa", "ethics"],
        shared_data,
        tmp_path / "scores",
        limit=40,
        device="cpu",
        quiet=True,
    )
    assert results["truthfulqa_mc2"]["n"] == 40 and results["ethics_virtue"]["n"] == 40
    assert 0.0 < results["ethics_mean"]["acc"] < 1.0


def test_types_of_the_published_files_choose_samples(real_world):
    path = real_world / "instructions.json"
    counts = {
        kind: len(read_samples(path, DataConfig(types=(kind,))))
        for kind in ("conversation", "detail", "reasoning")
    }
    assert counts == {"conversation": 30, "detail": 30, "reasoning": 30}
