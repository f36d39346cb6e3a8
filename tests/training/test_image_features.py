"""Runs that keep the vision tower's outputs, against runs that compute them each time."""

import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mmalign.config import ShortcutConfig
from mmalign.data.feature_cache import FeatureCache, Uncached
from mmalign.errors import UserError
from mmalign.model.vision_tower import VisionTower
from mmalign.training import image_features
from mmalign.training.image_features import ImageFeatures
from mmalign.training.trainer import Trainer, train
from tests.training.processes import start
from tests.training.runs import exported_weights, losses, small_config
from tests.training.saved import decoder_config, random_batch, small_model, train_config


def keeping(world, run_dir, stage="pretrain", wanted=True, folder="", **changes):
    config = small_config(world, run_dir, stage, **changes)
    shortcuts = ShortcutConfig(image_feature_cache=wanted, image_feature_folder=str(folder))
    return replace(config, shortcuts=shortcuts)


def entries(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """Images that went through the tower, call by call."""
    seen, forward = [], VisionTower.forward

    def counting(tower, pixel_values):
        seen.append(len(pixel_values))
        return forward(tower, pixel_values)

    monkeypatch.setattr(VisionTower, "forward", counting)
    return seen


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_same_losses_and_each_image_once(small_world, tmp_path, stage, seen):
    """14 steps of 8 samples: more than two passes. A second run finds all that it needs."""
    settings = dict(stage=stage, num_steps=14, data={"shuffle": True}, micro_batch_tokens=900)
    plain = keeping(small_world, tmp_path / "plain", wanted=False, **settings)
    train(plain)
    distinct, num_images = 48 if stage == "pretrain" else 32, sum(seen)
    assert num_images > 2 * distinct
    seen.clear()
    folder = tmp_path / "features"
    first, second = (
        keeping(small_world, tmp_path / name, folder=folder, **settings) for name in ("a", "b")
    )
    train(first)
    assert seen == [1] * distinct and len(entries(folder)) == distinct
    torch.testing.assert_close(
        *(torch.tensor(losses(x.run_dir)) for x in (plain, first)), rtol=2e-6, atol=0
    )
    train(second)
    assert seen == [1] * distinct and losses(first.run_dir) == losses(second.run_dir)
    for name, weight in exported_weights(first.run_dir).items():
        error = (weight - exported_weights(plain.run_dir)[name]).norm()
        assert error <= 1e-5 * weight.norm(), name


def test_a_damaged_entry_is_computed_again_and_said(small_world, tmp_path, seen, caplog):
    folder = tmp_path / "features"
    config = keeping(small_world, tmp_path / "a", folder=folder)
    train(config)
    victim, whole = entries(folder)[5], entries(folder)[5].read_bytes()
    victim.write_bytes(whole[:-9])
    seen.clear()
    again = replace(config, run_dir=tmp_path / "b")
    train(again)
    assert seen == [1] and victim.read_bytes() == whole
    assert f"{victim}: damaged, so {small_world.images}/" in caplog.text
    assert losses(config.run_dir) == losses(again.run_dir)


def test_changed_images_and_towers_are_not_taken_for_the_old_ones(small_world, tmp_path, seen):
    images, folder = tmp_path / "images", tmp_path / "features"
    shutil.copytree(small_world.images, images)
    config = keeping(small_world, tmp_path / "a", folder=folder, data={"image_root": str(images)})
    train(config)
    seen.clear()
    Image.new("RGB", (28, 28), (200, 30, 10)).save(images / "3.png")
    changed = replace(config, run_dir=tmp_path / "b")
    train(changed)
    assert seen == [1]
    plain = replace(changed, run_dir=tmp_path / "c", shortcuts=ShortcutConfig())
    train(plain)
    torch.testing.assert_close(
        *(torch.tensor(losses(x.run_dir)) for x in (plain, changed)), rtol=2e-6, atol=0
    )
    seen.clear()
    train(replace(config, run_dir=tmp_path / "d", precision="bf16"))  # another tower
    assert seen == [1] * 48 and len(list(folder.iterdir())) == 2


def test_an_image_that_comes_twice_at_once_is_computed_once(tmp_path, seen):
    model, batch = small_model(decoder_config(), train_config()), random_batch((40, 30), 2)
    cache = FeatureCache.of(model.vision_tower, tmp_path)
    expected = model.vision_tower(batch.pixel_values[:1])
    uncached = Uncached(tmp_path / "image.png", "ab" * 32, damaged=False)
    batch = replace(batch, image_features=torch.empty(0), uncached={0: uncached, 1: uncached})
    seen.clear()
    completed = ImageFeatures(cache, model.vision_tower).complete(batch)
    assert seen == [1] and torch.equal(completed.image_features, torch.stack([expected] * 2))
    assert len(completed.pixel_values) == len(completed.uncached) == 0


def test_two_processes_share_a_folder_and_worker_processes_read_it(small_world, tmp_path):
    folder, settings = tmp_path / "features", dict(num_steps=12, micro_batch_tokens=150)
    alone = keeping(small_world, tmp_path / "one", wanted=False, **settings)
    train(alone)
    both = keeping(
        small_world, tmp_path / "two", folder=folder, data={"num_workers": 1}, **settings
    )
    start(both, 2).succeed()
    assert len(entries(folder)) == 48
    torch.testing.assert_close(
        *(torch.tensor(losses(x.run_dir)) for x in (alone, both)), atol=2e-5, rtol=0
    )


def test_a_stopped_run_continues_to_the_same_bits(small_world, tmp_path, monkeypatch):
    """The first start has computed some features; the second one reads them, though by then auto
    would not begin to keep any."""
    settings = dict(num_steps=10, data={"shuffle": True}, micro_batch_tokens=150)
    whole = keeping(small_world, tmp_path / "whole", **settings)
    train(whole)
    stopped = keeping(small_world, tmp_path / "stopped", wanted="auto", **settings)
    train_step = Trainer.train_step

    def stops(trainer, step, seconds):
        if step.index == 4:
            raise UserError("stopped")
        return train_step(trainer, step, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(image_features, "CPU_RATE", 1e4)
        patch.setattr(Trainer, "train_step", stops)
        with pytest.raises(UserError, match="stopped"):
            train(stopped)
    train(stopped)
    assert losses(whole.run_dir) == losses(stopped.run_dir)
    ours, theirs = exported_weights(whole.run_dir), exported_weights(stopped.run_dir)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_auto_keeps_what_pays(small_world, tmp_path, monkeypatch, seen, caplog):
    """On a slow processor, where images come again."""
    caplog.set_level(logging.INFO, logger="mmalign")
    config = keeping(small_world, tmp_path / "fast", wanted="auto", num_steps=12)
    train(config)
    assert not (config.run_dir / "image_features").exists()  # it would spare no minute
    monkeypatch.setattr(image_features, "CPU_RATE", 1e4)
    once = replace(config, run_dir=tmp_path / "once", num_steps=6)
    train(once)
    assert not (once.run_dir / "image_features").exists()  # 48 images, 48 samples
    seen.clear()
    twice = replace(config, run_dir=tmp_path / "twice")
    train(twice)
    assert seen == [1] * 48 and len(entries(twice.run_dir / "image_features")) == 48
    assert "image features: up to 0.0 MB for 48 images in" in caplog.text


def test_features_that_do_not_fit(small_world, tmp_path, monkeypatch, caplog):
    disk = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=2000))
    monkeypatch.setattr(image_features, "shutil", disk)
    monkeypatch.setattr(image_features, "CPU_RATE", 1e4)
    caplog.set_level(logging.INFO, logger="mmalign")
    with pytest.raises(UserError, match="--shortcuts.image-feature-folder"):
        train(keeping(small_world, tmp_path / "forced"))
    config = keeping(small_world, tmp_path / "auto", wanted="auto", num_steps=12)
    train(config)
    assert "not kept" in caplog.text and not (config.run_dir / "image_features").exists()


def test_a_disk_that_fills_up_ends_the_keeping_alone(small_world, tmp_path, monkeypatch, caplog):
    def full(cache, key, features):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmalign.data.feature_cache.FeatureCache.write", full)
    train(keeping(small_world, tmp_path / "run", num_steps=2))
    assert caplog.text.count("no more image features are kept: [Errno 28]") == 1
