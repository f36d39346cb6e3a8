"""What is compared before anything is trained, and what a folder brings along."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)

from mmalign.config import LoraConfig
from mmalign.errors import UserError
from mmalign.recipes import RECIPES
from mmalign.tokenizer import Tokenizer
from mmalign.training.build import build_model, check_vocabulary, resolve
from mmalign.training.export import export
from tests.training.conftest import train_tokenizer
from tests.training.helpers import CPU, small_config, small_loop


@pytest.fixture(scope="module")
def run(small_world, tmp_path_factory) -> Path:
    """The folder of a run that was exported before its first step."""
    config = small_config(small_world, tmp_path_factory.mktemp("first") / "run")
    loop, tokenizer = small_loop(config), Tokenizer.from_pretrained(config.model.decoder)
    export(loop.trainer.model, resolve(config), tokenizer, CPU)
    return config.run_dir


def model_of(config):
    config = resolve(config)
    return build_model(config, Tokenizer.from_pretrained(config.model.tokenizer), [])


@pytest.mark.parametrize("text_only", [True, False])
def test_a_tokenizer_larger_than_the_decoder_is_refused(small_world, tmp_path, text_only):
    config = small_config(small_world, tmp_path, data={"text_only": text_only})
    folder = tmp_path / "tokenizer"
    shutil.copytree(small_world.decoder, folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<loc>": 330}))
    special = {"additional_special_tokens": ["<loc>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    with pytest.raises(UserError, match=r"331 tokens.*rows for 330\. Remove '<loc>' \(added_"):
        check_vocabulary(config, Tokenizer.from_pretrained(folder))
    missing = check_vocabulary(config, Tokenizer.from_pretrained(small_world.decoder))
    assert missing == (0 if text_only else 3)


@pytest.mark.parametrize("text_only", [True, False])
def test_a_padding_token_without_a_row_as_early_llama_2_has_it(small_world, tmp_path, text_only):
    """The image tokens follow it, as in LLaVA, where the model is resized to len(tokenizer)."""
    decoder, data = tmp_path / "decoder", tmp_path / "data.json"
    shutil.copytree(small_world.decoder, decoder)
    train_tokenizer(decoder, normalization_rule_name="identity", remove_extra_whitespaces=False)
    (decoder / "added_tokens.json").write_text(json.dumps({"<pad>": 330}))
    changes = {"model": {"decoder": str(decoder)}, "data": {"text_only": text_only}}
    config = small_config(small_world, tmp_path / "run", **changes)
    tokenizer, model = Tokenizer.from_pretrained(decoder), small_loop(config).trainer.model
    export(model, resolve(config), tokenizer, CPU)
    theirs = AutoTokenizer.from_pretrained(config.run_dir / "export/llama")
    llama = AutoModelForCausalLM.from_pretrained(config.run_dir / "export/llama")
    assert theirs.convert_tokens_to_ids("<pad>") == 330
    if text_only:
        assert llama.config.vocab_size == 330 and len(theirs) == 331
    else:
        assert llama.config.vocab_size == len(theirs) == 334
        names = ["<im_patch>", "<im_start>", "<im_end>"]
        assert theirs.convert_tokens_to_ids(names) == [331, 332, 333]
        folder = config.run_dir / "export/llava"
        llava = LlavaForConditionalGeneration.from_pretrained(folder)
        assert llava.config.image_token_id == 331
        content = [{"type": "image"}, {"type": "text", "text": "what is this"}]
        processor = AutoProcessor.from_pretrained(folder)
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [{**content[0], "url": str(small_world.images / "1.png")},
                                          content[1]]}],
            tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        )  # fmt: skip
        assert (inputs["input_ids"] == 331).sum() == 4
        assert (
            llava.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
        )
    samples = json.loads(small_world.finetune_json.read_text())
    samples[3]["conversations"][1]["value"] += " <pad>"
    data.write_text(json.dumps(samples))
    config = small_config(small_world, tmp_path / "other", **changes)
    with pytest.raises(UserError, match=f"sample '{samples[3]['id']}': the text contains '<pad>'"):
        small_loop(replace(config, data=replace(config.data, path=str(data))))


def test_samples_longer_than_the_context_are_named(small_world, tmp_path, caplog):
    decoder = tmp_path / "decoder"
    shutil.copytree(small_world.decoder, decoder)
    hf = json.loads((decoder / "config.json").read_text())
    (decoder / "config.json").write_text(json.dumps(hf | {"max_position_embeddings": 16}))
    with caplog.at_level(logging.WARNING, logger="mmalign"):
        small_loop(small_config(small_world, tmp_path / "run", model={"decoder": str(decoder)}))
    assert "max_position_embeddings 16): sample '" in caplog.text


@pytest.mark.parametrize("name", ["", "export/llava"])
def test_a_run_as_decoder_brings_its_projector(small_world, run, tmp_path, name):
    config = small_config(
        small_world, tmp_path, model={"decoder": str(run / name), "projector": ""}
    )
    assert resolve(config).model.decoder == str(run / "export/llava")
    expected = torch.load(small_world.projector)["model.mm_projector.weight"]
    assert torch.equal(model_of(config).projector.weight, expected)


def test_a_projector_that_does_not_fit_is_left_out_with_a_sentence(
    small_world, run, tmp_path, caplog
):
    folder = tmp_path / "llava"
    shutil.copytree(run / "export/llava", folder)
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | {"projector_hidden_act": "relu"}))
    changes = {"decoder": str(folder), "projector": ""}
    with caplog.at_level(logging.WARNING, logger="mmalign"):
        model_of(small_config(small_world, tmp_path, model=changes))
    assert f"the projector of {folder} is left out" in caplog.text


def test_the_export_speaks_with_the_trained_end(small_world, tmp_path):
    """eos of the tokenizer's settings reaches generate(), and the chat template the processor."""
    decoder = tmp_path / "decoder"
    shutil.copytree(small_world.decoder, decoder)
    (decoder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<unk>"}))
    config = small_config(small_world, tmp_path / "run", model={"decoder": str(decoder)})
    tokenizer = Tokenizer.from_pretrained(decoder)
    assert tokenizer.eos_token_id == 0
    export(small_loop(config).trainer.model, resolve(config), tokenizer, CPU)
    for name in ("llama", "llava"):
        folder = config.run_dir / "export" / name
        assert AutoTokenizer.from_pretrained(folder).eos_token_id == 0
    theirs = LlavaForConditionalGeneration.from_pretrained(folder)
    assert theirs.generation_config.eos_token_id == 0
    content = [{"type": "image"}, {"type": "text", "text": "what is this"}]
    text = AutoProcessor.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert "USER: <im_start><im_patch><im_end>\nwhat is this ASSISTANT:" in text


def test_stage_1_has_nothing_to_adapt():
    config = replace(RECIPES["tiny-pretrain"][1], lora=LoraConfig(rank=4))
    with pytest.raises(UserError, match="--lora.rank is 4, but stage pretrain trains the proj"):
        resolve(config)
