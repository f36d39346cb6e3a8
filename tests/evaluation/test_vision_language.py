"""evaluate.py on a whole vision-language model, against its language model as a folder alone."""

import json
import shutil

import pytest
import torch
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
)

from mmalign.evaluation.compare import compare_evaluations
from mmalign.evaluation.evaluation import evaluate_model
from tests.model.tiny import clip_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_model):
    """LLaVA-1.6-Mistral in small, and the Mistral in it."""
    torch.manual_seed(0)
    text = MistralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
        initializer_range=0.15,
    )
    config = LlavaNextConfig(vision_config=clip_config(), text_config=text)
    whole, alone = LlavaNextForConditionalGeneration(config), MistralForCausalLM(text)
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    root = tmp_path_factory.mktemp("models")
    for name, model in (("whole", whole), ("alone", alone)):
        model.save_pretrained(root / name)
        shutil.copy(tokenizer_model, root / name / "tokenizer.model")
    return root / "whole", root / "alone"


def test_scores_are_those_of_its_language_model(folders, shared_data, tmp_path):
    for folder in folders:
        output = tmp_path / folder.name
        evaluate_model(folder, ("truthfulqa",), shared_data, output, limit=5, quiet=True)
    whole, alone = ((tmp_path / folder.name / "items.jsonl").read_text() for folder in folders)
    assert whole == alone and json.loads(whole.splitlines()[0])["choices"]
    compared = compare_evaluations(tmp_path / "alone", tmp_path / "whole")
    assert all(task["difference"] == 0 for task in compared["tasks"].values())
