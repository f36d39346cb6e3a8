"""Hugging Face folders in and out.

names.py    which Hugging Face tensor is which rows of which parameter
files.py    safetensors and .bin files, one tensor at a time
read.py     folders and projector files -> Decoder, VisionTower, the projector's tensors
export.py   Llava -> folders that transformers loads;  adapter.py  a folder that PEFT loads
"""

from mmalign.model.hf.adapter import export_adapter
from mmalign.model.hf.export import (
    export_llama,
    export_llava,
    export_vision_tower,
    save_projector,
)
from mmalign.model.hf.read import (
    is_llava,
    load_decoder,
    load_image_newline,
    load_llava,
    load_projector,
    load_vision_tower,
)

__all__ = [
    "export_adapter",
    "export_llama",
    "export_llava",
    "export_vision_tower",
    "is_llava",
    "load_decoder",
    "load_image_newline",
    "load_llava",
    "load_projector",
    "load_vision_tower",
    "save_projector",
]
