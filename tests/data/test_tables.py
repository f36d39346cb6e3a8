"""Parquet files and saved datasets that are damaged, or of no use here."""

import copy
import datetime
import json
import multiprocessing
import os
import pickle
import signal
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.config import DataConfig
from mmalign.data import table, tables
from mmalign.data.check import check_samples
from mmalign.data.dataset import ConversationDataset
from mmalign.data.parquet_footer import sizes_of_row_groups
from mmalign.data.samples import read_samples
from mmalign.errors import SampleError, UserError
from tests.data.conftest import VISION, World
from tests.data.test_archives import contents
from tests.data.test_same_batches import parquet, saved, shards, table_of, with_bytes


def dataset(world: World, path, roots="", **settings) -> ConversationDataset:
    data = DataConfig(path=str(path), image_root=roots, **settings)
    return ConversationDataset(read_samples(path, data), world.tokenizer, data, VISION)


def rows(world: World) -> list[dict]:
    return with_bytes(world, copy.deepcopy(world.samples))


def load_in_a_process(of: ConversationDataset, order: list[int], connection) -> None:
    connection.send([of.load_pixels(i).numpy().tobytes() for i in order])


@pytest.mark.parametrize("container", [parquet, shards, saved])
def test_processes_read_one_table_at_once(world, container):
    of = dataset(world, container(world.root, rows(world)))
    order = [i for i in range(20) if i % 4]
    expected = {i: of.load_pixels(i).numpy().tobytes() for i in order}  # opened before the fork
    started = []
    for seed in range(3):
        mixed = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(
            target=load_in_a_process, args=(of, mixed, theirs)
        )
        process.start()
        started.append((process, mixed, ours))
    for process, mixed, connection in started:
        assert connection.recv() == [expected[i] for i in mixed]
        process.join()
    again = pickle.loads(pickle.dumps(of.samples.tables))
    assert again.keys() == of.samples.tables.keys()


@pytest.mark.parametrize("statistics", [True, False])
def test_rows_with_bytes_and_rows_with_paths(world, statistics):
    """In one row group, whatever its statistics say."""
    records = rows(world)
    for record in records[:10]:
        if "image" in record:
            record["image"]["bytes"] = None
    path = world.root / "rows.parquet"
    pq.write_table(table_of(records), path, write_statistics=statistics)
    of = dataset(world, path, str(world.root / "images"))
    names = [of.samples[i].images for i in range(20)]
    expected = [f"{i}.png" if i < 10 else f"rows.parquet#{i}/image" for i in range(20)]
    assert names == [(name,) if i % 4 else () for i, name in enumerate(expected)]
    loose = world.dataset()
    assert all((of.load_pixels(i) == loose.load_pixels(i)).all() for i in range(20) if i % 4)


def test_a_picture_that_is_none_names_the_sample(world):
    records = rows(world)
    records[5]["image"]["bytes"] = b"text"
    for container in (parquet, saved):
        of = dataset(world, container(world.root, records), on_bad_sample="skip")
        [error] = check_samples(of, num_workers=0, progress=False).skipped
        assert error.sample_id == "sample-5" and "#5/image cannot be decoded" in str(error)


def test_a_column_of_bytes_that_is_not_image_is_a_picture_that_nobody_reads(world):
    records = [record | {"thumbnail": b"png"} for record in world.samples]
    of = dataset(world, parquet(world.root, records), str(world.root / "images"))
    with pytest.raises(SampleError, match="its field 'thumbnail' holds a picture"):
        of.encode(1)


def test_row_groups_are_bounded(world, monkeypatch):
    of = dataset(world, parquet(world.root, rows(world)))
    monkeypatch.setattr(table, "MAX_GROUP_BYTES", 1000)
    with pytest.raises(SampleError, match=r"sample 'sample-1': .*row group 0 unpacks to \d+,\d+ b"):
        of.load_pixels(1)
    monkeypatch.setattr(table, "_MAX_TEXT_BYTES", 1000)
    with pytest.raises(UserError, match="rows.parquet: row group 0 unpacks to .* such as 100 rows"):
        dataset(world, world.root / "rows.parquet")


@pytest.mark.parametrize("cut", [1, 100, 2000])
def test_truncated_tables_are_named(world, cut):
    for container in (parquet, saved):
        path = container(world.root, rows(world))
        file = next(iter(path.glob("*.arrow"))) if path.is_dir() else path
        content = file.read_bytes()
        file.write_bytes(content[: -cut if cut > 1 or not path.is_dir() else -12])
        with pytest.raises(UserError, match=f"cannot read the data file .*{file.name} "):
            list(dataset(world, path))


def test_a_footer_that_would_end_the_process(tmp_path, monkeypatch):
    """As C++ does over an exception that pyarrow does not catch."""
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": ["a"]}), path)
    metadata = SimpleNamespace(
        num_row_groups=1, row_group=lambda _: os.kill(os.getpid(), signal.SIGKILL)
    )
    with pytest.raises(pa.ArrowInvalid, match="its footer is damaged"):
        sizes_of_row_groups(metadata)
    monkeypatch.setattr(table, "sizes_of_row_groups", lambda _: sizes_of_row_groups(metadata))
    with pytest.raises(UserError, match="cannot read the data file .*rows.parquet .its footer is"):
        read_samples(path, DataConfig())


def test_row_groups_that_do_not_add_up(tmp_path):
    """pyarrow reads as many rows as they say."""
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": ["a"] * 119}), path, row_group_size=100)
    content = path.read_bytes()
    place = content.rindex(b"\x16\x26")  # 19 rows of the last, as Thrift writes them
    path.write_bytes(content[:place] + b"\x16\x24" + content[place + 2 :])
    assert pq.read_table(path).num_rows == 118
    with pytest.raises(UserError, match="its row groups have 118 rows, the file 119"):
        read_samples(path, DataConfig())


def test_damaged_bytes_end_in_an_error_or_in_samples(world):
    """Never in a crash: offsets are checked before they are followed."""
    rng = np.random.default_rng(0)
    for container in (parquet, saved):
        path = container(world.root, rows(world))
        file = sorted(path.glob("*.arrow"))[0] if path.is_dir() else path
        content = file.read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            for place in rng.integers(0, len(content), 3):
                damaged[place] = rng.integers(256)
            file.write_bytes(damaged)
            try:
                of = dataset(world, path, on_bad_sample="skip")
                check_samples(of, num_workers=0, progress=False)
            except UserError as error:
                assert len(str(error)) < 2000


def test_folders_that_are_no_data_set(world):
    folder = saved(world.root, world.samples)
    state = json.loads((folder / "state.json").read_text())
    for change, problem in (
        ({"_data_files": [{"filename": "../list.json"}]}, "'../list.json' is no name of a file"),
        ({"_data_files": [{"filename": "absent.arrow"}]}, "cannot read .*absent.arrow"),
        ({"_data_files": 3}, "no list _data_files of filenames"),
        ({"_data_files": []}, "contains no samples"),
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, r"flatten_indices\(\)"),
    ):
        (folder / "state.json").write_text(json.dumps(state | change))
        with pytest.raises(UserError, match=problem):
            read_samples(folder, DataConfig())
    (folder.parent / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match="the splits of a dataset. Name one of them: .*saved"):
        read_samples(folder.parent, DataConfig())
    (folder.parent / "dataset_dict.json").unlink()
    folder = shards(world.root, world.samples)
    with pytest.raises(UserError, match="Name the folder of its files: .*shards"):
        read_samples(folder.parent, DataConfig())
    (folder / "train-00002-of-00003.parquet").rename(folder / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match="files of several splits: test, train"):
        read_samples(folder, DataConfig())
    (folder / "test-00000-of-00001.parquet").rename(folder / "more.parquet")
    with pytest.raises(UserError, match="files of several splits: train, more"):
        read_samples(folder, DataConfig())
    (folder / "more.parquet").unlink()
    with pytest.raises(UserError, match="has 2 of 3 files"):
        read_samples(folder, DataConfig())


KINDS = {
    "large": pa.large_binary(),
    "view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.binary()),
    "list": pa.list_(pa.binary()),
    "large list": pa.large_list(pa.large_binary()),
    "fixed list": pa.list_(pa.binary(), 1),
    "struct": pa.struct([("bytes", pa.large_binary())]),
    "list of structs": pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_type_that_holds_bytes(world, kind):
    content = contents(world)["1.png"]
    value = {"bytes": content} if "struct" in str(kind) else content
    value = [value] if "list" in str(kind) else value
    turns = pa.array([world.samples[1]["conversations"]] * 2)
    path = world.root / "rows.parquet"
    columns = {"conversations": turns, "image": pa.array([value, value], kind)}
    pq.write_table(pa.table(columns), path)
    of = dataset(world, path)
    assert (of.load_pixels(1) == world.dataset().load_pixels(1)).all()


def test_bytes_within_messages_are_no_text(world):
    """They would be pages of it."""
    part = {"type": "image", "image": {"bytes": contents(world)["1.png"]}}
    turns = [{"role": "user", "content": [part]}]
    of = dataset(world, parquet(world.root, [{"messages": turns}]), str(world.root / "images"))
    with pytest.raises(SampleError, match=r"sample '#0': its image is .*<[\d,]+ bytes>"):
        of.encode(0)


@pytest.mark.parametrize(
    "record, problem",
    [
        ({"instruction": b"what", "output": "a boat"}, "its instruction is dict, expected text"),
        (
            {"messages": [{"role": "user", "content": b"what"}]},
            "content of message 1 is dict, expected text",
        ),
        (
            {"conversations": [{"from": "human", "value": datetime.date(2026, 1, 2)}]},
            "value of turn 1 is dict, expected text",
        ),
    ],
)
def test_what_is_no_text_is_not_trained_on_as_text(world, record, problem):
    of = dataset(world, parquet(world.root, [record]), str(world.root / "images"))
    with pytest.raises(SampleError, match=problem):
        of.encode(0)


def test_two_columns_of_one_name(world):
    path = world.root / "rows.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["id", "id"]), path)
    with pytest.raises(UserError, match="several columns of the name 'id'"):
        read_samples(path, DataConfig())


def test_both_formats_of_arrow(world):
    folder = saved(world.root, world.samples)
    streamed = read_samples(folder, DataConfig())[:]
    for path in folder.glob("*.arrow"):
        table = pa.ipc.open_stream(path.read_bytes()).read_all()
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    assert read_samples(folder, DataConfig())[:] == streamed


def test_a_stream_of_arrow_that_ends_between_two_parts(world):
    """pyarrow takes what is there for all of it."""
    path = saved(world.root, world.samples) / "data-00001-of-00002.arrow"
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    assert pa.ipc.open_stream(content[:-8]).read_all().num_rows == 9
    with pytest.raises(UserError, match="00001-of-00002.arrow .it has no end mark, so rows may be"):
        read_samples(path.parent, DataConfig())


def test_rows_of_several_pictures_and_of_none(world):
    files = contents(world)
    pictures = [{"bytes": files["1.png"], "path": None}, {"bytes": files["2.png"], "path": None}]
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a boat"}]
    records = [{"id": str(i), "images": pictures[:i], "conversations": turns} for i in range(3)]
    path = parquet(world.root, records)
    found = [record for _, record in tables.read_tables(path)[2]]
    names = [f"rows.parquet#2/images/{i}" for i in range(2)]
    assert [x["images"] for x in found] == [[], ["rows.parquet#1/images/0"], names]
    found = tables.read_tables(path)[3]["rows.parquet"]
    places = [f"2/images/{i}" for i in range(2)]
    assert [found.find(place).read() for place in places] == [x["bytes"] for x in pictures]
    assert names == [str(found.find(place)) for place in places]
    for place in ("9/images/0", "1/images/5", "0/images/0"):
        with pytest.raises(UserError, match="cannot read the data file"):
            found.find(place).read()
    assert found.find("1/id") is found.find("#1/images/0") is None
