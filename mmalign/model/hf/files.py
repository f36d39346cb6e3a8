"""Reading tensors one at a time from safetensors files and PyTorch .bin files."""

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmalign.errors import UserError
from mmalign.files import read_json

_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
Reader = safe_open | dict[str, Tensor]  # of a .safetensors or a .bin file


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
                self._readers[key] = (path, reader)

    @classmethod
    def of_folder(cls, folder: Path) -> "WeightFiles":
        """The weights of a Hugging Face folder; UserError saying what was looked for."""
        for name in _FILES:
            path = folder / name
            if path.exists():
                return cls(_shards(path) if name.endswith(".index.json") else [path])
        raise UserError(f"no weights in {folder}: looked for {', '.join(_FILES)}")

    def names(self) -> list[str]:
        return list(self._readers)

    def shape(self, key: str) -> tuple[int, ...]:
        _, reader = self._readers[key]
        if isinstance(reader, dict):
            return tuple(reader[key].shape)
        return tuple(reader.get_slice(key).get_shape())

    def read(self, key: str) -> Tensor:
        _, reader = self._readers[key]
        return reader[key] if isinstance(reader, dict) else reader.get_tensor(key)


def _shards(index: Path) -> list[Path]:
    names = sorted(set(read_json(index)["weight_map"].values()))
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise UserError(
            f"{index.parent}: {index.name} names {len(names)} files, but {', '.join(missing)} "
            "is missing. Download the folder again"
        )
    return [index.parent / name for name in names]


def _open(path: Path) -> Reader:
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt")
        # files older than the zip format cannot be mapped
        mmap = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or not a file of weights: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} does not contain a state dict (tensors by name)")
    return state
