"""Every kind of bad sample stops the run before training, or is skipped and counted."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmalign.data.check as check_module
from mmalign.batch import IGNORE_INDEX
from mmalign.config import DataConfig
from mmalign.data.check import check_samples
from mmalign.data.dataset import ConversationDataset
from mmalign.errors import LongSampleError, SampleError, UserError
from mmalign.model.config import CLIP_VIT_L_14

BAD = 5  # the sample that a test spoils; it has an image


def truncate(world) -> None:
    path = world.root / "images" / f"{BAD}.png"
    path.write_bytes(path.read_bytes()[:-200])


def leave_root(world) -> None:
    (world.root / "images" / "5.png").rename(world.root / "5.png")
    world.samples[BAD]["image"] = "../5.png"


def last_turn(text: str):
    def spoil(world) -> None:
        world.samples[BAD]["conversations"][-1]["value"] = text

    return spoil


def drop_answer(world) -> None:
    world.samples[BAD]["conversations"] = world.samples[BAD]["conversations"][:1]


SPOILED = {
    "missing image": (lambda w: (w.root / "images/5.png").unlink(), "no file .*5.png"),
    "truncated image": (truncate, "5.png cannot be decoded"),
    "no image for <image>": (lambda w: w.samples[BAD].pop("image"), "1 <image> in its questions"),
    "<image> in an answer": (last_turn("a <image>"), "<image> is in an answer"),
    "empty answer": (last_turn(""), "nothing to train on"),
    "no answer": (drop_answer, "nothing to train on"),
    "too long": (last_turn("a boat " * 400), "tokens .* at most 500 tokens allowed"),
    "outside the root": (leave_root, "outside the image root"),
    "malformed": (lambda w: w.samples[BAD].update(conversations=3), "expected a list of turns"),
}


@pytest.mark.parametrize("spoil, problem", SPOILED.values(), ids=SPOILED)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples(world, monkeypatch, spoil, problem, num_workers):
    monkeypatch.setattr("mmalign.data.check._CHUNK", 8)  # three pieces of work
    spoil(world)
    with pytest.raises(SampleError, match=f"sample 'sample-{BAD}': .*{problem}"):
        check_samples(world.dataset(max_length=500), num_workers=num_workers, progress=False)
    dataset = world.dataset(max_length=500, on_bad_sample="skip")
    report = check_samples(dataset, num_workers=num_workers, progress=False)
    assert [error.sample_id for error in report.skipped] == [f"sample-{BAD}"]
    assert report.kept.tolist() == [i for i in range(20) if i != BAD]


def test_long_samples_alone_can_be_left_out(world):
    lengths = [len(world.dataset().encode(i).labels) for i in range(20)]
    longest = max(lengths) - 1  # more than that with the image as one token: text alone counts
    dataset = world.dataset(max_length=longest - 3, on_long_sample="skip")
    report = check_samples(dataset, num_workers=0, progress=False)
    assert report.skipped and all(isinstance(x, LongSampleError) for x in report.skipped)
    world.samples[BAD].update(conversations=3)
    with pytest.raises(SampleError, match=f"sample 'sample-{BAD}'"):
        check_samples(
            world.dataset(max_length=longest - 3, on_long_sample="skip"),
            num_workers=0,
            progress=False,
        )


def test_truncated_samples_are_counted(world):
    """And none is left without a target: what its tokens end before is named."""
    whole = [len(world.dataset().encode(i).labels) for i in range(20)]
    world.samples[3]["conversations"][0]["value"] = "<image>\n" + "boat " * 200
    dataset = world.dataset(max_length=230, on_long_sample="truncate", on_bad_sample="skip")
    report = check_samples(dataset, num_workers=0, progress=False)
    [error] = report.skipped
    assert str(error).startswith(
        "sample 'sample-3': nothing to train on in the 230 tokens that are"
    )
    lengths = [whole[i] for i in report.kept]
    assert report.num_cut.tolist() == [max(0, x - 230) for x in lengths] and max(report.num_cut) > 9
    assert report.lengths.tolist() == [min(x, 230) for x in lengths]


def test_report_counts_what_training_will_see(world):
    dataset = world.dataset()
    report = check_samples(dataset, num_workers=0, progress=False)
    encoded = [dataset.encode(i) for i in range(20)]
    assert report.lengths.tolist() == [len(sample.input_ids) for sample in encoded]
    targets = [sample.labels[1:] for sample in encoded]
    assert report.num_loss_tokens.tolist() == [int((t != IGNORE_INDEX).sum()) for t in targets]
    assert report.num_images.tolist() == [len(sample.images) for sample in encoded]
    assert report.kept.dtype == np.int64 and report.lengths.dtype == np.int32


def test_error_counts_and_lists_the_bad_samples(world):
    for sample in world.samples[3:16]:
        sample["conversations"] = sample["conversations"][:1]
    with pytest.raises(SampleError) as caught:
        check_samples(world.dataset(), progress=False)
    assert caught.value.sample_id == "sample-3"
    assert "13 of 20 samples are unusable" in str(caught.value)
    assert "'sample-12'" in str(caught.value) and "'sample-13'" not in str(caught.value)
    assert "and 3 more" in str(caught.value)


def test_no_usable_sample_is_an_error_even_with_skip(world):
    world.samples = world.samples[:1]
    world.samples[0]["conversations"] = []
    with pytest.raises(UserError, match="no usable sample: sample 'sample-0'"):
        check_samples(world.dataset(on_bad_sample="skip"), progress=False)


def test_without_check_images_a_file_only_has_to_be_there(world):
    truncate(world)
    assert len(check_samples(world.dataset(check_images=False), progress=False).kept) == 20
    (world.root / "images/5.png").unlink()
    with pytest.raises(SampleError, match="sample 'sample-5': no file"):
        check_samples(world.dataset(check_images=False), progress=False)


def test_of_many_pictures_a_drawn_share_is_decoded(world, monkeypatch):
    """The others have to be there; the same ones are drawn every time."""
    for path in (world.root / "images").iterdir():
        path.write_bytes(b"no picture")
    settings = {"check_images": "sample", "on_bad_sample": "skip"}
    with pytest.raises(UserError, match="no usable sample"):  # of few, all are decoded
        dataset = world.dataset(**settings)
        world.samples = [sample for sample in world.samples if "image" in sample]
        check_samples(world.dataset(**settings), progress=False)
    monkeypatch.setattr("mmalign.data.dataset._LEAST_CHECKED", 0)
    monkeypatch.setattr("mmalign.data.dataset._SHARE_CHECKED", 0.4)
    dataset = world.dataset(**settings)
    drawn = [error.sample_id for error in check_samples(dataset, progress=False).skipped]
    assert 3 <= len(drawn) <= 9
    (world.root / "images" / "5.png").unlink()
    report = check_samples(world.dataset(**settings), num_workers=2, progress=False)
    assert {error.sample_id for error in report.skipped} == {*drawn, "sample-5"}


def test_text_only_needs_no_images(world):
    dataset = world.dataset(text_only=True)
    for path in (world.root / "images").iterdir():
        path.unlink()
    report = check_samples(dataset, progress=False)
    assert len(report.kept) == 20 and not report.num_images.any()


def test_unused_fields_are_named(world, caplog):
    for sample in world.samples[:3]:
        sample["model"] = "llava"
    check_samples(world.dataset(), progress=False)
    assert "not used (samples): model (3)" in caplog.text


def test_messages_are_bounded(world):
    for sample in world.samples:
        sample["image"] = ["data:image/png;base64," + "A" * 9999] * 2
    with pytest.raises(SampleError) as caught:
        check_samples(world.dataset(), progress=False)
    assert "20 of 20 samples are unusable" in str(caught.value) and len(str(caught.value)) < 6000


def test_a_worker_that_is_killed_is_not_a_traceback(world, monkeypatch):
    monkeypatch.setattr("mmalign.data.check._CHUNK", 8)
    monkeypatch.setattr(ConversationDataset, "encode", lambda *_: os.kill(os.getpid(), 9))
    with pytest.raises(UserError, match="a process of the data check was killed"):
        check_samples(world.dataset(), num_workers=2, progress=False)


def test_workers_end_with_the_main_process(world, tmp_path):
    """Even where that is killed; a signal without a handler ends it as silently."""
    pids = []

    def check() -> None:
        def tell_and_wait(*_) -> None:
            (tmp_path / f"worker-{os.getpid()}").touch()
            time.sleep(600)

        ConversationDataset.encode = tell_and_wait
        check_module._CHUNK = 8
        check_samples(world.dataset(), num_workers=2, progress=False)

    main = multiprocessing.get_context("fork").Process(target=check)
    main.start()
    while len(pids) < 2:
        pids = [int(path.name.partition("-")[2]) for path in tmp_path.glob("worker-*")]
        time.sleep(0.01)
    main.kill()
    main.join()
    deadline = time.monotonic() + 30
    while any(_is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    left = [pid for pid in pids if _is_running(pid)]
    for pid in left:
        os.kill(pid, 9)
    assert not left


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_real_text_and_photos(shared_data, llama_tokenizer, tmp_path):
    photos = sorted((shared_data / "llava/images").iterdir())
    lines = (shared_data / "llava/coco2014_val_gpt4_qa_30x3.jsonl").read_text().splitlines()
    samples = []
    for i, question in enumerate(map(json.loads, lines)):
        texts = ("human", f"<image>\n{question['instruction']}"), ("gpt", question["output"])
        turns = [{"from": speaker, "value": value} for speaker, value in texts]
        samples.append(
            {"id": i, "image": photos[i % len(photos)].name, "type": question["type"]}
            | {"conversations": turns}
        )
    (tmp_path / "data.json").write_text(json.dumps(samples))
    settings = {"template": "v1", "types": ("detail", "reasoning")}
    dataset = ConversationDataset.open(
        DataConfig(str(tmp_path / "data.json"), str(photos[0].parent), **settings),
        shared_data / "llama_tokenizer",
        CLIP_VIT_L_14,
    )
    report = check_samples(dataset, progress=False)
    assert len(report.kept) == 60 and report.lengths.min() > 256 and report.num_images.all()
    assert all(dataset.load_pixels(i).shape == (1, 3, 224, 224) for i in range(len(photos)))
    assert all(dataset.load_pixels(i).dtype == torch.uint8 for i in range(len(photos)))
    assert Image.open(photos[0]).mode == "RGBA"
