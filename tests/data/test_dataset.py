"""What a sample becomes, and the samples that are refused."""

import os
import re

import numpy as np
import pytest
import sentencepiece
import torch

from mmalign.batch import IGNORE_INDEX
from mmalign.data.check import check_samples
from mmalign.data.images import load_image
from mmalign.data.samples import Turn
from mmalign.data.segments import IMAGE_SENTINEL
from mmalign.data.templates import TEMPLATES, encode_conversation
from mmalign.errors import SampleError, UserError
from mmalign.tokenizer import Tokenizer
from tests.data.conftest import IMAGE_SIZE, NUM_PATCHES, VISION


def talk(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_the_image_becomes_its_patches_in_place(world):
    dataset = world.dataset(template="v1")
    sample = dataset.encode(1)
    turns = [Turn(turn["from"], turn["value"]) for turn in world.samples[1]["conversations"]]
    ids, labels = encode_conversation(turns, TEMPLATES["v1"], world.tokenizer, True)
    place = ids.index(IMAGE_SENTINEL)
    patches = [world.tokenizer.image_token_id] * NUM_PATCHES
    assert sample.input_ids.tolist() == ids[:place] + patches + ids[place + 1 :]
    ignored = [IGNORE_INDEX] * NUM_PATCHES
    assert sample.labels.tolist() == labels[:place] + ignored + labels[place + 1 :]
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32
    assert sample.images == ((world.root / "images/1.png").resolve(),)
    expected = load_image(world.root / "images/1.png", VISION.preprocessing)
    assert torch.equal(dataset.load_pixels(1), expected[None])
    assert dataset.encode(0).images == () and dataset.load_pixels(0) is None


def test_text_only_equals_the_same_conversation_without_image(world):
    with_image = world.dataset(text_only=True)
    for sample in world.samples:
        sample.pop("image", None)
        first = sample["conversations"][0]
        first["value"] = first["value"].removeprefix("<image>\n")
    without = world.dataset()
    for i in range(len(without)):
        ours, expected = with_image.encode(i), without.encode(i)
        assert ours.input_ids.tolist() == expected.input_ids.tolist()
        assert ours.labels.tolist() == expected.labels.tolist()
        assert ours.images == () and with_image.load_pixels(i) is None


@pytest.mark.parametrize(
    "conversations, image, problem",
    [
        (talk("what is it", "a boat"), "1.png", "0 <image> in its questions, expected 1"),
        (talk("<image> what <image>", "a boat"), "1.png", "2 <image> in its questions, expected 1"),
        (talk("<image>", "a", "<image>", "b"), "1.png", "2 <image> in its questions, expected 1"),
        (talk("<image> what", "a boat"), None, "1 <image> in its questions, but .* no image"),
        (talk("<image> what", "a boat"), [], "1 <image> in its questions, but .* no image"),
        (talk("<image> what", "a"), ["1.png"] * 2, "1 <image> in .*, expected 2, one for each"),
        (talk("<image>" * 3, "a"), ["1.png"] * 2, "3 <image> in its questions, expected 2"),
        (talk("<image>", "a"), ["1.png", ""], "expected a path or a list of paths"),
        (talk("<image>", "a"), [["1.png"]], "expected a path or a list of paths"),
        (talk("what", "an <image>"), "1.png", "<image> is in an answer"),
        (talk("<image>", ""), "1.png", "nothing to train on: an answer is empty"),
        (talk("<image>", "a", "what", " \n"), "1.png", "nothing to train on: an answer is empty"),
        (talk("<image> what"), "1.png", "nothing to train on .* a question without answer"),
        ([], "1.png", "nothing to train on: no turns"),
        (talk(" ", "a boat"), None, "a question is empty"),
        (talk("what", "a", "what")[1:], None, "turn 1 is from 'gpt', expected 'human'"),
        (talk("what") + talk("is", "it"), None, "turn 2 is from 'human', expected 'gpt'"),
        ([{"from": "system", "value": "x"}], None, "nothing to train on: no turns"),
        (talk("a", "b")[1:] + [{"from": "system", "value": "x"}], None, "turn 1 is from 'gpt'"),
        (talk("a", "b") + [{"from": "system", "value": "x"}], None, "turn 3 is from 'system'"),
        (talk("what is <im_patch>", "a boat"), None, None),  # no such token in the vocabulary: text
    ],
)
def test_conversations_that_do_not_fit(world, conversations, image, problem):
    world.samples[1] = {"id": "odd", "conversations": conversations, "image": image}
    dataset = world.dataset()
    if problem is None:
        assert dataset.encode(1).images == ()
        return
    with pytest.raises(SampleError, match=f"sample 'odd': .*{problem}"):
        dataset.encode(1)


def test_a_text_may_not_make_the_id_of_image_positions(world, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["what is it a boat"] * 9),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=290,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<im_patch>"],
        minloglevel=2,
    )
    world.tokenizer = Tokenizer.from_pretrained(tmp_path / "tokenizer.model")
    assert world.tokenizer.image_token_id == 3
    world.samples[0]["conversations"] = talk("what is <im_patch>", "a boat")
    with pytest.raises(SampleError, match="the text contains '<im_patch>'"):
        world.dataset().encode(0)
    assert (world.dataset().encode(1).input_ids == 3).sum() == NUM_PATCHES


def test_plain_takes_one_question_and_one_answer(world):
    world.samples[1]["conversations"] = talk("<image>", "a boat", "what", "a pier")
    world.samples[2]["conversations"] = talk("<image>", "a boat")
    dataset = world.dataset(template="plain")
    with pytest.raises(SampleError, match="one question and one answer, got 4 turns"):
        dataset.encode(1)
    boat = world.tokenizer.encode("a boat\n")
    patches = [world.tokenizer.image_token_id] * NUM_PATCHES
    assert dataset.encode(2).input_ids.tolist() == [1, *patches, *boat]
    assert dataset.encode(2).labels.tolist() == [IGNORE_INDEX] * (1 + NUM_PATCHES) + boat


def test_max_length_counts_the_image_as_one_token(world):
    length = len(world.dataset().encode(1).input_ids) - NUM_PATCHES + 1
    assert len(world.dataset(max_length=length).encode(1).labels) == length + NUM_PATCHES - 1
    with pytest.raises(SampleError, match=f"{length} tokens .* at most {length - 1} tokens"):
        world.dataset(max_length=length - 1).encode(1)


def test_a_long_sample_is_cut_as_llava_cuts_it(world):
    """With every patch counted, and never through the image."""
    whole = world.dataset().encode(1)
    length = len(whole.input_ids)
    for longest in (length, length - 1, length - 4):
        cut = world.dataset(max_length=longest, on_long_sample="truncate").encode(1)
        assert cut.input_ids.tolist() == whole.input_ids[:longest].tolist()
        assert cut.labels.tolist() == whole.labels[:longest].tolist()
    end = int(np.flatnonzero(whole.input_ids == world.tokenizer.image_token_id)[-1])
    with pytest.raises(SampleError, match="an image would be cut"):
        world.dataset(max_length=end, on_long_sample="truncate").encode(1)


def test_images_must_lie_inside_the_image_root(world):
    images, outside = world.root / "images", world.root / "outside.png"
    outside.write_bytes((images / "1.png").read_bytes())
    os.symlink(outside, images / "link.png")
    os.symlink(world.root, images / "folder")
    paths = [
        "../outside.png",
        str(outside),
        "link.png",
        "folder/outside.png",
        "a/../../outside.png",
    ]
    for path in paths:
        world.samples[1]["image"] = path
        dataset = world.dataset()
        for use in (dataset.encode, dataset.load_pixels):
            with pytest.raises(SampleError, match="sample 'sample-1': .*outside the image root"):
                use(1)
    for path in ("link.png", "folder/outside.png"):  # the user's own links
        world.samples[1]["image"] = path
        dataset = world.dataset(follow_links=True)
        assert dataset.encode(1).images == (images / path,)
        assert dataset.load_pixels(1).shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    for path in ("../outside.png", str(outside), "folder/../../outside.png"):
        world.samples[1]["image"] = path
        with pytest.raises(SampleError, match="outside the image root"):
            world.dataset(follow_links=True).encode(1)
    question = world.samples[1]["conversations"][0]
    world.samples[1] |= {"image": ["1.png", "../outside.png"]}
    question["value"] = f"<image> {question['value']}"
    for use in (world.dataset().encode, world.dataset().load_pixels):
        with pytest.raises(SampleError, match=r"'../outside.png' is outside the image root"):
            use(1)
    question["value"] = question["value"].removeprefix("<image> ")
    os.symlink(images / "1.png", images / "inside.png")
    for path in ("./1.png", "../images/1.png", "inside.png", str(images / "1.png")):
        world.samples[1]["image"] = path
        assert world.dataset().encode(1).images == ((images / "1.png").resolve(),)


@pytest.mark.parametrize(
    "image, problem",
    [
        ("a\0.png", r"its image 'a\\x00.png' is not a path \(embedded null byte\)"),
        ("data:image/png;base64," + "A" * 99999, "is a picture's data, not a path"),
        ("https://example.com/1.png", "is a URL, not a path"),
        ("x" * 5000 + ".png", "(File name too long|no file)"),
        ("a/" * 5000 + "b.png", "(File name too long|no file)"),
        ("folder.png", "(is a folder|no file)"),
    ],
)
@pytest.mark.parametrize("check_images", [True, False])
def test_image_paths_that_are_none(world, image, problem, check_images):
    (world.root / "images/folder.png").mkdir()
    world.samples[1]["image"] = image
    dataset = world.dataset(check_images=check_images, on_bad_sample="skip")
    report = check_samples(dataset, progress=False)
    assert [error.sample_id for error in report.skipped] == ["sample-1"]
    assert re.search(problem, str(report.skipped[0])) and len(str(report.skipped[0])) < 500
    with pytest.raises(SampleError, match="sample 'sample-1'"):
        dataset.load_pixels(1)


def test_a_picture_in_another_field_counts_unless_pictures_are_left_out(world):
    world.samples[0]["picture"] = ["1.png"]
    with pytest.raises(SampleError, match="its field 'picture' holds a picture; only 'image'"):
        world.dataset().encode(0)
    assert world.dataset(text_only=True).encode(0).images == ()


def test_whatever_the_tokenizer_raises_names_the_sample(world, monkeypatch):
    def fail(text: str):
        raise RuntimeError("internal: " + "x" * 99999)

    monkeypatch.setattr(world.tokenizer._backend, "encode_with_offsets", fail)
    with pytest.raises(SampleError, match="sample 'sample-1': its text cannot be tokenised") as e:
        world.dataset().encode(1)
    assert len(str(e.value)) < 500


def test_endless_text_is_refused_before_it_is_tokenised(world, monkeypatch):
    monkeypatch.setattr(world.tokenizer._backend, "encode_with_offsets", None)
    world.samples[0]["conversations"][0]["value"] = "what " * 2**20
    with pytest.raises(SampleError, match=r"5,242,9\d\d characters, at most 2048 tokens"):
        world.dataset().encode(0)


def test_an_unknown_template_is_named_with_the_known_ones(world):
    with pytest.raises(UserError, match="unknown template 'v9': .*plain, v0, v1"):
        world.dataset(template="v9")


def test_image_root_that_is_not_a_folder(world):
    (world.root / "images").rename(world.root / "moved")
    with pytest.raises(UserError, match="image root .*images is not a folder"):
        world.dataset()
    assert len(world.dataset(text_only=True)) == 20
