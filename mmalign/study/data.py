"""The data of a run with a control, or with a part of the samples, as a file in its folder.

data.json has the samples, manifest.json what they were made from.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

from mmalign.config import TrainConfig
from mmalign.data.controls import CONTROLS, read_records, supervised_tokens
from mmalign.data.mix import data_files
from mmalign.data.samples import type_of
from mmalign.data.subsets import take_samples, take_tokens
from mmalign.files import replacing, sha256, write_json, write_text
from mmalign.study.identity import Order
from mmalign.tokenizer import Tokenizer
from mmalign.training.inputs import fingerprint

DATA, MANIFEST = "data.json", "manifest.json"


def with_data(order: Order) -> TrainConfig | None:
    """The configuration that trains on the transformed file, which is written first."""
    config, transform = order.config, order.run.transform
    if config is None or transform is None:
        return config
    control = CONTROLS.get(transform.control)
    data = replace(config.data, path=str(order.folder / DATA))
    if control and control.files:
        data = replace(data, image_root=str(order.folder))
    here = replace(config, data=data)
    if (order.folder / DATA).exists() and (order.folder / MANIFEST).exists():
        return here
    rows, about = _transformed(order, config)
    for name, content in control.files.items() if control else ():
        with replacing(order.folder / name, "wb") as file:
            file.write(content())
    write_text(order.folder / DATA, json.dumps(rows))
    source = Path(config.data.path)
    about |= asdict(transform) | {"seed": config.seed, "source": str(source)}
    files = data_files(source)
    content = sha256(source) if source.is_file() else fingerprint(files, {})["sha256"]
    about |= {"source_sha256": content, "sha256": sha256(order.folder / DATA)}
    if order.second:
        about["second_sha256"] = sha256(order.second)
    write_json(order.folder / MANIFEST, about)
    return here


def _transformed(order: Order, config: TrainConfig) -> tuple[list[dict], dict]:
    """The records after choice of type, control and choice of a part; facts for the manifest."""
    transform, data = order.run.transform, config.data
    assert transform is not None
    wanted, rows, about = {type_of({"type": x}) for x in data.types}, read_records(data.path), {}
    rows = [row for row in rows if not wanted or type_of(row) in wanted]
    count = supervised_tokens(data, Tokenizer.from_pretrained(config.model.tokenizer))
    if transform.control:
        control = CONTROLS[transform.control]
        second = control.read_second(order.second) if control.second else None
        found = control(rows, config.seed, second, count)
        rows, about = found.records, dict(found.about)
    if transform.samples:
        rows = take_samples(rows, transform.samples, config.seed)
    if transform.supervised_tokens:
        rows = take_tokens(rows, transform.supervised_tokens, config.seed, count)
    return rows, about | {"samples_written": len(rows)}
