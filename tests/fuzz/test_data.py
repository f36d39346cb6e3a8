"""Damaged data files and images: what the check accepts loads and is shown, or has a name."""

import copy
import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mmalign.batch import IGNORE_INDEX
from mmalign.config import DataConfig
from mmalign.data.check import check_samples
from mmalign.data.dataset import ConversationDataset
from mmalign.data.loader import StepLoader
from mmalign.data.preview import show, write_json
from mmalign.data.samples import read_samples
from mmalign.tokenizer import Tokenizer
from tests.data.conftest import IMAGE_SIZE, NUM_PATCHES, VISION
from tests.data.test_archives import write_tar, write_zip
from tests.data.test_same_batches import json_lines, packed, parquet, saved
from tests.fuzz.damage import damaged_bytes, ends_well

pytestmark = pytest.mark.fuzz

DEEP: list = []
for _ in range(50):
    DEEP = [DEEP]
VALUES = [None, True, 0, -1, 10**400, 1e308, float("nan"), "", " ", "\0", "\ud83d", "\u2028", DEEP]
VALUES += ["<image>", "</s>", "<im_patch>", "a boat", "x" * 5000, "../a.png", "/", ".", "human"]
VALUES += ["data:image/png;base64,AAAA", "\x1b[2J", "\u0627\u0301", [], {}, ["a.png"], {"a": 1}]
KEYS = ["id", "image", "type", "conversations", "from", "value", "system", "images", "img_path"]
KEYS += ["messages", "role", "content", "text", "image_url"]
FORMS = ["llava", "llava", "text", "parts"]
TOKENS = [b'"', b"[", b"]", b"{", b"}", b",", b":", b"\\ud800", b"\\", b"\n", b"\0", b"\xff", b"1"]
TOKENS += [b"null", b"NaN", b"[" * 3000, b"9" * 5000, b"\xef\xbb\xbf", b"<image>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of every kind; one more is damaged anew for each input."""
    folder = tmp_path_factory.mktemp("fuzz")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tif"):
        picture.save(folder / f"whole.{suffix}")
    return folder


def damage_an_image(random: Random, folder: Path) -> None:
    """Mostly near its beginning, where the format has its sizes and tables."""
    whole = random.choice(sorted(folder.glob("whole.*"))).read_bytes()
    end = max(1, int(random.random() ** 3 * len(whole)))
    (folder / "damaged.png").write_bytes(damaged_bytes(whole, random, end))


def sample(random: Random, folder: Path, form: str) -> dict:
    turns = []
    for _ in range(random.choice((1, 1, 1, 3))):
        turns += [("human", "what is it"), ("gpt", "a small boat")]
    turns = [{"from": speaker, "value": text} for speaker, text in turns]
    record: dict = {"id": random.choice(["a", 7, "b"]), "conversations": turns}
    if random.random() < 0.7:
        pattern = "whole.*" if random.random() < 0.8 else "*"
        record["image"] = random.choice(sorted(folder.glob(pattern))).name
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return record if form == "llava" else as_messages(random, record, form)


def as_messages(random: Random, record: dict, form: str) -> dict:
    """Of text, or of parts; sometimes after a system turn."""
    system = "look" if form == "text" else [{"type": "text", "text": "look"}]
    messages: list = [{"role": "system", "content": system}] if random.random() < 0.3 else []
    for turn in record.pop("conversations"):
        role = {"human": "user", "gpt": "assistant"}[turn["from"]]
        content = turn["value"]
        if form == "parts":
            texts = content.removeprefix("<image>\n")
            content = [{"type": "image"}] * (texts != content) + [{"type": "text", "text": texts}]
        messages.append({"role": role, "content": content})
    return record | {"messages": messages}


def in_a_container(random: Random, folder: Path, records: list[dict]) -> Path:
    """Damaged or not: gzip, Parquet or a saved dataset."""
    kind = random.choice((packed(json_lines), parquet, saved))
    rows = [record | {"id": str(record["id"])} for record in records]
    for path in (folder / "saved", folder / "rows.parquet"):
        shutil.rmtree(path, ignore_errors=True)
    path = kind(folder, rows)
    file = sorted(path.iterdir())[random.randrange(4)] if path.is_dir() else path
    if random.random() < 0.5:
        file.write_bytes(damaged_bytes(file.read_bytes(), random))
    return path


def in_an_archive(random: Random, folder: Path, target: Path) -> None:
    """The folder's images; damaged mostly in the directory, which a zip has at its end."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    write = random.choice((write_zip, write_tar))
    content = write(target, files).read_bytes()
    if random.random() < 0.7:
        content = damaged_bytes(content[::-1], random, len(content) // 8)[::-1]
    target.write_bytes(content)


def mutate(random: Random, tree: list | dict) -> None:
    """Changes, removes, doubles or adds one entry somewhere in the tree."""
    places, stack = [], [tree]
    while stack:
        parent = stack.pop()
        keys = range(len(parent)) if isinstance(parent, list) else list(parent)
        places += [(parent, key) for key in keys]
        stack += [parent[key] for key in keys if isinstance(parent[key], (list, dict))]
    if not places:
        return
    parent, key = random.choice(places)
    kind = random.randrange(5)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif kind == 2 and isinstance(parent, dict):
        parent[random.choice(KEYS)] = copy.deepcopy(random.choice(VALUES))
    elif kind == 3 and isinstance(parent[key], str):
        at = random.randrange(len(parent[key]) + 1)
        piece = random.choice([x for x in VALUES if isinstance(x, str)])
        parent[key] = parent[key][:at] + piece + parent[key][at:]
    else:
        parent[key] = copy.deepcopy(random.choice(VALUES))


def data_file(random: Random, folder: Path) -> bytes:
    records = [sample(random, folder, random.choice(FORMS)) for _ in range(4)]
    for _ in range(random.choice((0, 1, 1, 2, 5))):
        mutate(random, records)
    try:
        if random.random() < 0.3:
            text = "\n".join(json.dumps(record) for record in records)
        else:
            text = json.dumps(records, indent=random.choice((None, 1)))
    except ValueError:  # 10**400 has more digits than Python writes at some settings
        text = "[]"
    content = bytearray(text.encode())
    for _ in range(random.choice((0, 0, 0, 0, 1, 3))):
        at = random.randrange(len(content) + 1)
        content[at : at + random.choice((0, 0, 1, 20))] = random.choice(TOKENS)
    ends = [len(content)] * 9 + [random.randrange(len(content) + 1)]
    return bytes(content[: random.choice(ends)])


def check(path: Path, folder: Path, tokenizer: Tokenizer, random: Random) -> None:
    """The data check; what it keeps encodes, loads and is shown."""
    data = DataConfig(
        path=str(path),
        image_root=str(folder),
        template=random.choice(("plain", "v0", "v1", "llama_2")),
        text_only=random.random() < 0.2,
        max_length=random.choice((60, 2048, 2048, 2048)),
        on_bad_sample=random.choice(("error", "skip")),
        num_workers=0,
    )
    vision = None if data.text_only else VISION
    dataset = ConversationDataset(read_samples(path, data), tokenizer, data, vision)
    report = check_samples(dataset, progress=False)
    assert len({dataset.samples[i].id for i in report.kept}) == len(report.kept)
    loader = StepLoader(
        dataset,
        report,
        global_batch_size=len(report.kept),
        micro_batch_tokens=4096,
        seed=0,
        num_steps=1,
    )
    [step] = loader
    assert step.num_tokens == sum(len(batch.input_ids) for batch in step.batches)
    for batch in step.batches:
        assert len(batch.image_positions) == NUM_PATCHES * len(batch.pixel_values)
        assert batch.pixel_values.shape[2:] in ((IMAGE_SIZE, IMAGE_SIZE), (0, 0))
        assert int((batch.target_ids != IGNORE_INDEX).sum()) == batch.num_loss_tokens
    with redirect_stdout(io.StringIO()) as printed:
        write_json(dataset)
        show(dataset, 4096, Console(file=io.StringIO()))
    lines = [json.loads(line) for line in printed.getvalue().splitlines()]
    assert len(lines) >= len(report.kept)
    assert all(len(line["input_ids"]) == len(line["labels"]) > 0 for line in lines)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_data_files(folder, tokenizer, tmp_path, seeds):
    path, accepted = tmp_path / "data.json", 0
    for seed in seeds("data files and images"):
        random = Random(seed)
        damage_an_image(random, folder)
        path.write_bytes(data_file(random, folder))
        names = (str(path), "sample ")
        accepted += ends_well(seed, names, check, path, folder, tokenizer, random)
    share = accepted / len(seeds("data files and images"))
    assert 0.25 < share < 0.75  # both ways are tried


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_containers_and_archives(folder, tokenizer, tmp_path, seeds):
    accepted = 0
    for seed in seeds("containers and archives"):
        random = Random(seed)
        damage_an_image(random, folder)
        form = random.choice(FORMS)
        samples = [sample(random, folder, form) for _ in range(14)]
        path = in_a_container(random, tmp_path, samples)
        root = folder
        if random.random() < 0.5:
            root = tmp_path / "archive"
            in_an_archive(random, folder, root)
        names = (str(tmp_path), "sample ")
        accepted += ends_well(seed, names, check, path, root, tokenizer, random)
    assert 0.2 < accepted / len(seeds("containers and archives")) < 0.8
