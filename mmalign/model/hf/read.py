"""Weights from Hugging Face folders and LLaVA's projector files into our modules.

Takes the key spelling of published checkpoints and that of transformers 5. Every key that is
missing, unexpected or of another shape is an error; keys that are known to be superfluous are
listed here.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path

import torch
from torch import Tensor, nn

from mmalign.errors import UserError
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.decoder import Decoder
from mmalign.model.hf.files import WeightFiles
from mmalign.model.hf.names import Part, decoder_parts, vision_parts
from mmalign.model.hf_config import VISION_LANGUAGE, read_hf_config
from mmalign.model.llava import ImageTokens, Llava
from mmalign.model.projector import projector_of, read_projector
from mmalign.model.vision_tower import VisionTower

log = logging.getLogger("mmalign")

# buffers that versions of transformers saved; they are computed here
_OLD_BUFFERS = re.compile(
    r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)"
    r"|embeddings\.position_ids"
)
# where vision-language models keep the language model, and its tensors' names in a LlamaForCausalLM
_LANGUAGE_MODEL = {
    "model.language_model.": "model.",  # transformers 5
    "language_model.": "",  # LLaVA, InternVL
    "model.text_model.": "model.",  # Idefics
}
# the other parts of models that have none of these prefixes, and of damaged folders
_MULTIMODAL = re.compile(
    r"(model\.)?((vision_tower|visual|multi_modal_projector|mm_projector)\.|image_newline$)"
)
_CLIP_OTHER_HALF = re.compile(
    r"text_model\.|(text_projection|visual_projection)\.weight$|logit_(scale|bias)$"
)
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SHOWN = 10  # keys in a message


def is_llava(folder: str | Path) -> bool:
    """Whether a Hugging Face folder holds a vision tower as well as a language model."""
    return "vision_config" in read_hf_config(folder)


def load_llava(
    folder: str | Path, tokenizer: ImageTokens, dtype: torch.dtype = torch.float32
) -> Llava:
    """A whole LlavaForConditionalGeneration folder, or a LlamaForCausalLM folder without images."""
    decoder = load_decoder(folder, dtype)
    if not is_llava(folder):
        return Llava(decoder, None, None, tokenizer)
    tower = load_vision_tower(folder, dtype)
    sizes = tower.config.hidden_size, decoder.config.hidden_size
    projector = projector_of(load_projector(folder), *sizes).to(dtype)
    llava = Llava(decoder, tower, projector, tokenizer)
    if tower.config.grids:
        llava.image_newline = load_image_newline([folder], decoder)
    return llava


def load_image_newline(folders: Sequence[str | Path], decoder: Decoder) -> nn.Parameter:
    """Of the first LLaVA 1.6 among the folders, for this decoder."""
    is_tiling = (read_hf_config(x).get("model_type") == "llava_next" for x in folders)
    folder = Path(next(compress(folders, is_tiling)))
    files = WeightFiles.of_folder(folder)
    found = [key for key in files.names() if key.removeprefix("model.") == "image_newline"]
    expected = (decoder.config.hidden_size,)
    shape = files.shape(found[0]) if found else "none"
    if shape != expected:
        raise UserError(f"{folder}: image_newline: expected shape {expected}, found {shape}")
    return nn.Parameter(files.read(found[0]).to(decoder.embed_tokens.weight.dtype, copy=True))


def load_decoder(
    folder: str | Path, dtype: torch.dtype = torch.float32, num_added_tokens: int = 0
) -> Decoder:
    """The decoder of a causal language model's folder, or the one inside a vision-language model.

    num_added_tokens rows are appended to embed_tokens and lm_head; each is the mean of the old
    rows. Projector and vision keys in a language model's folder are ignored with a warning.
    """
    folder = Path(folder)
    config = DecoderConfig.from_hf(folder)
    files = WeightFiles.of_folder(folder)
    keys = _decoder_keys(files, folder)
    config = _with_head(folder, config, files, keys)
    parts = decoder_parts(config)
    keys = _check(parts, files, keys, folder)  # before memory is taken for what config.json says
    decoder = _allocate(
        Decoder, replace(config, vocab_size=config.vocab_size + num_added_tokens), dtype
    )
    _fill(decoder, parts, files, keys)
    for weight in (decoder.embed_tokens.weight, decoder.lm_head.weight):
        old, new = weight.detach().split((config.vocab_size, num_added_tokens))
        if num_added_tokens:
            new.copy_(old.mean(0, dtype=torch.float32))
    return decoder


def load_vision_tower(folder: str | Path, dtype: torch.dtype = torch.float32) -> VisionTower:
    """The tower of a CLIP or SigLIP folder, or of a LlavaForConditionalGeneration's."""
    folder = Path(folder)
    config = VisionConfig.from_hf(folder)
    files = WeightFiles.of_folder(folder)
    model_type = read_hf_config(folder).get("model_type")
    keys = {}
    for key in files.names():
        name = key
        if model_type in ("llava", "llava_next"):
            name = name.removeprefix("model.")
            if not name.startswith("vision_tower."):
                continue
            name = name.removeprefix("vision_tower.")
        elif _CLIP_OTHER_HALF.match(name):
            continue
        name = name.removeprefix("vision_model.")
        if not (name.startswith("head.") and not config.kind.is_clip):  # SigLIP's pooling
            keys[name] = key
    parts = vision_parts(config)
    keys = _check(parts, files, keys, folder)
    tower = _allocate(VisionTower, config, dtype)
    _fill(tower, parts, files, keys)
    return tower.requires_grad_(False)


def load_projector(path: str | Path) -> dict[str, Tensor]:
    """Projector's tensors and, where they were trained, image_token_embeddings (2, hidden_size).

    path: a run's folder, a folder or file with projector.safetensors, LLaVA's mm_projector.bin, a
    LlavaForConditionalGeneration folder, or LLaVA's own. mm_projector.bin may hold embed_tokens,
    whole or only two rows: <im_start> and <im_end> are its last two.
    """
    path = Path(path)
    if not path.is_dir():
        return _projector_of(WeightFiles([path]), path)
    names = ("export/projector.safetensors", "projector.safetensors", "mm_projector.bin")
    for name in names:
        if (path / name).exists():
            return _projector_of(WeightFiles([path / name]), path / name)
    if (path / "export").is_dir() or (path / "metrics.jsonl").exists():
        raise UserError(
            f"{path} is a run without {names[0]}: it is unfinished, or it was trained on text "
            "alone. Finish it (rerun its command), or name another run"
        )
    if (path / "config.json").exists():
        if "text_config" in read_hf_config(path):
            return _llava_projector(path)
        files = WeightFiles.of_folder(path)
        if own := [key for key in files.names() if ".mm_projector." in key]:  # LLaVA's own folder
            return read_projector({key: files.read(key).clone() for key in own}, path)
    raise UserError(
        f"no projector in {path}: looked for {', '.join(names)} and a LLaVA config.json"
    )


def _allocate(module_class: type, config, dtype: torch.dtype):
    """The module with uninitialised parameters of this dtype; never a second copy in fp32."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return module_class(config)
    finally:
        torch.set_default_dtype(previous)


def _decoder_keys(files: WeightFiles, folder: Path) -> dict[str, str]:
    """Name in a causal language model -> key in the files, of such a model or one within a VLM."""
    prefix = next((x for x in _LANGUAGE_MODEL if any(k.startswith(x) for k in files.names())), "")
    keys, others = {}, []
    for key in files.names():
        if prefix and key.startswith(prefix):
            keys[_LANGUAGE_MODEL[prefix] + key.removeprefix(prefix)] = key
        elif _MULTIMODAL.match(key) or (prefix and key != _HEAD):
            others.append(key)
        else:
            keys[key] = key
    if others and read_hf_config(folder).get("model_type") not in VISION_LANGUAGE:
        log.warning(
            "%s: %d tensors of a projector or vision tower are not part of the decoder: %s",
            *(folder, len(others), _listed(sorted(others))),
        )
    return keys


def _with_head(
    folder: Path, config: DecoderConfig, files: WeightFiles, keys: dict[str, str]
) -> DecoderConfig:
    """Whether lm_head is tied, where the files hold one as well; then keys loses it.

    A tied checkpoint may repeat embed_tokens as lm_head. The sections of a VLM's config.json may
    contradict each other; then its classes differ in which one they follow, and the files decide.
    """
    if not config.tie_word_embeddings or not {_HEAD, _EMBEDDINGS} <= keys.keys():
        return config
    head, embeddings = files.read(keys[_HEAD]), files.read(keys[_EMBEDDINGS])
    if head.shape == embeddings.shape and torch.equal(head.float(), embeddings.float()):
        del keys[_HEAD]
        return config
    if read_hf_config(folder).get("tie_word_embeddings") is False:
        return replace(config, tie_word_embeddings=False)
    raise UserError(
        f"{folder}: config.json ties lm_head to embed_tokens (tie_word_embeddings), but the "
        "files hold different values for them. Set it to false if lm_head was trained"
    )


def _check(
    parts: dict[str, Part], files: WeightFiles, keys: dict[str, str], folder: Path
) -> dict[str, str]:
    """The keys that are read, after all names and shapes have been compared."""
    keys = {name: key for name, key in keys.items() if not _OLD_BUFFERS.fullmatch(name)}
    problems = [f"missing {name}" for name in parts.keys() - keys.keys()]
    problems += [f"unexpected {keys[name]}" for name in keys.keys() - parts.keys()]
    for name in parts.keys() & keys.keys():
        expected, found = parts[name].shape, files.shape(keys[name])
        if expected != found:
            problems.append(f"{keys[name]}: expected shape {expected}, found {found}")
    if problems:
        raise UserError(
            f"{folder}: the weights do not fit config.json. {_listed(sorted(problems))}"
        )
    return keys


@torch.no_grad()
def _fill(
    module: nn.Module, parts: dict[str, Part], files: WeightFiles, keys: dict[str, str]
) -> None:
    """Copies every part into its parameter."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, key in keys.items():
        rows = parameters[parts[name].parameter][parts[name].rows]
        rows.copy_(files.read(key).reshape(rows.shape))


def _listed(items: list[str]) -> str:
    rest = len(items) - _SHOWN
    return "; ".join(items[:_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


def _projector_of(files: WeightFiles, path: Path) -> dict[str, Tensor]:
    tensors, rows = {}, {}
    for key in files.names():
        if key.endswith("embed_tokens.weight") and len(files.shape(key)) == 2:
            rows["image_token_embeddings"] = files.read(key)[-2:].clone()
        elif key == "image_token_embeddings":
            rows[key] = files.read(key).clone()
        else:
            tensors[key] = files.read(key).clone()
    return read_projector(tensors, path) | rows


def _llava_projector(folder: Path) -> dict[str, Tensor]:
    hf = read_hf_config(folder)
    VisionConfig.from_hf(folder)  # raises where the features are not those of the tower here
    files = WeightFiles.of_folder(folder)
    keys = [key for key in files.names() if "multi_modal_projector." in key]
    return read_projector({key: files.read(key).clone() for key in keys}, folder, hf.values)
