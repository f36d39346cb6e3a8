"""Reading of data files in LLaVA's format, good and bad."""

import gzip
import json
import os
import tarfile

import pytest

from mmalign.config import DataConfig
from mmalign.data.json_records import MAX_FILE_BYTES
from mmalign.data.samples import Sample, Turn, read_samples
from mmalign.errors import SampleError, UserError

TURNS = [{"from": "human", "value": "what\n<image>"}, {"from": "gpt", "value": "a boat \u2603"}]


def record(sample_id=None, **fields) -> dict:
    known = {} if sample_id is None else {"id": sample_id}
    return {**known, "conversations": TURNS, **fields}


def read(tmp_path, content: str | list, **settings) -> list[Sample]:
    path = tmp_path / "data.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return read_samples(path, DataConfig(**settings))


def test_list_and_lines_give_the_same_samples(tmp_path):
    records = [record("a", image="x.jpg"), record(7, model="extra"), record("c", type="detail")]
    expected = [
        Sample(
            "a", (Turn("human", "what\n<image>"), Turn("gpt", "a boat \u2603")), ("x.jpg",), None
        ),
        Sample("7", (Turn("human", "what\n<image>"), Turn("gpt", "a boat \u2603")), (), None),
        Sample("c", (Turn("human", "what\n<image>"), Turn("gpt", "a boat \u2603")), (), "detail"),
    ]
    lines = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    texts = [json.dumps(records), json.dumps(records, indent=2, ensure_ascii=False)]
    for text in [*texts, " \n" + texts[0] + "\n", "\ufeff" + texts[1], lines, lines + "\n"]:
        samples = read(tmp_path, text)
        assert len(samples) == 3
        assert [samples[0], samples[1], samples[-1]] == expected
        assert list(samples) == samples[:] == expected
    with pytest.raises(IndexError):
        samples[3]


def test_missing_and_repeated_ids_become_positions(tmp_path):
    records = [record("a"), record("a"), record(), record(None), record(0), record("b")]
    names = ["a", "a #1", "#2", "#3", "0", "b"]
    assert [sample.id for sample in read(tmp_path, records)] == names


def test_no_two_samples_have_one_name(tmp_path):
    ids = [3, "3", None, "#2", "3 #1", "a\nb", "\ud83d", "x" * 5000, "", True, 1.5, ["3"], 10**30]
    names = [sample.id for sample in read(tmp_path, [record(x) for x in ids])]
    assert len(set(names)) == len(ids)
    assert all(name.isprintable() and len(name) < 120 for name in names)
    assert names[:6] == ["3", "3 #1", "#2", "#2 #3", "3 #1 #4", "a\\nb #5"]


def test_types_and_number_of_samples(tmp_path):
    kinds = ["conv", "detail", "complex_reasoning", "conversation", None, "reasoning", "detail_23k"]
    records = [record(str(i), type=kind) for i, kind in enumerate(kinds)]

    def ids(**settings) -> str:
        return "".join(sample.id for sample in read(tmp_path, records, **settings))

    assert ids() == "0123456"
    assert ids(types=("conversation",)) == "03"
    assert ids(types=("detail", "reasoning")) == "1256"
    assert ids(types=("complex",)) == "25"
    assert ids(types=("detail", "reasoning"), num_samples=3) == "125"
    assert ids(num_samples=2) == "01"
    with pytest.raises(UserError, match="no samples of type poems.*2 conversation.*1 without type"):
        ids(types=("detail", "poems"))


@pytest.mark.parametrize(
    "text, line, column",
    [
        ('[\n  {"id": "a", "conversations": []},\n  {"id": "b" "conversations": []}\n]', 3, 14),
        ('[\n  {"id": "a", "conversations": []}\n  {"id": "b"}\n]', 3, 3),
        ('[{"id": "a"},\n {"id": "b"', 2, 12),
        ('[{"id": "a"},\n "b"]', 2, 2),
        ('[{"id": "a"}]\n\n]', 3, 1),
        ('[{"id": "a"},\n {"id": "b", "x": ' + "[" * 40 + "]" * 40 + "}]", 2, 2),
        ('[{"id": "a"},\n {"id": "b", "x": ' + "[" * 99999 + "]" * 99999 + "}]", 2, 2),
        ('{"id": "a"}\n{"id": \n{"id": "c"}\n', 2, 8),
        ('{"id": "a"}\n\n{"id": "b"} {"id": "c"}', 3, 13),
        ("<html>\n</html>", 1, 1),
        ('"text"', 1, 1),
        ("[[1, 2]]", 1, 2),
    ],
)
def test_malformed_json_names_line_and_column(tmp_path, text, line, column):
    message = rf"data\.json, line {line}, column {column}: malformed JSON"
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


SAMPLE = json.dumps({"id": "a", "conversations": TURNS}, indent=1)


@pytest.mark.parametrize(
    "text, message",
    [
        (SAMPLE, r"an object on the lines 1 to \d+, expected a list of samples"),
        (f"{SAMPLE}\n{SAMPLE}\n", r"an object on the lines 1 to \d+, expected a list of samples"),
        (f'{{"data": [{SAMPLE}]}}', r"the keys 'data'\), expected a list .* the list under 'data'"),
        ('{"v": 1, "rows": [{"id": "a"}]}\n', r"keys 'v', 'rows'\), .* the list under 'rows'"),
        ('{"a": {"conversations": []}}', r"one object \(with the keys 'a'\), expected a list"),
        ('{"peft_type": "LORA", "r": 8}', r"one object \(with the keys 'peft_type', 'r'\)"),
        ("{}", r"one object \(with the keys \), expected a list"),
    ],
)
def test_other_json_is_called_by_its_name(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    "content, message",
    [
        (gzip.compress(SAMPLE.encode(), mtime=0)[:-9], "is not a complete gzip file"),
        (gzip.compress(b"PAR1....PAR1", mtime=0), "is a Parquet file"),
        (b"PK\3\4....", "is a zip archive"),
        (b"GGUF\3\0\0\0", "is GGUF weights"),
        (tarfile.TarInfo("a.json").tobuf(), "is a tar archive, .* Unpack it first"),
        (b"\xff\xff\xff\xff\x10\1\0\0", "is an Arrow file, .* Name the folder"),
        (b'\x02\1\0\0\0\0\0\0{"a.weight":{}}', "is a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid ...", "is a Git LFS pointer"),
        (gzip.compress(gzip.compress(b"[]", mtime=0), mtime=0), "is compressed with gzip twice"),
        (SAMPLE.encode("utf-32"), "is UTF-32 text, .* iconv -f UTF-32"),
        (SAMPLE.encode("utf-16"), "is UTF-16 text, .* iconv -f UTF-16 -t UTF-8"),
        (SAMPLE.encode("utf-16-be"), "is UTF-16 text, .* iconv -f UTF-16BE"),
        (f"[{SAMPLE}]".encode("utf-16-le"), "is UTF-16 text, .* iconv -f UTF-16LE"),
    ],
)
def test_other_formats_are_called_by_their_names(tmp_path, content, message):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(UserError, match=f"data.json {message}"):
        read_samples(tmp_path / "data.json", DataConfig())


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # nobody writes to it
    with pytest.raises(UserError, match="fifo is a FIFO, expected a regular file"):
        read_samples(tmp_path / "fifo", DataConfig())
    with pytest.raises(UserError, match="is a folder, expected a JSON file, or a folder with Parq"):
        read_samples(tmp_path, DataConfig())
    with open(tmp_path / "hole.json", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # takes no space on the disk
    with pytest.raises(UserError, match="hole.json has 4,294,967,297 bytes"):
        read_samples(tmp_path / "hole.json", DataConfig())


def test_numbers_that_nobody_reads_may_be_long(tmp_path):
    text = json.dumps([record("a")]).replace('"id"', f'"huge": {"7" * 5000}, "id"')
    samples = read(tmp_path, text)
    assert samples[0].id == "a" and samples.unused == {"huge": 1}
    assert len(read(tmp_path, text.replace('"a"', "7" * 5000))[0].id) < 120


@pytest.mark.parametrize("key", ["conversations", "value"])
def test_a_key_that_stands_twice_names_the_sample(tmp_path, key):
    text = json.dumps([record("a", meta={"x": 1})])
    text = text.replace('"x": 1', '"x": 1, "x": 2')  # nobody reads it
    assert read(tmp_path, text)[0].id == "a"
    text = text.replace(f'"{key}"', f'"{key}": [], "{key}"', 1)
    with pytest.raises(SampleError, match=f"sample 'a': the key {key!r} stands twice"):
        read(tmp_path, text)[0]


def test_fields_that_nothing_reads_are_counted(tmp_path):
    turns = [TURNS[0] | {"weight": 0}, TURNS[1] | {"weight": 1}]
    records = [record("a", model="x"), record("b", model="y", type="detail")]
    records.append({"id": "c", "conversations": turns})
    assert read(tmp_path, records).unused == {"model": 2, "conversations.weight": 2}


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="cannot read the data file .*absent.json"):
        read_samples(tmp_path / "absent.json", DataConfig())
    (tmp_path / "latin.json").write_bytes(b'[{"id": "a"},\n{"id": "\xe9"}]')
    with pytest.raises(UserError, match="latin.json, line 2: not UTF-8"):
        read_samples(tmp_path / "latin.json", DataConfig())
    for text in ("[]", "", "\n"):
        with pytest.raises(UserError, match="contains no samples"):
            read(tmp_path, text)


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({"conversations": None}, "conversations are NoneType"),
        ({"conversations": ["hello"]}, "a turn is not an object"),
        ({"conversations": [{"from": "human"}]}, "value of turn 1 is NoneType, expected text"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "value of turn 1 is int, expected"),
        ({"image": {"bytes": "aGVsbG8="}}, "expected a path or a list of paths"),
        ({"image": ["a.jpg", ""]}, "expected a path or a list of paths"),
        ({"system": ["Answer in French."]}, "its field 'system' is list, expected text"),
        ({"system": "Be brief.", "system_prompt": "Be kind."}, "several system prompts"),
        ({"image": "\ud83d.jpg"}, "not Unicode: half of a surrogate pair"),
        ({"conversations": [{"from": "human", "value": "\ude00"}]}, "not Unicode: half of a"),
    ],
)
def test_malformed_samples_name_their_id_when_they_are_used(tmp_path, fields, problem):
    samples = read(tmp_path, [record("good"), {**record("bad"), **fields}])
    assert samples[0].id == "good"
    with pytest.raises(SampleError, match=f"sample 'bad': .*{problem}"):
        samples[1]


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"images": ["a.jpg"]}, None),  # in place of `image`
        ({"image_path": "a.jpg"}, "image_path"),
        ({"image": "a.jpg", "images": ["a.jpg", "b.jpg"]}, "images"),
        ({"image": "a.jpg", "video": "b.mp4"}, "video"),
        ({"img": {"bytes": "aGVsbG8="}}, "img"),
        ({"source": "coco/a.png"}, "source"),
        ({"picture": "data:image/png;base64,AAAA"}, "picture"),
        ({"conversations": [TURNS[0] | {"image": "a.jpg"}, TURNS[1]]}, "image"),
        ({"image": "coco/a.jpg", "image_path": "/data/coco/a.jpg"}, None),  # the same picture
        ({"images": [], "image_path": None, "image_id": "000001", "image_width": 640}, None),
        ({"has_image": True, "source": "coco", "note": "as in the picture"}, None),
    ],
)
def test_a_picture_in_another_field_is_found(tmp_path, fields, expected):
    assert read(tmp_path, [{**record("a"), **fields}])[0].other_image == expected
