"""Reading tensors one at a time from safetensors files and PyTorch .bin files."""

import logging
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mmalign.errors import UserError
from mmalign.files import Settings, known_kind, read_json, require_file
from mmalign.model.hf_config import other_folder

log = logging.getLogger("mmalign")
_FILES = (  # in transformers' order: a whole file before an index
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
Reader = safe_open | dict[str, Tensor]  # of a .safetensors or a .bin file
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTISED = re.compile(r"\.(qweight|qzeros|absmax|quant_map|SCB|weight_scale(_inv)?)(\.|$)")


class WeightFiles:
    """The tensors of one file or of all shards: shapes without reading, values one at a time.

    A pickle is opened with weights_only, so nothing in it is executed; both formats are memory
    mapped, so a 7B checkpoint is never in memory as a whole.
    """

    def __init__(self, paths: list[Path]):
        self._readers: dict[str, tuple[Path, Reader]] = {}
        for path in paths:
            reader = _open(path)
            names = reader.keys()  # a safe_open is not iterable itself
            for key in names:
                if key in self._readers:
                    raise UserError(f"{path}: {key} is also in {self._readers[key][0].name}")
                if _QUANTISED.search(key):
                    raise UserError(
                        f"{path}: the weights are quantised ({key}), which is not supported. Give "
                        "the folder of the model before its quantisation"
                    )
                self._readers[key] = (path, reader)

    @classmethod
    def of_folder(cls, folder: Path) -> "WeightFiles":
        """The weights of a Hugging Face folder; UserError saying what was looked for."""
        found = [name for name in _FILES if (folder / name).exists()]
        if not found:
            what = other_folder(folder)
            if any(folder.glob("*-of-*.safetensors")):
                what = f"The folder holds parts without their index. Download {_FILES[1]} as well"
            raise UserError(
                f"no weights in {folder}: looked for {', '.join(_FILES)}. {what}".strip()
            )
        path = folder / found[0]
        if found[:2] == list(_FILES[:2]):
            log.warning("%s is read; %s beside it is not", path, found[1])
        return cls(_shards(path) if found[0].endswith(".index.json") else [path])

    def names(self) -> list[str]:
        return list(self._readers)

    def shape(self, key: str) -> tuple[int, ...]:
        _, reader = self._readers[key]
        if isinstance(reader, dict):
            return tuple(reader[key].shape)
        return tuple(reader.get_slice(key).get_shape())

    def read(self, key: str) -> Tensor:
        """Raises UserError for a type that weights cannot have, and for NaN and infinity."""
        path, reader = self._readers[key]
        tensor = reader[key] if isinstance(reader, dict) else reader.get_tensor(key)
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = "no values (it is on the device meta)" if tensor.is_meta else f"{tensor.layout}"
            raise UserError(f"{path}: {key} has {kind}; weights are read as dense tensors")
        if tensor.dtype not in _TYPES.values():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{path}: {key} has the type {kind}; weights are read as "
                f"{', '.join(str(x).removeprefix('torch.') for x in _TYPES.values())}"
            )
        if tensor.numel() and not torch.stack(torch.aminmax(tensor)).float().isfinite().all():
            raise UserError(
                f"{path}: {key} has values that are NaN or infinite. Download the file again, or "
                "take an earlier checkpoint"
            )
        return tensor


def _shards(index: Path) -> list[Path]:
    """The files that an index names: beside it, never outside its folder."""
    names = set()
    weight_map = Settings(read_json(index), index).section("weight_map")
    for key, name in weight_map.values.items():
        if not isinstance(name, str) or not Path(name).name or len(name) > 255 or "\0" in name:
            raise weight_map.error(key, "the name of a file")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(
                f"{index}: {key} is in {name!r}, which lies outside the folder. Download the "
                "folder again, from a source that you trust"
            )
        names.add(name)
    if not names:
        raise UserError(f"{index}: weight_map names no files. Download the folder again")
    missing = sorted(name for name in names if not (index.parent / name).exists())
    if missing:
        raise UserError(
            f"{index.parent}: {index.name} names {len(names)} files, but {', '.join(missing)} "
            "is missing. Download the folder again"
        )
    return [index.parent / name for name in sorted(names)]


def _open(path: Path) -> Reader:
    """A safe_open handle, or the dict of a .bin file."""
    require_file(path)
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt")
        # files older than the zip format cannot be mapped
        mmap = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load raises nearly anything for a file that is cut
        reason = known_kind(path) or _reason(error)
        with path.open("rb") as file:
            start = file.read(9)  # of safetensors the length of its header, then the header
        if path.suffix != ".safetensors" and start[5:] == b"\0\0\0{":
            reason = "a safetensors file. Give it a name that ends in .safetensors"
        raise UserError(f"{path} is {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} does not contain a state dict (tensors by name)")
    if not all(isinstance(key, str) for key in state):
        raise UserError(f"{path} does not contain a state dict: not all of its keys are names")
    return state


def _reason(error: Exception) -> str:
    """One line of it, without torch's advice to execute what is in the file."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, pickle.UnpicklingError):
        first = "not a pickle of tensors alone"
    return f"damaged or not a file of weights: {first}"
