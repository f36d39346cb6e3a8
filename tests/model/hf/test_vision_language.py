"""The language model inside published vision-language models, against its own text logits."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from mmalign.errors import UserError
from mmalign.evaluation.requests import EncodedRequest
from mmalign.evaluation.scoring import make_plan, run_plan
from mmalign.model.config import DecoderConfig
from mmalign.model.hf import load_decoder, load_projector
from mmalign.model.hf_config import VISION_LANGUAGE
from tests.model.kinds import SIZES
from tests.model.tiny import clip_config, random_sample, randomize

TOKENS = dict(vocab_size=103, bos_token_id=1, eos_token_id=2, pad_token_id=0)
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
QWEN_VISION = dict(
    depth=2, hidden_size=32, embed_dim=32, num_heads=2, intermediate_size=48, out_hidden_size=64,
    patch_size=14, num_position_embeddings=16, deepstack_visual_indexes=[0],
    fullatt_block_indexes=[1],
)  # fmt: skip
SIGLIP = dict(
    model_type="siglip_vision_model", hidden_size=48, intermediate_size=80, num_hidden_layers=2,
    num_attention_heads=3, image_size=28, patch_size=14,
)  # fmt: skip
IDEFICS_VISION = {name: x for name, x in SIGLIP.items() if name != "model_type"}
INTERN_VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    image_size=[28, 28], patch_size=[14, 14],
)  # fmt: skip


def text(model_type: str = "", **changes) -> dict:
    return SIZES | ({"model_type": model_type} if model_type else {}) | changes


CLIP = clip_config().to_dict()
LLAVA = dict(vision_config=CLIP, image_token_index=100)
PERCEIVER = dict(resampler_n_latents=2, resampler_depth=1, resampler_n_heads=2)
PERCEIVER |= dict(num_key_value_heads=2)
MODELS = {  # class of transformers without ForConditionalGeneration, and its config
    "llava": ("Llava", LLAVA | dict(text_config=text("llama"))),
    "llava-tied": ("Llava", LLAVA | dict(text_config=text("llama", tie_word_embeddings=True))),
    "llava-next-vicuna": ("LlavaNext", LLAVA | dict(text_config=text("llama"))),
    "llava-next-mistral": (
        "LlavaNext",
        LLAVA | dict(text_config=text("mistral", sliding_window=None)),
    ),
    "llava-onevision": (
        "LlavaOnevision",
        LLAVA
        | dict(vision_config=SIGLIP)
        | dict(text_config=text("qwen2", tie_word_embeddings=True)),
    ),
    "qwen2-vl": (
        "Qwen2VL",
        dict(text_config=text(rope_parameters=MROPE), vision_config=QWEN_VISION),
    ),
    "qwen2.5-vl-tied": (
        "Qwen2_5_VL",
        dict(
            text_config=text(rope_parameters=MROPE, tie_word_embeddings=True),
            vision_config=QWEN_VISION,
        )
        | dict(tie_word_embeddings=True),
    ),
    "qwen3-vl": (
        "Qwen3VL",
        dict(text_config=text(rope_parameters=MROPE, head_dim=16), vision_config=QWEN_VISION),
    ),
    "internvl": (
        "InternVL",
        dict(
            text_config=text("qwen2"),
            vision_config=INTERN_VISION,
            image_token_id=100,
            tie_word_embeddings=False,
        ),
    ),
    "idefics2": (
        "Idefics2",
        dict(
            text_config=text("mistral", sliding_window=None),
            vision_config=IDEFICS_VISION,
            perceiver_config=PERCEIVER,
            image_token_id=100,
        ),
    ),
    "idefics3": (
        "Idefics3",
        dict(text_config=text("llama"), vision_config=IDEFICS_VISION, image_token_id=100),
    ),
    "smolvlm": (
        "SmolVLM",
        dict(
            text_config=text("llama", tie_word_embeddings=True),
            vision_config=IDEFICS_VISION,
            image_token_id=100,
            tie_word_embeddings=True,
        ),
    ),
    "deepseek-vl": (
        "DeepseekVL",
        dict(
            text_config=text("llama"),
            vision_config=SIGLIP,
            image_token_id=100,
            tie_word_embeddings=False,
        ),
    ),
    "janus": (
        "Janus",
        dict(
            text_config=text("llama"),
            vision_config=IDEFICS_VISION | dict(projection_dim=64, mlp_ratio=1.0),
            vq_config=dict(
                base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, latent_channels=8,
                embed_dim=8, num_embeddings=16, image_token_embed_dim=32, projection_dim=32,
                num_hidden_layers=1, num_patches=4,
            ),
            image_token_id=100,
        ),
    ),
    "instructblip-vicuna": (
        "InstructBlip",
        dict(
            text_config=text("llama"),
            vision_config=IDEFICS_VISION,
            qformer_config=SIZES | dict(encoder_hidden_size=48),
        ),
    ),
    "vip-llava": ("VipLlava", LLAVA | dict(text_config=text("llama"))),
    "llava-next-video": ("LlavaNextVideo", LLAVA | dict(text_config=text("llama"))),
    "video-llava": ("VideoLlava", LLAVA | dict(text_config=text("llama"))),
    "video-llama-3": (
        "VideoLlama3",
        dict(text_config=text("qwen2"), vision_config=IDEFICS_VISION, image_token_id=100),
    ),
    "mistral3": (
        "Mistral3",
        dict(
            text_config=text("mistral", sliding_window=None, head_dim=32),
            vision_config=dict(
                model_type="pixtral", hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                num_attention_heads=2, image_size=28, patch_size=14,
            ),
            image_token_index=100,
        ),
    ),
}  # fmt: skip


def hf_model(kind: str):
    name, config = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**config)
    return randomize(getattr(transformers, f"{name}ForConditionalGeneration")(config))


def scores_of(decoder) -> list[tuple[torch.Tensor, float]]:
    texts = [random_sample(n, seed=n).input_ids % 100 for n in (6, 9)]
    requests = [EncodedRequest(x[:-1].int().numpy(), x[1:].int().numpy(), 0) for x in texts]
    plan = make_plan(requests, [0, 1], ["first", "second"], 64)
    scores = run_plan(decoder, plan, "cpu", progress=False)
    return list(zip(texts, (score.loglikelihood for score in scores), strict=True))


def assert_loglikelihoods(folder, theirs):
    decoder = load_decoder(folder)
    if isinstance(theirs, transformers.InstructBlipForConditionalGeneration):
        theirs = theirs.language_model  # the whole insists on a picture
    for ids, loglikelihood in scores_of(decoder):
        with torch.no_grad():
            logprobs = theirs(input_ids=ids[None]).logits[0].log_softmax(-1)
        expected = logprobs[:-1].gather(1, ids[1:, None]).sum().item()
        assert loglikelihood == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_loglikelihoods_are_those_of_its_own_text_model(tmp_path, kind):
    theirs = hf_model(kind)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] in VISION_LANGUAGE
    assert_loglikelihoods(tmp_path, theirs)


def spelled_otherwise(kind: str, model_type: str, section: str, prefixes: dict[str, str], folder):
    """A language model of this kind in the spelling of an older or foreign publication."""
    theirs = hf_model(kind)
    theirs.save_pretrained(folder)
    values = theirs.config.text_config.to_dict() | {"rope_theta": 1e4}
    del values["rope_parameters"]
    config = {"model_type": model_type, "vision_config": {"hidden_size": 32}}
    if section:
        config[section] = values
    else:
        config = values | config
    if model_type.startswith("qwen2"):
        config["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    (folder / "config.json").write_text(json.dumps(config))
    state = {}
    for name, tensor in theirs.state_dict().items():
        for prefix, other in prefixes.items():
            if name.startswith(prefix):
                name = other + name.removeprefix(prefix)
                break
        state[name] = tensor.contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return theirs


FLAT = {"model.language_model.": "model.", "model.visual.": "visual."}
ORIGINAL_LLAVA = {
    "model.language_model.": "model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
}
OPEN_GV_LAB = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_model.",
    "model.multi_modal_projector.": "mlp1.",
}
DEEPSEEK = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_model.": "vision_model.vision_tower.",
    "model.aligner.": "aligner.",
}
SPELLINGS = {
    "deepseek": ("deepseek-vl", "multi_modality", "language_config", DEEPSEEK),
    "qwen2-vl": ("qwen2-vl", "qwen2_vl", "", FLAT),
    "llava-1.5": ("llava", "llava_llama", "", ORIGINAL_LLAVA),
    "llava-1.6-mistral": ("llava-next-mistral", "llava_mistral", "", ORIGINAL_LLAVA),
    "internvl-chat": ("internvl", "internvl_chat", "llm_config", OPEN_GV_LAB),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings(tmp_path, name):
    theirs = spelled_otherwise(*SPELLINGS[name], tmp_path)
    assert_loglikelihoods(tmp_path, theirs)


def test_projector_of_the_original_llava_folder(tmp_path):
    theirs = spelled_otherwise(*SPELLINGS["llava-1.5"], tmp_path)
    state, projector = load_projector(tmp_path), theirs.model.multi_modal_projector
    assert torch.equal(state["0.weight"], projector.linear_1.weight)
    assert torch.equal(state["2.bias"], projector.linear_2.bias)


@pytest.mark.parametrize("kind", ["llava-next-vicuna", "mistral3"])
def test_the_files_decide_about_lm_head_where_the_sections_contradict_each_other(tmp_path, kind):
    name, config = MODELS[kind]
    tied = config["text_config"] | {"tie_word_embeddings": True}
    config = config | {"text_config": tied, "tie_word_embeddings": False}
    config = getattr(transformers, f"{name}Config")(**config)
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    randomize(model_class(config)).save_pretrained(tmp_path)
    assert_loglikelihoods(tmp_path, model_class.from_pretrained(tmp_path))


def test_a_model_whose_text_attends_otherwise_is_refused(tmp_path):
    hf = {"model_type": "paligemma", "text_config": {"model_type": "gemma"}}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(UserError, match="model_type is 'paligemma'; .* llava_next, "):
        DecoderConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf | {"model_type": "llava"}))
    with pytest.raises(UserError, match="text_config.model_type is 'gemma'"):
        DecoderConfig.from_hf(tmp_path)
