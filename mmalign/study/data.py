"""The data of a run with a control, or with a part of the samples, as a file in its folder.

data.json has the samples, manifest.json what they were made from.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from mmalign.config import DataConfig, TrainConfig
from mmalign.data.json_records import read_text, records
from mmalign.data.samples import read_samples
from mmalign.errors import SampleError, UserError
from mmalign.files import sha256, write_json, write_text
from mmalign.study.identity import Order
from mmalign.study.plan import Transform
from mmalign.tokenizer import Tokenizer
from mmalign.training.build import build_dataset


def with_data(order: Order) -> TrainConfig | None:
    """The configuration that trains on the transformed file, which is written first."""
    config, transform = order.config, order.run.transform
    if config is None or transform is None:
        return config
    path, manifest = order.folder / "data.json", order.folder / "manifest.json"
    source = Path(config.data.path)
    here = replace(config, data=replace(config.data, path=str(path)))
    if path.exists() and manifest.exists():
        return here
    rows = _read(source)
    if transform.control:
        rows = _controlled(rows, order)
    if transform.samples or transform.supervised_tokens:
        write_text(path, json.dumps(rows))  # selection reads it as training does
        rows = [rows[i] for i in _selection(here, transform)]
    write_text(path, json.dumps(rows))
    about = asdict(transform) | {"seed": order.run.seed, "source": str(source)}
    about |= {"source_sha256": sha256(source), "sha256": sha256(path), "samples_written": len(rows)}
    if order.second:
        about["second_sha256"] = sha256(order.second)
    write_json(manifest, about)
    return here


def _read(path: Path) -> list[dict]:
    text, _ = read_text(path)
    return [record for _, _, record in records(path, text)]


def _selection(config: TrainConfig, transform: Transform) -> list[int]:
    """Positions of the chosen samples: the beginning of one order per seed and type."""
    # RandomState, not default_rng: numpy promises that its streams never change
    data: DataConfig = config.data
    positions = read_samples(data.path, data).positions
    order = np.random.RandomState([config.seed, 1]).permutation(len(positions))
    if transform.samples:
        if transform.samples > len(order):
            raise UserError(
                f"{data.path} has {len(order):,} samples of the chosen types, expected at least "
                f"{transform.samples:,}. Lower `samples` of the variant"
            )
        order = order[: transform.samples]
    if transform.supervised_tokens:
        order = order[: _num_with_tokens(config, order, transform.supervised_tokens)]
    return [int(positions[i]) for i in order]


def _num_with_tokens(config: TrainConfig, order: np.ndarray, wanted: int) -> int:
    """How many samples of the order have so many supervised tokens together."""
    dataset = build_dataset(config, Tokenizer.from_pretrained(config.model.tokenizer))
    total = 0
    for number, index in enumerate(order, start=1):
        try:
            total += int((dataset.encode(int(index)).labels >= 0).sum())
        except SampleError:
            if config.data.on_bad_sample == "error":
                raise
        if total >= wanted:
            return number
    raise UserError(
        f"{config.data.path}: the chosen samples have {total:,} supervised tokens, expected at "
        f"least {wanted:,}. Lower `supervised-tokens` of the variant"
    )
