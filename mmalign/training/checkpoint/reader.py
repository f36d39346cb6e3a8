"""Reads torch.distributed.checkpoint's files without executing anything in them.

The tensors are read with torch.load(weights_only=True), but .metadata is a pickle that PyTorch
loads as it is. Here it may name the classes that PyTorch itself writes, and nothing else.
"""

import pathlib
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata

from mmalign.errors import UserError

_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata")),
    *((_METADATA, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),  # a name -> torch.layout
    ("torch", "Size"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if module.startswith("pathlib") and name == "PosixPath":
            return pathlib.PurePosixPath
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


class Reader(FileSystemReader):
    """FileSystemReader of a checkpoint whose metadata may come from anyone."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        """Raises UserError for metadata that PyTorch did not write."""
        path = Path(self.path)
        try:
            with open(path / ".metadata", "rb") as file:
                metadata = _Unpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise TypeError(f"it holds {type(metadata).__name__}")
            for info in metadata.storage_data.values():
                if Path(info.relative_path).name != str(info.relative_path):
                    raise ValueError(f"it names {info.relative_path}, outside of the checkpoint")
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(
                f"the checkpoint {path} is not one that this program wrote: .metadata cannot be "
                f"read ({error}). Nothing in it was executed. Remove this folder and rerun the "
                "same command to resume from the checkpoint before it."
            ) from error
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata
