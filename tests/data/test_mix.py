"""Mixes of data files: what is drawn, how often, and what a mix may not say."""

import copy
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmalign.config import DataConfig
from mmalign.data.check import check_samples
from mmalign.data.dataset import ConversationDataset
from mmalign.data.mix import data_files, has_tables, open_samples, picture_tables
from mmalign.errors import SampleError, UserError
from tests.data.conftest import VISION
from tests.data.test_same_batches import parquet, with_bytes

TURNS = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a boat"}]


def write(folder: Path, text: str, **sizes: int) -> Path:
    """mix.toml, and files of so many samples, whose ids are numbers."""
    for name, size in sizes.items():
        records = [{"id": i, "conversations": TURNS} for i in range(size)]
        (folder / f"{name}.json").write_text(json.dumps(records))
    (folder / "mix.toml").write_text(text)
    return folder / "mix.toml"


def epoch(samples) -> Counter:
    """How often each name is in an epoch where all samples are usable."""
    rows = samples.epoch(np.arange(len(samples)))
    assert (np.diff(rows) >= 0).all()
    return Counter(samples[int(i)].id for i in rows)


BOTH = """
[files.a]
path = "a.json"
weight = {}
[files.b]
path = "b.json"
samples = {}
"""


def test_weights_and_caps(tmp_path):
    for weight, expected in ((1, 40), (2, 80), (0.25, 10), (2.5, 100), (0, 0)):
        samples = open_samples(write(tmp_path, BOTH.format(weight, 7), a=40, b=30), DataConfig())
        assert len(samples) == 47 and len({sample.id for sample in samples}) == 47
        found = epoch(samples)
        of_a = [count for name, count in found.items() if name.startswith("a/")]
        assert sum(of_a) == expected and set(of_a) <= {int(weight), int(weight) + 1}
        assert [count for name, count in found.items() if name.startswith("b/")] == [1] * 7
        rows = [list(x.values())[2:] for x in samples.summary(np.arange(47))]
        assert rows == [[weight, 40, 40, 40, expected], [1, 30, 7, 7, 7]]
        assert samples.forms == {"LLaVA": 47}
    samples = open_samples(write(tmp_path, BOTH.format(1, 99)), DataConfig())
    assert len(samples) == 70  # a cap above the size of the file


def test_what_is_drawn_depends_on_the_seed_and_the_name_alone(tmp_path):
    def drawn(text: str) -> set[str]:
        return set(epoch(open_samples(write(tmp_path, text), DataConfig())))

    write(tmp_path, "", a=40, b=30)
    text = BOTH.format(0.5, 7)
    first = drawn(text)
    assert drawn(text) == first != drawn("seed = 1\n" + text)
    part = drawn('[files.b]\npath = "b.json"\nsamples = 7')
    assert part == {name for name in first if name.startswith("b/")}
    assert {int(name[2:]) for name in part} != set(range(7))


def test_samples_that_are_left_out_have_no_weight(world):
    """The share is one of what is usable, and repeated samples stay in order."""
    world.samples[3]["conversations"] = []
    world.dataset()
    path = write(world.root, '[files.x]\npath = "data.json"\nweight = 1.5')
    data = DataConfig(str(path), str(world.root / "images"), on_bad_sample="skip")
    dataset = ConversationDataset.open(data, world.tokenizer.path, VISION)
    report = check_samples(dataset, num_workers=0, progress=False)
    assert [error.sample_id for error in report.skipped] == ["x/sample-3"]
    kept = report.kept[dataset.samples.epoch(report.kept)]
    assert len(kept) == 19 + round(19 / 2) and 3 not in kept and set(kept) == set(report.kept)


def test_the_samples_are_those_of_the_files(world):
    """Of any form, with pictures inside or not, and bad ones by their names."""
    world.dataset()
    world.samples[0]["conversations"] = 3
    parquet(world.root, with_bytes(world, [dict(x) for x in world.samples[1:]]))
    text = '[files.loose]\npath = "data.json"\n[files.inside]\npath = "rows.parquet"'
    path = write(world.root, text)
    data = DataConfig(str(path), str(world.root / "images"))
    dataset = ConversationDataset.open(data, world.tokenizer.path, VISION)
    assert len(dataset) == 39 and dataset.samples.forms == {"LLaVA": 39}
    for i in range(1, 20):
        ours, theirs = dataset.encode(i), dataset.encode(i + 19)
        assert (ours.id, theirs.id) == (f"loose/sample-{i}", f"inside/sample-{i}")
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
        pixels = dataset.load_pixels(i), dataset.load_pixels(i + 19)
        assert pixels[0] is pixels[1] is None or (pixels[0] == pixels[1]).all()
    world.samples[1]["conversations"] = 3
    world.dataset()
    with pytest.raises(SampleError, match="sample 'loose/sample-1': its conversations are int"):
        ConversationDataset.open(data, world.tokenizer.path, VISION).encode(1)
    names = [name for name, _ in data_files(path)]
    assert names == ["", "loose/", "inside/"]


def test_everything_counts_in_the_fingerprint(tmp_path):
    def fingerprint(text: str) -> str:
        return open_samples(write(tmp_path, text), DataConfig()).fingerprint

    write(tmp_path, "", a=4, b=3)
    text = BOTH.format(1, 2)
    first = fingerprint(text)
    assert fingerprint("# a comment\n" + text) == first
    others = [
        "seed = 2\n" + text,
        BOTH.format(1.5, 2),
        BOTH.format(1, 3),
        text.replace("s.b", "s.c"),
    ]
    assert first not in {fingerprint(other) for other in others}
    write(tmp_path, "", a=5)
    assert fingerprint(text) != first


@pytest.mark.parametrize(
    "text, problem",
    [
        ("files = [", "mix.toml: not TOML"),
        ("", "no files. Write a table"),
        ("file.a.path = 'a.json'", "unknown key 'file'; known are seed and files"),
        ("files = 3", "files is 3; expected an object"),
        ("files.a = 3", "files.a is 3; expected an object"),
        ("[files.a]", "files.a.path is None; expected the path of a data file"),
        ("[files.a]\npath = 3", "files.a.path is 3; expected the path"),
        (
            "[files.a]\npath = 'a.json'\nwieght = 2",
            "unknown key files.a.wieght; known are path, samp",
        ),
        (
            "[files.a]\npath = 'a.json'\nweight = -1",
            "files.a.weight is -1; expected a number from 0",
        ),
        ("[files.a]\npath = 'a.json'\nweight = nan", "files.a.weight is nan; expected a number"),
        ("[files.a]\npath = 'a.json'\nsamples = 0", "files.a.samples is 0; expected an integer"),
        (
            "[files.a]\npath = 'a.json'\nsamples = 1.5",
            "files.a.samples is 1.5; expected an integer",
        ),
        ("[files.'a/b']\npath = 'a.json'", "expected a name of letters, digits"),
        ("[files.a]\npath = 'mix.toml'", "expected a data file, not another mix"),
        ("[files.a]\npath = 'absent.json'", "cannot read the data file .*absent.json"),
        ("seed = -1\n[files.a]\npath = 'a.json'", "seed is -1; expected an integer"),
    ],
)
def test_what_a_mix_may_not_say(tmp_path, text, problem):
    path = write(tmp_path, text, a=3)
    with pytest.raises(UserError, match=problem):
        open_samples(path, DataConfig())


def test_weights_that_leave_nothing(tmp_path):
    problems = {
        0.1: "none of the 3 usable samples of files.a with weight 0.1",
        0: "leave no sample",
    }
    for weight, problem in problems.items():
        path = write(tmp_path, f"[files.a]\npath = 'a.json'\nweight = {weight}", a=3)
        with pytest.raises(UserError, match=problem):
            epoch(open_samples(path, DataConfig()))
    with pytest.raises(UserError, match="--data.num-samples does not say of which file"):
        open_samples(path, DataConfig(num_samples=2))


def test_two_tables_of_one_name(world):
    """As save_to_disk writes them: the name of the file in the mix stands before their pictures."""
    records = with_bytes(world, copy.deepcopy(world.samples))
    for name, chosen in (("a", records), ("b", records[::-1])):
        (world.root / name).mkdir()
        parquet(world.root / name, chosen)
    text = '[files.a]\npath = "a/rows.parquet"\n[files.b]\npath = "b/rows.parquet"'
    data = DataConfig(str(write(world.root, text)))
    dataset = ConversationDataset.open(data, world.tokenizer.path, VISION)
    assert dataset.samples[1].images == ("a/rows.parquet#1/image",)
    assert picture_tables(Path(data.path)) == {
        f"{x}/rows.parquet": world.root / x / "rows.parquet" for x in "ab"
    }
    world.dataset()  # data.json, which has none
    loose = write(world.root, '[files.a]\npath = "data.json"')
    paths = {"a/rows.parquet": True, "data.json": False, "absent.toml": False}
    assert not has_tables(loose)
    assert {x: has_tables(world.root / x) for x in paths} == paths
    for i in range(20):
        ours, theirs = dataset.load_pixels(i), dataset.load_pixels(39 - i)
        assert ours is theirs is None or (ours == theirs).all()
