"""config.json of a Hugging Face folder, and where in it the language model's settings are."""

from pathlib import Path

from mmalign.errors import UserError
from mmalign.files import Settings, read_json

# Published vision-language models by their model_type: the section of config.json that holds the
# language model's settings (empty: the top level), and its kind where the section does not say.
VISION_LANGUAGE = {
    "deepseek_vl": ("text_config", "llama"),
    "idefics2": ("text_config", "mistral"),
    "idefics3": ("text_config", "llama"),
    "instructblip": ("text_config", ""),
    "internvl": ("text_config", "qwen2"),
    "internvl_chat": ("llm_config", ""),  # OpenGVLab's own spelling
    "janus": ("text_config", "llama"),
    "llava": ("text_config", "llama"),
    "llava_llama": ("", "llama"),  # liuhaotian's own spelling
    "llava_mistral": ("", "mistral"),
    "llava_next": ("text_config", "llama"),
    "llava_next_video": ("text_config", "llama"),
    "llava_onevision": ("text_config", "qwen2"),
    "llava_qwen": ("", "qwen2"),
    "mistral3": ("text_config", "mistral"),
    "multi_modality": ("language_config", "llama"),  # DeepSeek's own spelling, of Janus, too
    "qwen2_5_vl": ("text_config", "qwen2"),
    "qwen2_vl": ("text_config", "qwen2"),
    "qwen3_vl": ("text_config", "qwen3"),
    "smolvlm": ("text_config", "llama"),
    "video_llama_3": ("text_config", "qwen2"),
    "video_llava": ("text_config", "llama"),
    "vipllava": ("text_config", "llama"),
}
# text alone: their other settings concern the positions of images
_TEXT_PARTS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}


def read_hf_config(folder: str | Path) -> Settings:
    """config.json of a Hugging Face folder; UserError where it is missing, malformed or quantised.

    A folder that holds something else, such as an adapter, is called by its name.
    """
    hint = "Give the folder of a Hugging Face checkpoint: config.json and the weights"
    path = Path(folder) / "config.json"
    if not path.exists():
        hint = other_folder(Path(folder)) or hint
    hf = Settings(read_json(path, hint), path)
    for part in (hf, hf.section("text_config"), hf.section("vision_config")):
        if part.get("quantization_config") is not None:
            raise UserError(
                f"{path}: {part.within}quantization_config is set, but quantised weights are not "
                "supported. Give the folder of the model before its quantisation"
            )
    return hf


def other_folder(folder: Path) -> str:
    """What a folder without a model holds instead, and what to do; empty: not known."""
    if (folder / "adapter_config.json").exists():
        return "The folder holds an adapter (adapter_config.json). Give the merged model's folder"
    if any(folder.glob("*.gguf")):
        return "The folder holds a GGUF file. Give the Hugging Face folder that it was made from"
    return ""


def language_model(hf: Settings) -> Settings:
    """The language model's settings with its model_type: hf itself, or a part of it."""
    section, kind = VISION_LANGUAGE.get(str(hf.get("model_type")), ("", ""))
    if section in hf:
        text = hf.section(section)
        tied = hf.flag("tie_word_embeddings", False) or text.flag("tie_word_embeddings", False)
        values = {"model_type": kind} | text.values | {"tie_word_embeddings": tied}
        hf = Settings(values, text.path, text.within)
    elif kind:
        hf = Settings(hf.values | {"model_type": kind}, hf.path, hf.within)
    found = str(hf.get("model_type"))
    if found in _TEXT_PARTS:
        hf = Settings(hf.values | {"model_type": _TEXT_PARTS[found]}, hf.path, hf.within)
    return hf


def built(config_class: type, hf: Settings, **values):
    """The config; its own complaints get the file's path."""
    try:
        return config_class(**values)
    except UserError as error:
        raise UserError(f"{hf.path}: {error}") from error
