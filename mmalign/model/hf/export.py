"""Our modules as folders that transformers loads, in the layout of published checkpoints.

Each export is written to a temporary folder and renamed, so a folder is complete or absent.
Adapters and the two trained token rows are merged into the written weights, not into the model.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from mmalign.files import replacing, write_json
from mmalign.model.config import VisionConfig
from mmalign.model.decoder import Decoder
from mmalign.model.hf.names import Part, decoder_parts, vision_parts
from mmalign.model.llava import Llava
from mmalign.model.lora import LoraLinear
from mmalign.model.preprocessing import TILING
from mmalign.model.projector import AnyProjector, projector_tensors
from mmalign.model.shards import fsdp_unit_of, unsharded
from mmalign.model.vision_tower import VisionTower
from mmalign.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5 * 10**9


def export_llama(
    model: Llava | Decoder,
    folder: str | Path | None,
    tokenizer: Tokenizer | None = None,
    chat_template: str = "",
) -> None:
    """The decoder alone as its class in transformers, with the tokenizer and its chat template.

    All processes export a sharded model together; with folder None a process only takes part in
    gathering its weights.
    """
    decoder = model.decoder if isinstance(model, Llava) else model
    if folder is None:
        return _read_all(_decoder_tensors(model))
    with replacing_folder(Path(folder)) as partial:
        write_json(partial / "config.json", _decoder_config(decoder, tokenizer))
        _write_weights(partial, _decoder_tensors(model))
        if tokenizer is not None:
            tokenizer.save(partial, decoder.config.vocab_size, chat_template)


def export_vision_tower(tower: VisionTower, folder: str | Path) -> None:
    """A CLIPVisionModel folder, with the preprocessor's settings."""
    with replacing_folder(Path(folder)) as partial:
        write_json(partial / "config.json", tower.config.to_hf(_dtype(tower)))
        write_json(partial / "preprocessor_config.json", _preprocessor(tower))
        _write_weights(partial, _tower_tensors(tower, "vision_model."))


def export_llava(
    llava: Llava,
    folder: str | Path | None,
    tokenizer: Tokenizer | None = None,
    chat_template: str = "",
) -> None:
    """A LlavaForConditionalGeneration folder, or with tiles a LlavaNextForConditionalGeneration's.

    The arguments are those of export_llama.
    """
    tower, projector = llava.vision_tower, llava.projector
    assert tower is not None and projector is not None, "a text-only model: use export_llama"
    if folder is None:
        return _read_all(_llava_tensors(llava, tower, projector))
    dtype = _dtype(llava.decoder)
    config = {
        **_class_of(tower.config),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "image_token_index": llava.image_token_id,
        "image_seq_length": tower.config.num_patches,
        **projector.HF_CONFIG,
        **tower.config.llava_fields,
        "tie_word_embeddings": llava.decoder.config.tie_word_embeddings,
        "text_config": _decoder_config(llava.decoder, tokenizer),
        "vision_config": tower.config.to_hf(_dtype(tower)),
    }
    with replacing_folder(Path(folder)) as partial:
        write_json(partial / "config.json", config)
        write_json(partial / "preprocessor_config.json", _preprocessor(tower))
        _write_weights(partial, _llava_tensors(llava, tower, projector))
        if tokenizer is not None:
            tokenizer.save(partial, llava.decoder.config.vocab_size, chat_template)
            _write_processor(partial, tokenizer, tower.config)


def _class_of(vision: VisionConfig) -> dict:
    if not vision.grids:
        return {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_grid_pinpoints": vision.grids,
    }


def save_projector(llava: Llava, path: str | Path) -> None:
    """projector.safetensors: the projector and, where stage 1 trains them, the two token rows."""
    assert llava.projector is not None, "a text-only model has no projector"
    state = projector_tensors(llava.projector)
    if llava.image_token_embeddings is not None:
        state["image_token_embeddings"] = llava.image_token_embeddings
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        file.write(save(state, metadata={"format": "pt", "mmalign": "projector"}))


def _decoder_config(decoder: Decoder, tokenizer: Tokenizer | None) -> dict:
    """config.json, with the ids of the tokenizer that it was trained with."""
    config = decoder.config.to_hf(_dtype(decoder))
    if tokenizer is not None:
        for role in ("bos_token_id", "eos_token_id"):
            token_id, known = getattr(tokenizer, role), config[role]
            if token_id not in (known if isinstance(known, list) else [known]):
                config[role] = token_id
    return config


def _preprocessor(tower: VisionTower) -> dict:
    settings = tower.config.preprocessing.to_hf(tower.config.kind.is_clip)
    if not tower.config.grids:
        return settings
    tiles = {"do_pad": True, "image_grid_pinpoints": tower.config.grids}  # pads batches
    return settings | {"image_processor_type": TILING[0]} | tiles


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


# One tensor at a time, so that merging adapters never makes a second copy of a large model.
_Tensors = Iterator[tuple[str, Tensor]]


@torch.no_grad()
def _module_tensors(module: nn.Module, parts: dict[str, Part], prefix: str = "") -> _Tensors:
    """Parts of a fused weight are consecutive, so a merged weight is computed once.

    So are the parts of an FSDP unit: one unit is unsharded at a time.
    """
    name, weight, unit = "", torch.empty(0), None
    with ExitStack() as gathered:
        for key, part in parts.items():
            if unit is not (unit := fsdp_unit_of(module, part.parameter)):
                gathered.close()
                gathered.enter_context(unsharded(unit))
            if part.parameter != name:
                name, weight = part.parameter, _merged(module, part.parameter)
            tensor = weight[part.rows].reshape(part.shape)
            yield prefix + key, tensor if unit is module else tensor.clone()


def _merged(module: nn.Module, parameter: str) -> Tensor:
    owner, _, name = parameter.rpartition(".")
    owner = module.get_submodule(owner)
    if isinstance(owner, LoraLinear) and name == "weight":
        return owner.merged_weight()
    return module.get_parameter(parameter).detach()


def _decoder_tensors(model: Llava | Decoder, prefix: str = "") -> _Tensors:
    decoder = model.decoder if isinstance(model, Llava) else model
    rows, ids = None, []
    if isinstance(model, Llava):
        rows, ids = model.image_token_embeddings, list(model.im_start_end_ids)
    for key, tensor in _module_tensors(decoder, decoder_parts(decoder.config), prefix):
        if rows is not None and key.endswith("embed_tokens.weight"):
            tensor = tensor.clone()
            tensor[ids] = rows.detach()
        yield key, tensor


def _tower_tensors(tower: VisionTower, prefix: str) -> _Tensors:
    return _module_tensors(tower, vision_parts(tower.config), prefix)


def _llava_tensors(llava: Llava, tower: VisionTower, projector: AnyProjector) -> _Tensors:
    yield from _tower_tensors(tower, "vision_tower.vision_model.")
    yield from projector.to_hf_tensors().items()
    if llava.image_newline is not None:
        yield "image_newline", llava.image_newline.detach()
    yield from _decoder_tensors(llava, "language_model.")


def _read_all(tensors: _Tensors) -> None:
    for _ in tensors:
        pass


def _write_weights(folder: Path, tensors: _Tensors) -> None:
    """model.safetensors, or shards of at most MAX_SHARD_BYTES with their index."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    num_bytes = total_bytes = 0
    for key, tensor in tensors:
        if shard and num_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append(_write_shard(folder, len(shards), shard))
            shard, num_bytes = {}, 0
        shard[key] = tensor.cpu().contiguous()
        num_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    shards.append(_write_shard(folder, len(shards), shard))
    if len(shards) == 1:
        _shard_path(folder, 0).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, keys in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _shard_path(folder, i).rename(folder / name)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def _shard_path(folder: Path, i: int) -> Path:
    return folder / f"shard_{i}.safetensors"  # the final name needs the number of shards


def _write_shard(folder: Path, i: int, shard: dict[str, Tensor]) -> list[str]:
    save_file(shard, _shard_path(folder, i), metadata={"format": "pt"})
    return list(shard)


def _write_processor(folder: Path, tokenizer: Tokenizer, config: VisionConfig) -> None:
    """What LlavaProcessor or LlavaNextProcessor needs to write the tokens of an image."""
    strategy = "vision_feature_select_strategy"
    settings = {
        "processor_class": "LlavaNextProcessor" if config.grids else "LlavaProcessor",
        "image_token": tokenizer.token(tokenizer.image_token_id),
        "patch_size": config.patch_size,
        strategy: config.llava_fields[strategy],
        "num_additional_image_tokens": config.num_class_tokens,  # which "default" drops again
    }
    write_json(folder / "processor_config.json", settings)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` at the end; an error leaves the old one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, previous = (folder.with_name(f".{folder.name}.{x}") for x in ("partial", "previous"))
    for leftover in (partial, previous):  # of an export that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)
