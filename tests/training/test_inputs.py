"""A run is what its inputs contain: changed contents are refused by name, other paths are not."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from mmalign.config import CheckpointConfig
from mmalign.errors import UserError
from mmalign.recipes import RECIPES
from mmalign.training.loop import train
from mmalign.training.run_folder import write_config
from tests.training.helpers import exported_weights, losses, small_config


@pytest.fixture(scope="module")
def finished(small_world, tmp_path_factory):
    """(config, folder with copies of all inputs) of a finished run."""
    root = tmp_path_factory.mktemp("inputs")
    for path in (small_world.decoder, small_world.vision_tower, small_world.images):
        shutil.copytree(path, root / path.name)
    for path in (small_world.finetune_json, small_world.projector):
        shutil.copy(path, root)
    config = at(small_config(small_world, root / "run", num_steps=2), root)
    train(config)
    return config, root


def at(config, root: Path):
    """The run with its inputs under another folder."""
    model = replace(
        config.model,
        decoder=str(root / "decoder"),
        vision_tower=str(root / "vision_tower"),
        projector=str(root / "mm_projector.bin"),
    )
    data = replace(config.data, path=str(root / "finetune.json"), image_root=str(root / "images"))
    return replace(config, model=model, data=data)


def change_weight(folder: Path) -> None:
    """One element: the file keeps its size."""
    weights = load_file(folder / "model.safetensors")
    weights[sorted(weights)[0]].view(-1)[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_data(root: Path) -> None:
    samples = json.loads((root / "finetune.json").read_text())
    samples[0]["conversations"][1]["value"] = "a small red circle"
    (root / "finetune.json").write_text(json.dumps(samples))


def change_projector(root: Path) -> None:
    data = (root / "mm_projector.bin").read_bytes()
    at = data.rindex(b"\x3d")  # some exponent of a weight
    (root / "mm_projector.bin").write_bytes(data[:at] + b"\x3c" + data[at + 1 :])


def change_image(root: Path) -> None:
    pixels = np.zeros((28, 28, 3), np.uint8)
    Image.fromarray(pixels).save(root / "images" / "1.png")


def change_tokenizer(root: Path) -> None:
    """A field that sentencepiece does not know; its pieces stay."""
    with open(root / "decoder" / "tokenizer.model", "ab") as file:
        file.write(b"\xf8\x07\x01")


CHANGES = {
    "data file": change_data,
    "decoder": lambda root: change_weight(root / "decoder"),
    "vision tower": lambda root: change_weight(root / "vision_tower"),
    "projector": change_projector,
    "images": change_image,
    "tokenizer": change_tokenizer,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_content_is_refused_by_name(finished, tmp_path, name):
    config, root = finished
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    CHANGES[name](copy)
    with pytest.raises(UserError, match=rf"the {name} .*copy.* has changed since .*run was"):
        train(replace(at(config, copy), run_dir=copy / "run"))


def test_a_changed_picture_in_an_archive_is_refused(finished, tmp_path):
    """Its directory tells, without reading the pictures."""
    config, root = finished
    path, changed = tmp_path / "images.zip", tmp_path / "changed.zip"
    with zipfile.ZipFile(path, "w") as archive, zipfile.ZipFile(changed, "w") as other:
        for picture in sorted((root / "images").iterdir()):
            archive.write(picture, picture.name)
            other.writestr(picture.name, picture.read_bytes() + b"?" * (picture.name == "1.png"))
    config = replace(config, run_dir=tmp_path / "run")
    train(replace(config, data=replace(config.data, image_root=str(path))))
    assert losses(config.run_dir) == losses(root / "run")
    with pytest.raises(UserError, match=r"the archives of images .*changed.zip has changed since"):
        train(replace(config, data=replace(config.data, image_root=str(changed))))
    with pytest.raises(UserError, match="the images .* has changed since"):  # loose ones again
        train(config)


def test_the_same_content_under_other_paths_continues(finished, tmp_path):
    config, root = finished
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    shutil.rmtree(copy / "run" / "checkpoints" / "step_2")
    moved = replace(at(config, copy), run_dir=copy / "run")
    with pytest.raises(UserError, match="projector"):
        train(replace(moved, model=replace(moved.model, projector="")))
    train(moved)
    assert losses(moved.run_dir) == losses(config.run_dir)
    ours, theirs = exported_weights(config.run_dir), exported_weights(moved.run_dir)
    assert all((weight == theirs[name]).all() for name, weight in ours.items())


def test_a_mix_resumes_to_the_same_bits_and_may_not_change(small_world, tmp_path):
    mix = tmp_path / "mix.toml"
    tables = f'[files.all]\npath = "{small_world.finetune_json}"\nweight = {{}}\nsamples = {{}}'
    mix.write_text(tables.format(1.5, 6))
    checkpoints = CheckpointConfig(every=2, keep=3)
    config = small_config(small_world, tmp_path / "run", num_steps=4, checkpoint=checkpoints)
    config = replace(config, data=replace(config.data, path=str(mix), shuffle=True))
    train(config)
    before, weights = losses(config.run_dir), exported_weights(config.run_dir)
    shutil.rmtree(config.run_dir / "checkpoints" / "step_4")
    shutil.rmtree(config.run_dir / "export")
    train(config)
    assert losses(config.run_dir) == before
    after = exported_weights(config.run_dir)
    assert all((weight == after[name]).all() for name, weight in weights.items())
    for numbers in ((2, 6), (1.5, 5)):
        mix.write_text(tables.format(*numbers))
        with pytest.raises(UserError, match=r"the data file .*mix.toml has changed since"):
            train(config)


def test_a_run_from_before_an_option_has_its_default(finished, tmp_path):
    """config.json of an older version lacks the field."""
    config, root = finished
    run = tmp_path / "run"
    shutil.copytree(root / "run", run)
    shutil.rmtree(run / "checkpoints" / "step_2", ignore_errors=True)
    settings = json.loads((run / "config.json").read_text())
    assert settings["data"].pop("follow_links") is False
    (run / "config.json").write_text(json.dumps(settings))
    config = replace(config, run_dir=run)
    with pytest.raises(UserError, match=r"data\.follow_links was False, now True"):
        train(replace(config, data=replace(config.data, follow_links=True)))
    train(config)
    assert losses(run) == losses(root / "run")
    assert "follow_links" not in json.loads((run / "config.json").read_text())["data"]


def test_damaged_bookkeeping_of_inputs_is_written_again(finished, tmp_path, caplog):
    config, root = finished
    run = tmp_path / "run"
    shutil.copytree(root / "run", run)
    before = json.loads((run / "inputs.json").read_text())
    for text in ("{", "[]", '{"run": 1}', '{"run": "x", "num_steps": 2, "inputs": {"decoder": 3}}'):
        caplog.clear()
        (run / "inputs.json").write_text(text)
        train(replace(config, run_dir=run))
        assert "inputs.json is damaged" in caplog.text
        assert json.loads((run / "inputs.json").read_text()) == before
    (run / "inputs.json").write_text(json.dumps(before | {"num_steps": 3}))
    with pytest.raises(UserError, match="started with 3 steps, now the samples make 2"):
        train(replace(config, run_dir=run))


def test_a_damaged_data_check_is_done_again(finished, tmp_path, caplog):
    config, root = finished
    run = tmp_path / "run"
    shutil.copytree(root / "run", run)
    path = run / "data_check.npz"
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    np.savez_compressed(tmp_path / "tampered.npz", **arrays | {"lengths": arrays["lengths"] + 1})
    tampered = (tmp_path / "tampered.npz").read_bytes()
    for content in (b"", whole[:300], whole[:200] + b"?" + whole[201:], tampered):
        caplog.clear()
        path.write_bytes(content)
        train(replace(config, run_dir=run))
        assert "data_check.npz is damaged" in caplog.text
        with np.load(path) as file:
            assert all((file[name] == value).all() for name, value in arrays.items())


def test_a_torn_config_json_is_named(finished, tmp_path):
    config, root = finished
    shutil.copytree(root / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(UserError, match=r"config.json, line \d+: .*Restore a copy"):
        train(replace(config, run_dir=tmp_path / "run"))


def test_a_damaged_line_of_metrics_is_named_and_the_others_stay(finished, tmp_path, caplog):
    config, root = finished
    run = tmp_path / "run"
    shutil.copytree(root / "run", run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for damaged in ("xx{\n", '{"step": 1}\n', '{"step": true, "loss": 1.0}\n', "[]\n"):
        caplog.clear()
        (run / "metrics.jsonl").write_text(damaged + lines[1] + '{"step": 1, "loss": 2.0}\n')
        train(replace(config, run_dir=run))
        assert "metrics.jsonl, line 1: not the record" in caplog.text
        assert "metrics.jsonl, line 3: not the record of a step in order" in caplog.text
        assert (run / "metrics.jsonl").read_text() == lines[1]


def test_checkpoints_without_the_settings_that_made_them(tmp_path):
    config = replace(RECIPES["tiny-finetune"][1], run_dir=tmp_path)
    (tmp_path / "checkpoints/step_3").mkdir(parents=True)
    with pytest.raises(UserError, match="has checkpoints but no config.json.* Restore a copy"):
        write_config(config)
