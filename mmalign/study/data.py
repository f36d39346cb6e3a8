"""The data of a run with a control, or with a part of the samples, as files in its folder.

data.json has the samples; of a mix data/mix.toml, with the weights that the mix has, and its files.
manifest.json says what they were made from.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

from mmalign.config import TrainConfig
from mmalign.data.controls import CONTROLS
from mmalign.data.controls.control import parse_samples, records_of
from mmalign.data.controls.lengths import supervised_tokens
from mmalign.data.mix import (
    SUFFIX,
    Mix,
    data_files,
    open_samples,
    picture_tables,
    write_mix,
)
from mmalign.data.samples import Samples
from mmalign.data.subsets import take_samples, take_tokens
from mmalign.files import replacing, sha256, write_json, write_text
from mmalign.study.identity import Order
from mmalign.tokenizer import Tokenizer
from mmalign.training.inputs import fingerprint

DATA, MIX, MANIFEST = "data.json", "data/mix.toml", "manifest.json"


def with_data(order: Order) -> TrainConfig | None:
    """The configuration that trains on the transformed data, which are written first."""
    config, transform = order.config, order.run.transform
    if config is None or transform is None:
        return config
    control = CONTROLS.get(transform.control)
    source = Path(config.data.path)
    path = order.folder / (MIX if source.suffix == SUFFIX else DATA)
    # the samples are chosen already
    data = replace(config.data, path=str(path), types=(), num_samples=None)
    if control and control.files:
        data = replace(data, image_root=str(order.folder))
    elif tables := not data.text_only and _table_roots(source):
        data = replace(data, image_root=(*data.image_roots, *tables))
    here = replace(config, data=data)
    if path.exists() and (order.folder / MANIFEST).exists():
        return here
    about = _write(order, config, path)
    for name, content in control.files.items() if control else ():
        with replacing(order.folder / name, "wb") as file:
            file.write(content())
    about |= asdict(transform) | {"seed": config.seed, "source": str(source)}
    about |= {"source_sha256": _sha256(source), "sha256": _sha256(path)}
    if order.second:
        about["second_sha256"] = _sha256(Path(order.second))
    write_json(order.folder / MANIFEST, about)
    return here


def _write(order: Order, config: TrainConfig, path: Path) -> dict:
    """The samples after choice of type, control and choice of a part; facts for the manifest."""
    transform, samples = order.run.transform, open_samples(config.data.path, config.data)
    assert transform is not None
    rows, parsed = records_of(samples)
    about, kept = {}, range(len(rows))  # kept: the place of each row in the source
    count = supervised_tokens(config.data, Tokenizer.from_pretrained(config.model.tokenizer))
    if transform.control:
        control = CONTROLS[transform.control]
        second = control.read_second(order.second) if control.second else None
        found = control(rows, config.seed, second, count, parsed, _file_name(samples))
        rows, about = found.records, dict(found.about)
        kept = kept if found.kept is None else found.kept
    if transform.samples:
        chosen = take_samples(len(rows), transform.samples, config.seed)
        rows, kept = [rows[i] for i in chosen], [kept[i] for i in chosen]
    if transform.supervised_tokens:
        wanted = transform.supervised_tokens
        chosen = take_tokens(parse_samples(rows), wanted, config.seed, count)
        rows, kept = [rows[i] for i in chosen], [kept[i] for i in chosen]
    if isinstance(samples, Mix):
        _write_parts(samples, rows, kept, path)
    else:
        write_text(path, json.dumps(rows))
    return about | {"samples_written": len(rows)}


def _write_parts(mix: Mix, rows: Iterable[dict], kept: Iterable[int], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    records, parts = defaultdict(list), []
    for row, place in zip(rows, kept, strict=True):
        records[mix.place(place)[0]].append(row)
    for number, part in enumerate(mix.parts):
        if number in records:
            parts.append(replace(part, path=path.parent / f"{part.name}.json"))
            write_text(parts[-1].path, json.dumps(records[number]))
    write_mix(path, parts)


def _file_name(samples: Samples) -> Callable[[str], str]:
    """What captions know a picture by: of one in a table, its path as a file."""

    def name(image: str) -> str:
        table, _, place = image.rpartition("#")
        return (samples.tables[table].path_of(place) if table in samples.tables else None) or image

    return name


def _table_roots(source: Path) -> list[str]:
    """Tables with pictures as image roots, where these have the names that the records have."""
    named = [(name.rpartition("/")[0], path) for name, path in picture_tables(source).items()]
    return [f"{prefix}={path}" if prefix else str(path) for prefix, path in named]


def _sha256(path: Path) -> str:
    """Of a file; of a folder or a mix, of the contents of its files."""
    is_file = path.is_file() and path.suffix != SUFFIX
    return sha256(path) if is_file else fingerprint(data_files(path), {})["sha256"]
