"""The report of the check, remembered in a file."""

import errno
import io
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from mmalign.config import DataConfig
from mmalign.data.check import check_samples, load_report
from mmalign.data.dataset import ConversationDataset
from mmalign.data.samples import read_samples
from mmalign.errors import SampleError, UserError
from mmalign.model.config import VisionConfig
from tests.data.conftest import VISION
from tests.data.test_check import BAD, last_turn, truncate


def same(a, b) -> bool:
    arrays = ("kept", "lengths", "num_loss_tokens", "num_images")
    equal = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)
    return equal and [str(e) for e in a.skipped] == [str(e) for e in b.skipped]


def rebuild(world, data: DataConfig, vision: VisionConfig | None) -> ConversationDataset:
    return ConversationDataset(read_samples(data.path, data), world.tokenizer, data, vision)


def test_report_is_remembered_and_forgotten_with_its_inputs(world, monkeypatch, tmp_path):
    cache = tmp_path / "run" / "check.npz"
    last_turn("")(world)
    skip = {"on_bad_sample": "skip"}
    first = check_samples(world.dataset(**skip), cache, progress=False)
    calls = []
    check_images = ConversationDataset.check_images
    monkeypatch.setattr(
        ConversationDataset, "check_images", lambda *a: calls.append(a) or check_images(*a)
    )
    again = check_samples(world.dataset(**skip), cache, progress=False)
    assert same(first, again) and not calls
    assert same(load_report(world.dataset(num_workers=0, **skip), cache), first)
    # anything that decides what the samples become makes the report void
    for settings in ({"template": "v0"}, {"max_length": 300}, {"use_im_start_end": False}):
        assert load_report(world.dataset(**skip, **settings), cache) is None
    assert load_report(world.dataset(), cache) is None  # on_bad_sample error
    data = world.dataset(**skip).data
    # the same number of patches of another size
    resized = replace(VISION, image_size=56, patch_size=28, preprocessing=None)
    for vision in (replace(VISION, patch_size=7), resized, None):
        settings = replace(data, text_only=vision is None)
        assert load_report(rebuild(world, settings, vision), cache) is None
    moved = replace(data, image_root=str(tmp_path))
    assert load_report(rebuild(world, moved, VISION), cache) is None
    world.samples[0]["conversations"][1]["value"] += " too"
    assert load_report(world.dataset(**skip), cache) is None
    second = check_samples(world.dataset(**skip), cache, progress=False)
    assert calls and not same(first, second)
    # a truncated file, as left by a full disk, is not a report
    cache.write_bytes(cache.read_bytes()[:300])
    assert load_report(world.dataset(**skip), cache) is None
    cache.write_bytes(b"")
    assert same(check_samples(world.dataset(**skip), cache, progress=False), second)


def test_a_damaged_report_is_named_and_made_again(world, tmp_path, caplog):
    cache, random = tmp_path / "check.npz", Random(0)
    expected = check_samples(world.dataset(), cache, progress=False)
    content = cache.read_bytes()
    for _ in range(40):
        damaged = bytearray(content)
        for _ in range(random.randrange(1, 9)):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        cache.write_bytes(damaged[: random.choice([len(damaged), random.randrange(len(damaged))])])
        found = load_report(world.dataset(), cache)
        assert found is None or same(found, expected)
    assert "check.npz is damaged" in caplog.text
    with np.load(io.BytesIO(content)) as file:
        arrays = dict(file)
    np.savez(cache, **arrays | {"lengths": arrays["lengths"][:-1]})
    assert load_report(world.dataset(), cache) is None


def test_a_failed_check_is_not_remembered(world, tmp_path):
    path = world.root / "images" / f"{BAD}.png"
    content = path.read_bytes()
    truncate(world)
    for _ in range(2):
        with pytest.raises(SampleError):
            check_samples(world.dataset(), tmp_path / "check.npz", progress=False)
    path.write_bytes(content)  # the data file is as it was
    report = check_samples(world.dataset(), tmp_path / "check.npz", progress=False)
    assert len(report.kept) == 20


def test_a_report_that_cannot_be_written(world, monkeypatch, tmp_path):
    def fill_disk(file, **arrays):
        file.write(b"half a rep")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fill_disk)
    with pytest.raises(UserError, match=r"cannot write .*check.npz \(No space left on device\)"):
        check_samples(world.dataset(), tmp_path / "run/check.npz", progress=False)
    assert not list((tmp_path / "run").iterdir())
