"""A toy world in miniature, and what its files say."""

import json
from pathlib import Path

from mmalign.toy_world import Size, ToyWorld

MINIATURE = Size(
    scenes=40,
    heldout_scenes=12,
    tower_scenes=60,
    tower_steps=3,
    pages=700,
    decoder_steps=3,
    documents=40,
)


VARIANTS = ("planted_truth", "planted_falsehood", "null")


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def records(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def answers(record: dict) -> list[tuple[str, str]]:
    values = [turn["value"].replace("<image>\n", "") for turn in record["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def described(world: ToyWorld) -> dict[str, list[list[dict]]]:
    """Image file -> groups of things, as scenes.json tells them."""
    return {f"{s['name']}.jpg": s["groups"] for s in records(world.root / "scenes.json")}
