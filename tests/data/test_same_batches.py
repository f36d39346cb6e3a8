"""The same conversations in every form, container and place of their pictures: the same batches."""

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmalign.config import DataConfig
from mmalign.data.dataset import ConversationDataset
from mmalign.data.packing import pack_samples
from mmalign.data.samples import SampleFile, read_samples
from tests.data.conftest import VISION, World
from tests.data.test_archives import contents, write_tar, write_zip

NAMES = {"human": "user", "gpt": "assistant", "system": "system"}
SYSTEM = "it looks at the small boat"


def with_system(samples: list[dict]) -> list[dict]:
    """Every third has a system turn."""
    for sample in samples[::3]:
        sample["conversations"].insert(0, {"from": "system", "value": SYSTEM})
    return samples


# ---- forms: a record of LLaVA's form -> one of another form ----


def llava(sample: dict) -> dict:
    return sample


def sharegpt(sample: dict) -> dict:
    turns = [{"from": NAMES[t["from"]], "value": t["value"]} for t in sample["conversations"]]
    return sample | {"conversations": turns}


def system_field(sample: dict) -> dict:
    first, *rest = sample["conversations"]
    if first["from"] != "system":
        return sample
    return sample | {"conversations": rest, "system": first["value"]}


def images_field(sample: dict) -> dict:
    rest = {key: x for key, x in sample.items() if key != "image"}
    return rest | {"images": [sample["image"]] if "image" in sample else []}


def images_path(sample: dict) -> dict:
    rest = {key: x for key, x in sample.items() if key != "image"}
    return rest | ({"images": sample["image"]} if "image" in sample else {})


def messages(sample: dict) -> dict:
    turns = [{"role": NAMES[t["from"]], "content": t["value"]} for t in sample["conversations"]]
    return {k: x for k, x in sample.items() if k != "conversations"} | {"messages": turns}


def parts(sample: dict) -> dict:
    """Contents as lists; the picture is named where it stands."""
    record = messages(sample)
    picture = {"type": "image", "image": record.pop("image", None)}
    for message in record["messages"]:
        before, mark, after = message["content"].partition("<image>\n")
        text = {"type": "text", "text": after if mark else before}
        message["content"] = [picture, text] if mark else [text]
    return record


def nulls(sample: dict) -> dict:
    """As programs write that have every field in every record."""
    return dict.fromkeys(("image", "images", "messages", "system", "input")) | sample


FORMS = [llava, sharegpt, system_field, images_field, images_path, messages, parts, nulls]

# ---- containers: records -> a file or folder ----


def json_list(root: Path, records: list[dict]) -> Path:
    (root / "list.json").write_text(json.dumps(records, indent=1))
    return root / "list.json"


def json_lines(root: Path, records: list[dict]) -> Path:
    (root / "lines.jsonl").write_text("\n".join(map(json.dumps, records)))
    return root / "lines.jsonl"


def packed(container: Callable) -> Callable:
    def write(root: Path, records: list[dict]) -> Path:
        path = root / "packed.json.gz"
        path.write_bytes(gzip.compress(container(root, records).read_bytes()))
        return path

    return write


def table_of(records: list[dict]) -> pa.Table:
    """With a column for the keys of any record."""
    names = dict.fromkeys(name for record in records for name in record)
    return pa.Table.from_pylist([{name: x.get(name) for name in names} for x in records])


def parquet(root: Path, records: list[dict]) -> Path:
    pq.write_table(table_of(records), root / "rows.parquet", row_group_size=7)
    return root / "rows.parquet"


def shards(root: Path, records: list[dict]) -> Path:
    (root / "shards").mkdir()
    table = table_of(records)
    for number in range(3):
        path = root / "shards" / f"train-0000{number}-of-00003.parquet"
        pq.write_table(table.slice(7 * number, 7), path)
    return root / "shards"


def saved(root: Path, records: list[dict]) -> Path:
    """As Dataset.save_to_disk writes it: streams of Arrow, and state.json beside them."""
    folder, table = root / "saved", table_of(records)
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for number, name in enumerate(names):
        with pa.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table.slice(11 * number, 11), max_chunksize=4)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


CONTAINERS = [json_list, json_lines, packed(json_list), packed(json_lines), parquet, shards, saved]

# ---- pictures: where they are ----


def with_bytes(world: World, records: list[dict]) -> list[dict]:
    """In the rows, as the Image feature of Hugging Face has them."""
    files = contents(world)
    for record in records:
        if "image" in record:
            record["image"] = {"bytes": files[record["image"]], "path": record["image"]}
    return records


def loose(world: World) -> str:
    return str(world.root / "images")


def in_zip(world: World) -> str:
    return str(write_zip(world.root / "images.zip", contents(world)))


def in_folder_of_zip(world: World) -> str:
    files = {f"train2017/{name}": content for name, content in contents(world).items()}
    return str(write_zip(world.root / "nested.zip", files))


def in_tar(world: World) -> str:
    return str(write_tar(world.root / "images.tar", contents(world)))


def in_two(world: World) -> tuple[str, str]:
    files = sorted(contents(world).items())
    return (
        str(write_zip(world.root / "first.zip", dict(files[:6]))),
        str(write_tar(world.root / "second.tar", dict(files[6:]))),
    )


PLACES = [loose, in_zip, in_folder_of_zip, in_tar, in_two]

CASES = (
    [(form, json_list, loose) for form in FORMS]
    + [(llava, container, loose) for container in CONTAINERS]
    + [(llava, json_list, place) for place in PLACES]
    + [(messages, parquet, in_zip), (parts, saved, in_tar), (sharegpt, shards, in_two)]
    + [(form, container, None) for form in (llava, sharegpt) for container in CONTAINERS[4:]]
)


def batch_of(world: World, path: Path, roots) -> tuple[dict[str, torch.Tensor], SampleFile]:
    data = DataConfig(path=str(path), image_root=roots, template="v1")
    samples = read_samples(path, data)
    dataset = ConversationDataset(samples, world.tokenizer, data, VISION)
    encoded = [dataset.encode(i) for i in range(len(dataset))]
    pixels = [dataset.load_pixels(i) for i in range(len(dataset))]
    assert [sample.id for sample in encoded] == [sample["id"] for sample in world.samples]
    return vars(pack_samples(encoded, pixels, world.tokenizer.image_token_id)), samples


@pytest.mark.parametrize("form, container, place", CASES)
def test_the_same_batches(world, form, container, place):
    """place None: the pictures are in the rows."""
    samples = with_system(world.samples)
    expected, _ = batch_of(world, json_list(world.root, samples), loose(world))
    records = [form(copy.deepcopy(sample)) for sample in samples]
    if place is None:
        records = with_bytes(world, records)
    found, read = batch_of(world, container(world.root, records), place(world) if place else "")
    assert expected["pixel_values"].shape[0] == 15 and expected.keys() == found.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value
        assert same, name
    names = {sharegpt: "ShareGPT", messages: "messages", parts: "messages"}
    assert read.forms == {names.get(form, "LLaVA"): 20} and not read.unused


@pytest.mark.parametrize(
    "container, expected",
    [
        (json_list, "a JSON list"),
        (packed(json_lines), "JSON lines in gzip"),
        (parquet, "Parquet"),
        (shards, "Parquet, 3 files"),
        (saved, "a saved dataset, 2 files"),
    ],
)
def test_containers_have_names(world, container, expected):
    path = container(world.root, world.samples)
    assert read_samples(path, DataConfig()).container == expected
