"""Hugging Face folders in and out: the functions that other rooms call."""

from mmalign.model.hf.export import (
    export_llama,
    export_llava,
    export_vision_tower,
    save_projector,
)
from mmalign.model.hf.read import (
    is_llava,
    load_decoder,
    load_llava,
    load_projector,
    load_vision_tower,
)

__all__ = [
    "export_llama",
    "export_llava",
    "export_vision_tower",
    "is_llava",
    "load_decoder",
    "load_llava",
    "load_projector",
    "load_vision_tower",
    "save_projector",
]
