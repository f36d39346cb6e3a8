"""Controls of mixes and of tables with pictures inside: what they make of the plain file."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from mmalign.config import DataConfig, ModelConfig, TrainConfig
from mmalign.data.controls import CONTROLS
from mmalign.data.dataset import ConversationDataset
from mmalign.data.mix import open_samples
from mmalign.errors import UserError
from mmalign.study.data import with_data
from mmalign.study.identity import Order
from mmalign.study.plan import Run, Transform
from mmalign.study.settings import with_settings
from tests.data.conftest import VISION, World
from tests.data.test_same_batches import json_list, messages, parquet, saved, with_bytes

MIX = """
[files.first]
path = "list.json"
weight = 2
[files.second]
path = "{}"
weight = 0.5
"""


def order(world: World, name: str, data: DataConfig, settings: dict, **part) -> Order:
    """Of a run with this control, as a study makes it."""
    folder = world.root / "runs" / f"{name}-{len(list(world.root.glob('runs/*')))}"
    folder.mkdir(parents=True)
    model = ModelConfig(tokenizer=str(world.tokenizer.path))
    config = TrainConfig(stage="finetune", data=data, model=model)
    config = with_settings(config, settings, "here")
    second = ""
    if name and CONTROLS[name].second:
        second = str(world.root / f"{CONTROLS[name].second}.json")
    part = {"samples": None, "supervised_tokens": None} | part
    run = Run("p", "v", 0, "", "", config, Transform(name, second, **part))
    return Order(run, folder, config=config, second=second)


def controlled(world: World, name: str, path: Path, roots=(), **part) -> ConversationDataset:
    settings = dict(CONTROLS[name].settings) if name else {}
    data = DataConfig(str(path), tuple(roots), max_length=500)
    config = with_data(order(world, name, data, settings, **part))
    vision = None if config.data.text_only else VISION
    return ConversationDataset.open(config.data, world.tokenizer.path, vision)


def assert_same(ours: ConversationDataset, theirs: ConversationDataset, names: list[str]) -> None:
    """Text, targets and pixels; names: ids of ours."""
    assert len(ours) == len(theirs) > 3
    for i, name in enumerate(names):
        x, y = ours.encode(i), theirs.encode(i)
        assert x.id == name and x.input_ids.tolist() == y.input_ids.tolist()
        assert x.labels.tolist() == y.labels.tolist()
        pixels = ours.load_pixels(i), theirs.load_pixels(i)
        assert pixels[0] is pixels[1] is None or (pixels[0] == pixels[1]).all()


@pytest.fixture
def plain(world: World) -> Path:
    """list.json, and what the controls need besides it."""
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a boat is red"}]
    texts = [{"id": i, "conversations": turns} for i in range(9)]
    (world.root / "records.json").write_text(json.dumps(texts))
    captions = [{"image": f"{i}.png", "captions": [f"caption {i}"]} for i in range(20)]
    (world.root / "captions.json").write_text("\n".join(map(json.dumps, captions)))
    return json_list(world.root, world.samples)


@pytest.mark.parametrize("name", CONTROLS)
def test_pictures_in_tables_and_files_of_a_mix(world, plain, name):
    roots = [str(world.root / "images")]
    expected = controlled(world, name, plain, roots)
    ids = [expected.samples[i].id for i in range(len(expected))]
    records = with_bytes(world, copy.deepcopy(world.samples))
    for container in (parquet, saved):
        assert_same(controlled(world, name, container(world.root, records)), expected, ids)
    # a mix of the first 12, loose, and the others as messages with their pictures inside
    json_list(world.root, world.samples[:12])
    second = parquet(world.root, [messages(x) for x in records[12:]])
    (world.root / "mix.toml").write_text(MIX.format(second.name))
    found = controlled(world, name, world.root / "mix.toml", roots)
    before = open_samples(world.root / "mix.toml", DataConfig())
    part = {x.id.partition("/")[2]: x.id for x in before}
    if name == "length-matched":  # its samples are of another file
        assert [x.id[:6] for x in found.samples] == ["first/"] * 12 + ["second"] * 8
    else:
        assert_same(found, expected, [part[x] for x in ids])
    if len(found) == 20:  # the weights stay, and so does what is drawn by them
        rows = [x.epoch(np.arange(20)).tolist() for x in (found.samples, before)]
        assert rows[0] == rows[1] and len(rows[0]) == 24 + 4


@pytest.mark.parametrize("part", [{"samples": 6}, {"supervised_tokens": 60}])
def test_a_part_of_a_mix(world, plain, part):
    roots = [str(world.root / "images")]
    one = controlled(world, "", plain, roots, **part)
    json_list(world.root, world.samples[:12])
    second = parquet(world.root, with_bytes(world, copy.deepcopy(world.samples[12:])))
    (world.root / "mix.toml").write_text(MIX.format(second.name))
    found = controlled(world, "", world.root / "mix.toml", roots, **part)
    assert {x.id.partition("/")[2] for x in found.samples} == {x.id for x in one.samples}
    assert found.load_pixels(len(found) - 1) is not None


def test_a_mix_is_no_second_file(world, plain):
    (world.root / "mix.toml").write_text(MIX.format("list.json"))
    with pytest.raises(UserError, match="mix.toml is a mix, expected a single data file"):
        CONTROLS["length-matched"].read_second(world.root / "mix.toml")


def test_the_result_has_no_choice_left(world, plain):
    """Types and a number of samples choose before the control; its text may be of no type."""
    for i, sample in enumerate(world.samples):
        sample["type"] = ("detail", "conv")[i % 2]
    path = json_list(world.root, world.samples)
    data = DataConfig(str(path), types=("conversation",), num_samples=7, max_length=500)
    settings = dict(CONTROLS["length-matched"].settings)
    config = with_data(order(world, "length-matched", data, settings))
    assert len(open_samples(config.data.path, config.data)) == 7 and config.data.types == ()
