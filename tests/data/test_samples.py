"""Reading of data files in LLaVA's format, good and bad."""

import json

import pytest

from mmalign.config import DataConfig
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
        Sample("a", (Turn("human", "what\n<image>"), Turn("gpt", "a boat \u2603")), "x.jpg", None),
        Sample("7", (Turn("human", "what\n<image>"), Turn("gpt", "a boat \u2603")), None, None),
        Sample("c", (Turn("human", "what\n<image>"), Turn("gpt", "a boat \u2603")), None, "detail"),
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
    assert [sample.id for sample in read(tmp_path, records)] == ["a", "1", "2", "3", "0", "b"]


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
    with pytest.raises(UserError, match="--data.num-samples is 0"):
        ids(num_samples=0)


@pytest.mark.parametrize(
    "text, line, column",
    [
        ('[\n  {"id": "a", "conversations": []},\n  {"id": "b" "conversations": []}\n]', 3, 14),
        ('[\n  {"id": "a", "conversations": []}\n  {"id": "b"}\n]', 3, 3),
        ('[{"id": "a"},\n {"id": "b"', 2, 12),
        ('[{"id": "a"},\n "b"]', 2, 2),
        ('[{"id": "a"}]\n\n]', 3, 1),
        ('{"id": "a"}\n{"id": \n{"id": "c"}\n', 2, 8),
        ('{"id": "a"}\n\n{"id": "b"} {"id": "c"}', 3, 13),
        ("<html>\n</html>", 1, 1),
    ],
)
def test_malformed_json_names_line_and_column(tmp_path, text, line, column):
    message = rf"data\.json, line {line}, column {column}: malformed JSON"
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


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
        ({"conversations": [{"from": "human"}]}, "a turn lacks the text"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "a turn lacks the text"),
        ({"image": ["a.jpg", "b.jpg"]}, "expected one path"),
        ({"image": ""}, "expected one path"),
    ],
)
def test_malformed_samples_name_their_id_when_they_are_used(tmp_path, fields, problem):
    samples = read(tmp_path, [record("good"), {**record("bad"), **fields}])
    assert samples[0].id == "good"
    with pytest.raises(SampleError, match=f"sample 'bad': .*{problem}"):
        samples[1]
