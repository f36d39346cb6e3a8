"""Folders of models and tokenizers: the right meaning, or a sentence before the first step."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, CLIPImageProcessorPil

from mmalign.model.config import DecoderConfig
from mmalign.model.hf.files import WeightFiles
from mmalign.tokenizer import Tokenizer

# case -> what the refusal of a training with the case's decoder names
DECODERS = {
    "05-image-token-id-leaves-a-gap": ("<im_patch>", "added_tokens.json"),
    "06-added-token-id-of-a-billion": ("tokenizer_config.json", "1000000000"),
    "23-tokenizer-config-empty": ("tokenizer_config.json",),
    "24-added-tokens-a-list": ("added_tokens.json",),
    "25-tokenizer-model-of-no-bytes": ("tokenizer.model",),
    "28-index-without-weight-map": ("model.safetensors.index.json",),
    "48-nan-in-the-decoder": ("model.layers.1.mlp.down_proj.weight",),
    "68-weights-of-whole-numbers": ("model.layers.0.self_attn.q_proj.weight", "int8"),
}
# case -> what the refusal of an evaluation of the case's decoder names
EVALUATED = {
    "13-weights-quantised-to-4-bits": ("quantization_config",),
    "33-weights-a-git-lfs-pointer": ("pytorch_model.bin", "pointer", "Download"),
    "60-index-names-a-file-outside": ("../outside.safetensors", "outside"),
    "71-rope-theta-of-zero": ("rope_theta",),
}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_refused_before_the_first_step(case, name):
    case.train(model__decoder=case.folder / "decoder").refused(*DECODERS[name])
    assert not (case.run / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", EVALUATED)
def test_a_decoder_is_not_evaluated(case, name):
    ended = case.evaluate(model=case.folder / "decoder")
    ended.refused(*EVALUATED[name])
    assert "weights_only" not in ended.text


@pytest.mark.parametrize(
    "name", ["01-pad-without-row-in-tokenizer-json", "02-pad-beside-older-tokenizer-json"]
)
def test_a_pad_token_in_added_tokens_json(case, name):
    case.train(model__decoder=case.folder / "decoder").succeeded("exported")
    assert Tokenizer.from_pretrained(case.run / "export/llava").image_token_id == 401


def test_03_added_tokens_in_tokenizer_json_alone(case):
    tokenizer = Tokenizer.from_pretrained(case.folder / "decoder")
    assert (tokenizer.vocab_size, tokenizer.image_token_id) == (402, 402)
    assert tokenizer.encode("at <loc_1>").count(400) == 1
    case.train(
        model__decoder=case.folder / "decoder", data__path=case.folder / "data.json"
    ).succeeded("exported")


def test_12_rope_scaling_beside_rope_parameters(case):
    ours = DecoderConfig.from_hf(case.folder / "decoder").rope_scaling
    theirs = AutoConfig.from_pretrained(case.folder / "decoder").rope_parameters
    assert ours and (ours.rope_type, ours.factor) == (theirs["rope_type"], theirs["factor"])


def test_04_eos_of_the_settings(case):
    assert Tokenizer.from_pretrained(case.folder / "decoder").eos_token_id == 400


def test_07_an_old_index_beside_new_weights(case):
    folder, name = case.folder / "decoder", "lm_head.weight"
    read = WeightFiles.of_folder(folder).read(name)
    assert torch.equal(read, load_file(folder / "model.safetensors")[name])
    case.evaluate(model=folder).succeeded("model.safetensors.index.json")


def test_08_a_tokenizer_model_of_another_kind(case):
    case.train(model__decoder=case.folder / "decoder").succeeded("exported")
    case.evaluate(model=case.run).succeeded()


def test_09_tensors_of_llava_1_6(case):
    case.evaluate(model=case.folder / "decoder").succeeded()  # config.json says that it is a VLM


def test_10_a_clip_with_a_visual_projection(case):
    case.train(model__vision_tower=case.folder / "clip").succeeded("exported")


def test_11_a_preprocessing_of_its_own(case):
    case.train(model__vision_tower=case.folder / "clip").succeeded("exported")
    exported = CLIPImageProcessorPil.from_pretrained(case.run / "export/llava")
    assert {*exported.image_mean, *exported.image_std} == {0.5} and not exported.do_center_crop


@pytest.mark.parametrize(
    "name",
    ["14-tokenizer-larger-than-the-model-text-only", "15-tokenizer-larger-than-the-model"],
)
def test_a_tokenizer_larger_than_the_model(case, name):
    text_only = name.endswith("text-only")
    ended = case.train(model__tokenizer=case.folder / "tokenizer", data__text_only=text_only)
    ended.refused("700", "400")


def test_16_a_sample_longer_than_the_context(case):
    ended = case.train(model__decoder=case.folder / "decoder")
    ended.succeeded("max_position_embeddings", "sample 's")


def test_26_config_json_is_a_list(case):
    for part in ("decoder", "clip"):
        option = "model__decoder" if part == "decoder" else "model__vision_tower"
        case.train(**{option: case.folder / part}).refused(f"{part}/config.json")


def test_27_config_json_with_wrong_types(case):
    for folder in sorted(case.folder.iterdir()):
        if folder.is_dir():
            key = folder.name.removeprefix("clip_")
            option = "model__decoder" if key == folder.name else "model__vision_tower"
            case.train(**{option: folder}).refused(f"{folder.name}/config.json", key)


def test_34_a_projector_file_cut_short(case):
    path = case.folder / "mm_projector.bin"
    case.train(model__projector=path).refused(str(path))


def test_49_nan_in_the_vision_tower(case):
    ended = case.train(model__vision_tower=case.folder / "clip")
    ended.refused("encoder.layers.0.self_attn.q_proj.weight")


def test_72_layers_without_end(case):
    ended = case.train(model__vision_tower=case.folder / "clip")
    ended.refused("num_hidden_layers")
