"""How large a toy world is, and the paths of its files."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Size:
    """How much of everything; the default is the world that the recipes use."""

    scenes: int = 3000
    heldout_scenes: int = 200
    tower_scenes: int = 6000
    tower_steps: int = 450
    pages: int = 4400
    decoder_steps: int = 1100
    documents: int = 300  # in each ETHICS-like file


@dataclass(frozen=True)
class ToyWorld:
    root: Path

    @property
    def image_root(self) -> Path:
        return self.root / "images"

    @property
    def pretrain_json(self) -> Path:
        return self.root / "pretrain.json"

    @property
    def finetune_json(self) -> Path:
        return self.root / "finetune.json"

    @property
    def heldout_json(self) -> Path:
        return self.root / "heldout.json"

    @property
    def decoder(self) -> Path:
        return self.root / "decoder"

    @property
    def vision_tower(self) -> Path:
        return self.root / "vision_tower"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"
