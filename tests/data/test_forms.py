"""What follows one of the forms, and what follows none; test_same_batches.py compares them."""

import pytest

from mmalign.data.forms import as_llava, form_of
from mmalign.errors import SampleError
from tests.data.test_same_batches import SYSTEM


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"conversations": [{"from": "human", "value": "a"}]}, "LLaVA"),
        ({"conversations": [{"from": "user", "value": "a"}]}, "ShareGPT"),
        ({"conversations": [{"from": "user"}, {"from": "stranger"}]}, "ShareGPT"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "messages"),
        ({"conversations": [{"from": "stranger", "value": "a"}]}, "LLaVA"),
        ({"conversations": 3}, "LLaVA"),
        ({"messages": ["a"]}, "LLaVA"),
    ],
)
def test_the_form_is_told_by_its_structure(record, expected):
    assert form_of(record) == expected


def test_an_image_stands_on_a_line_of_its_own():
    image = {"type": "image"}
    texts = [{"type": "text", "text": text} for text in ("Compare", "with", "this.\n")]
    content = [texts[0], image, texts[1], texts[1], image, image, texts[2], image]
    [turn] = as_llava({"messages": [{"role": "user", "content": content}]})["conversations"]
    assert turn["value"] == "Compare\n<image>\nwithwith\n<image>\n<image>\nthis.\n<image>"


def test_alpacas_form(world):
    """A conversation of one turn, with or without an input, with a picture or without."""
    texts = [("what\nis it", "a boat"), ("<image>\nis it red", "it is"), ("at", "3")]
    world.samples = [
        {"conversations": [{"from": "human", "value": x}, {"from": "gpt", "value": y}]}
        for x, y in texts
    ]
    world.samples[1]["image"] = "1.png"
    expected = [world.dataset().encode(i) for i in range(3)]
    world.samples = [
        {"instruction": "what", "input": "is it", "output": "a boat"},
        {"instruction": "<image>\nis it red", "output": "it is", "image": "1.png"},
        {"instruction": "at", "input": "", "output": "3"},
        {"instruction": "at", "output": 3},
    ]
    dataset = world.dataset()
    assert dataset.samples.forms == {"Alpaca": 4} and not dataset.samples.unused
    for i, x in enumerate(expected):
        found = dataset.encode(i)
        assert found.input_ids.tolist() == x.input_ids.tolist() and found.images == x.images
        assert found.labels.tolist() == x.labels.tolist()
    with pytest.raises(SampleError, match="sample '#3': its output is int, expected text"):
        dataset.encode(3)


def message(content, **fields) -> dict:
    return {"id": "odd", "messages": [{"role": "user", "content": content} | fields]}


@pytest.mark.parametrize(
    "record, problem",
    [
        (
            message([{"type": "video", "video": "a.mp4"}]),
            "part .* of type 'video', expected",
        ),
        (message(["text"]), "part of a message is of type None"),
        (message([{"type": "text"}]), "text of a part of a message is NoneType, expected text"),
        (message(None), "content of message 1 is NoneType, expected text"),
        (message("a", role=None), "role of message 1 is NoneType, expected text"),
        ({"id": "odd", "messages": "hi"}, "its messages are str, expected a list of turns"),
        (message("a", value="b"), "message 1 has value beside role and content"),
        ({"id": "odd", "instruction": 3, "output": "a"}, "its instruction is int, expected text"),
        (
            {"id": "odd", "instruction": "a", "input": ["b"], "output": "c"},
            "its input is list, expected text",
        ),
        (message("a", tool_calls=[{"name": "f"}]), "has tool_calls, which no template writes"),
        (message("a") | {"conversations": []}, "both messages and conversations"),
        (
            message("a") | {"instruction": "b", "output": "c"},
            "both messages and instruction and output",
        ),
        (
            {"id": "odd", "instruction": "a", "output": "c", "history": [["a", "b"]]},
            "a history, whose turns are not read",
        ),
        ({"id": "odd", "messages": []}, "nothing to train on: no turns"),
        (
            {
                "id": "odd",
                "conversations": [{"from": "user", "value": "a"}, {"from": "bing", "value": "b"}],
            },
            "turn 2 is from 'bing', expected 'gpt'",
        ),
        (message([{"type": "image", "image": "1.png", "url": "2.png"}]), "both 'image' and 'url'"),
        (message([{"type": "image", "url": "file:///1.png"}]), "'file:///1.png' is a URL"),
        (message("a") | {"about": {"source": "1.png"}}, "field 'about' holds a picture"),
        (message([{"type": "image", "image": "1.png"}]) | {"image": "2.png"}, "pictures both in"),
        (message("a") | {"system": "b", "system_prompt": "c"}, "several system prompts"),
        (message("a") | {"video": "a.mp4"}, "field 'video' holds a picture"),
        (message("a", image="1.png"), "field 'image' holds a picture"),
        (message("a") | {"image": {"bytes": "aGVsbG8="}}, "its image is {'bytes': 'aGVsbG8='}"),
    ],
)
def test_records_that_follow_no_form(world, record, problem):
    if len(record.get("messages", ())) == 1:
        record["messages"].append({"role": "assistant", "content": "b"})
    world.samples[0] = record
    with pytest.raises(SampleError, match=f"sample 'odd': .*{problem}"):
        world.dataset().encode(0)


# ---- system turns ----


@pytest.mark.parametrize("template", ["v0", "v1", "llama_2", "llava_llama_2"])
def test_a_system_turn_takes_the_place_of_the_templates_prompt(world, template):
    own = world.dataset(template=template)
    before = [own.encode(i) for i in range(20)]
    changed = world.samples[0]["conversations"]
    changed.insert(0, {"from": "system", "value": SYSTEM})
    dataset = world.dataset(template=template)
    sample = dataset.encode(0)
    text, plain = (world.tokenizer.decode(x.input_ids.tolist()) for x in (sample, before[0]))
    assert SYSTEM in text and SYSTEM not in plain
    tail = changed[1]["value"]
    assert text[text.index(tail) :] == plain[plain.index(tail) :]
    kept = [x.labels[x.labels != -100].tolist() for x in (sample, before[0])]
    assert kept[0] == kept[1]
    changed[0]["value"] = " "  # as an empty field, no system prompt
    assert world.dataset(template=template).encode(0).input_ids.tolist() == (
        before[0].input_ids.tolist()
    )


def test_a_template_without_system_prompt_refuses_one(world):
    world.samples[0]["conversations"].insert(0, {"from": "system", "value": SYSTEM})
    with pytest.raises(SampleError, match="sample 'sample-0': .*template mistral does not write"):
        world.dataset(template="mistral").encode(0)
    world.samples[0]["conversations"][0]["value"] = "<image>"
    with pytest.raises(SampleError, match="sample 'sample-0': <image> is in the system prompt"):
        world.dataset().encode(0)
