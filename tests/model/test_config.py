"""config.json in both spellings, and everything that is refused."""

import json

import pytest
import torch
import transformers
from transformers import LlamaConfig

from mmalign.errors import UserError
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.kinds import DECODERS

# as published: meta-llama/Llama-2-7b-hf and openlm-research/open_llama_3b_v2, shortened
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
OPEN_LLAMA_3B = {
    "hidden_act": "silu",
    "hidden_size": 3200,
    "intermediate_size": 8640,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 26,
    "rms_norm_eps": 1e-06,
    "vocab_size": 32000,
}
CLIP_VIT_L_14 = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "text_config": {"hidden_size": 768, "model_type": "clip_text_model"},
    "vision_config": {
        "hidden_act": "quick_gelu",
        "hidden_size": 1024,
        "image_size": 224,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
    "vision_config_dict": {"hidden_size": 1024, "num_hidden_layers": 24},
}


def decoder_config(folder, hf: dict) -> DecoderConfig:
    (folder / "config.json").write_text(json.dumps(hf))
    return DecoderConfig.from_hf(folder)


def vision_config(folder, hf: dict) -> VisionConfig:
    (folder / "config.json").write_text(json.dumps(hf))
    return VisionConfig.from_hf(folder)


def test_published_llama(tmp_path):
    config = decoder_config(tmp_path, LLAMA_2_7B)
    assert (config.head_dim, config.rms_norm_eps, config.rope_theta) == (128, 1e-5, 10000.0)
    assert config.max_position_embeddings == 4096
    config = decoder_config(tmp_path, OPEN_LLAMA_3B)
    assert (config.head_dim, config.num_key_value_heads) == (100, 32)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
    ],
)
def test_both_spellings_of_rope_theta(tmp_path, spelling):
    assert decoder_config(tmp_path, LLAMA_2_7B | spelling).rope_theta == 5e5


@pytest.mark.parametrize("model_type", DECODERS)
def test_left_out_values_are_those_of_transformers(tmp_path, model_type):
    """Published LLaVA folders leave out of text_config whatever is the config class's default."""
    architecture = DECODERS[model_type].architecture
    default = getattr(transformers, architecture.replace("ForCausalLM", "Config"))()
    config = decoder_config(tmp_path, {"model_type": model_type})
    for name in vars(config).keys() - {"rope_theta", "rope_scaling", "head_dim"}:
        assert getattr(config, name) == getattr(default, name, None), name
    assert config.rope_theta == default.rope_parameters["rope_theta"]
    assert config.head_dim == getattr(default, "head_dim", 128)
    assert config.rope_scaling is None


def test_a_sliding_window_limits_the_length(tmp_path):
    hf = LLAMA_2_7B | {"model_type": "mistral"}
    assert decoder_config(tmp_path, hf | {"sliding_window": None}).length_limit is None
    config = decoder_config(tmp_path, hf | {"sliding_window": 1024})
    assert (config.length_limit, config.context_length) == (1024, 1024)
    config = decoder_config(tmp_path, hf | {"sliding_window": 8192})
    assert (config.length_limit, config.context_length) == (8192, 4096)
    decoder = LLAMA_2_7B | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert decoder_config(tmp_path, decoder).length_limit == 4096


def test_windows_that_no_layer_has_are_accepted(tmp_path):
    hf = LLAMA_2_7B | {"model_type": "qwen2", "sliding_window": 64}
    assert decoder_config(tmp_path, hf).length_limit is None
    hf |= {"use_sliding_window": True, "max_window_layers": 32}
    assert decoder_config(tmp_path, hf).length_limit is None


def test_text_part_of_a_llava_config(tmp_path):
    text = {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5}
    config = decoder_config(tmp_path, {"model_type": "llava", "text_config": text})
    assert (config.vocab_size, config.hidden_size) == (32064, 4096)
    hf = {"model_type": "llava", "tie_word_embeddings": True, "text_config": text}
    assert decoder_config(tmp_path, hf).tie_word_embeddings


def test_original_llava_config_is_flat(tmp_path):
    hf = LLAMA_2_7B | {"model_type": "llava", "mm_hidden_size": 1024, "vocab_size": 32003}
    assert decoder_config(tmp_path, hf).vocab_size == 32003


def test_published_clip(tmp_path):
    config = vision_config(tmp_path, CLIP_VIT_L_14)
    assert (config.num_patches, config.hidden_size, config.num_hidden_layers) == (256, 1024, 24)
    flat = CLIP_VIT_L_14["vision_config"]
    assert vision_config(tmp_path, flat) == config
    hf = {"model_type": "llava", "text_config": {}, "vision_config": flat}
    assert vision_config(tmp_path, hf) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'; supported: 'llama' or 'mistral'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 28},
            "use_sliding_window is True",
        ),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_scaling": {"type": "longrope"}}, "type 'longrope' is not supported"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
            "rope_scaling has the types linear and yarn",
        ),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.rope_type is None; expected the kind"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters.full_attention: RoPE that differs among layers is not supported",
        ),
        ({"rope_scaling": {"type": "linear"}}, "factor is None; expected a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, r"factor is 0\.5"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0}},
            "high_freq_factor is None",
        ),
        ({"num_key_value_heads": 5}, "32 is not a multiple of num_key_value_heads 5"),
        ({"head_dim": 33}, "head_dim is 33"),
        ({"head_dim": 0}, "head_dim is 0; expected an integer from 2"),
        ({"hidden_size": "4096"}, r"config\.json: hidden_size is '4096'; expected an integer"),
        ({"num_attention_heads": None}, "num_attention_heads is None; expected an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected an integer from 1 to"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; expected"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"vocab_size": [400]}, r"vocab_size is \[400\]"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; expected a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": 0}, "rope_theta is 0; expected a number from 1"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        (
            {
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            "rope_parameters and rope_scaling disagree",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5},
            r"rope_parameters\.rope_theta 10000 and rope_theta 500000 disagree",
        ),
        ({"rope_parameters": []}, r"rope_parameters is \[\]; expected an object"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected true or"),
        ({"eos_token_id": ["2"]}, r"eos_token_id is \['2'\]; expected a token id or a list"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised weights are not supported"),
    ],
)
def test_decoders_that_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        decoder_config(tmp_path, LLAMA_2_7B | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "dinov2"}, "model_type is 'dinov2'; supported: 'clip_vision_model' or"),
        (
            {"model_type": "qwen2_vl"},
            "the language model alone is read. Vision towers are those of ",
        ),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; supported: 'quick_gelu' or 'gelu'"),
        ({"num_channels": 1}, "num_channels is 1"),
        ({"num_attention_heads": 7}, r"config\.json: .* not a multiple of num_attention_heads 7"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"image_size": None}, "image_size is None"),
        ({"image_size": 7}, "patch_size 14 exceeds image_size 7"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
    ],
)
def test_towers_that_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        vision_config(tmp_path, CLIP_VIT_L_14["vision_config"] | change)


def test_folders_of_another_kind_are_called_by_their_names(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="does not exist. The folder holds a GGUF file"):
        DecoderConfig.from_hf(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(UserError, match="The folder holds an adapter"):
        DecoderConfig.from_hf(tmp_path)


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        DecoderConfig.from_hf(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        VisionConfig.from_hf(tmp_path)
    with pytest.raises(UserError, match="no vision_config"):
        vision_config(tmp_path, LLAMA_2_7B | {"model_type": "llava"})


def test_written_config_reads_back(tmp_path):
    config = decoder_config(tmp_path, OPEN_LLAMA_3B | {"rope_theta": 123.0})
    hf = config.to_hf(torch.bfloat16)
    assert hf["torch_dtype"] == "bfloat16"
    assert decoder_config(tmp_path, hf) == config
    assert LlamaConfig(**hf).rope_parameters["rope_theta"] == 123.0
    tower = vision_config(tmp_path, CLIP_VIT_L_14)
    assert vision_config(tmp_path, tower.to_hf(torch.float32)) == tower
