"""What the commands show is what is trained on."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mmalign.config import DataConfig
from mmalign.data import preview
from mmalign.data.check import check_samples
from mmalign.errors import UserError
from tests.conftest import REPOSITORY
from tests.data.conftest import VISION


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "scripts" / script), *map(str, arguments)]
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_json_equals_the_reference(shared_data, tmp_path):
    gold = json.loads((shared_data / "formats/conversations.json").read_text())["samples"]
    gold = [s for s in gold if s["template"] == "v1" and not s["mm_use_im_start_end"]]
    samples = [
        {"id": s["id"], "conversations": s["conversations"]}
        | ({"image": "not-opened.jpg"} if s["has_image"] else {})
        for s in gold
    ]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    done = run(
        "preview_batch.py",
        *("--data.path", tmp_path / "data.json", "--data.image-root", tmp_path),
        *("--data.template", "v1", "--data.use-im-start-end", "False", "--json"),
        *("--model.tokenizer", shared_data / "llama_tokenizer"),
    )
    assert done.returncode == 0, done.stderr
    for line, sample in zip(done.stdout.splitlines(), gold, strict=True):
        ours = json.loads(line)
        assert ours["id"] == sample["id"]
        assert [-200 if i == 32000 else i for i in squeeze(ours["input_ids"])] == sample[
            "input_ids"
        ]
        patches = ours["input_ids"].count(32000)
        assert patches == (256 if sample["has_image"] else 0)
        supervised = [label for label in ours["labels"] if label != -100]
        assert supervised == [label for label in sample["labels"] if label != -100]
        assert len(ours["labels"]) == len(ours["input_ids"])


def write_tower(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(VISION.to_hf(torch.float32)))
    return folder


def test_images_are_those_of_the_vision_tower(world):
    """Four samples by default; the first lines name the form of the data, and the tower."""
    world.dataset()
    common = ["--data.path", world.root / "data.json", "--data.image-root", world.root / "images"]
    common += ["--model.tokenizer", world.tokenizer.path]
    tower = write_tower(world.root / "tower")
    for options, line, patches in [
        (["--model.vision-tower", tower], f"images: {tower} 28 px, 4 patches", 4),
        ([], "images: CLIP ViT-L/14 224 px, 256 patches (--model.vision-tower for another)", 256),
    ]:
        done = run("preview_batch.py", *common, *options)
        described = "data: a JSON list; 4 in LLaVA form"
        assert done.stdout.splitlines()[:2] == [described, line], done.stderr
        unwrapped = " ".join(done.stdout.split())
        assert unwrapped.count(f"<image x {patches}>") == 3
        assert done.stdout.count("sample sample-") == 4
    done = run("preview_batch.py", *common, "--data.text-only", "True", "--data.num-samples", "7")
    assert done.stdout.splitlines()[1] == "images: none (text only)", done.stderr
    assert done.stdout.count("sample sample-") == 7 and done.stdout.count("<image x") == 1  # legend


def test_without_a_data_file_the_working_directory_is_not_read():
    with pytest.raises(UserError, match="no data file .--data.path"):
        preview.open_dataset(DataConfig(), preview.PreviewModel(tokenizer=""))


def squeeze(ids: list[int]) -> list[int]:
    return [a for a, b in zip(ids, [*ids[1:], None], strict=True) if (a, b) != (32000, 32000)]


def test_view_marks_exactly_the_answers(world, capsys):
    for colour in (False, True):
        console = Console(width=10_000, force_terminal=colour, color_system="standard")
        preview.show(world.dataset(), 400, console)
        shown = capsys.readouterr().out
        mark = r"\x1b\[1;32m(.*?)\x1b\[0m" if colour else r"\[\[(.*?)\]\]"
        answers = [
            f" {turn['value']}</s>"
            for sample in world.samples
            for turn in sample["conversations"]
            if turn["from"] == "gpt"
        ]
        samples = shown.split("sample sample-", 1)[1]  # after the legend
        assert sorted(re.findall(mark, samples)) == sorted(answers)
        assert shown.count("<image x 4>") == sum("image" in sample for sample in world.samples)


def test_a_mix_shows_the_first_of_each_file(world):
    files = {"a": world.samples[:12], "b": world.samples[12:]}
    for name, samples in files.items():
        (world.root / f"{name}.json").write_text(json.dumps(samples))
    mix = "".join(f'[files.{x}]\npath = "{x}.json"\nsamples = 9\n' for x in files)
    (world.root / "mix.toml").write_text(mix)
    data = DataConfig(str(world.root / "mix.toml"), str(world.root / "images"), num_samples=2)
    dataset, about = preview.open_dataset(data, preview.PreviewModel(str(world.tokenizer.path)))
    ids = ["a/sample-0", "a/sample-1", "b/sample-12", "b/sample-13"]
    assert [dataset.id_of(i) for i in range(len(dataset))] == ids
    assert about.startswith("data: a mix of 2 files; 4 in LLaVA form")


def test_view_shows_the_packing_map(world):
    dataset = world.dataset()
    report = check_samples(dataset, num_workers=0, progress=False)
    console = Console(width=200, record=True, file=io.StringIO())
    preview.show(dataset, 100_000, console)
    shown = console.export_text()
    total = report.lengths.sum()
    assert re.search(rf"0 .* 20 .* 15 .* {total} .* {report.num_loss_tokens.sum()} ", shown)
    boundaries = [0, *report.lengths.cumsum().tolist()]
    assert f"0: {' '.join(map(str, boundaries))}" in shown.replace("\n", " ")


def test_pieces_show_blanks_and_characters_of_several_bytes(llama_tokenizer):
    text = "  two \u2603 [INST]\n\nline\U0001d11e"
    ids = [1, *llama_tokenizer.encode(text), 2]
    supervised = [False] * 4 + [True] * (len(ids) - 4)  # from the first byte of U+2603 on
    shown = list(preview.pieces(ids, supervised, llama_tokenizer))
    assert "".join(piece for piece, _ in shown) == f"<s>{text}</s>"
    assert [kind for _, kind in shown] == ["special", "text", "supervised"]


def test_commands_end_with_an_error_for_bad_data(world):
    world.dataset()
    world.samples[5]["conversations"][1]["value"] = ""
    world.samples[9]["image"] = "../x.png"
    world.dataset()
    tower = write_tower(world.root / "tower")
    common = ["--data.path", world.root / "data.json", "--data.image-root", world.root / "images"]
    common += ["--model.tokenizer", world.tokenizer.path, "--model.vision-tower", tower]
    done = run("check_data.py", *common)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"usable\W+18\b", done.stdout)
    assert "'sample-5': nothing to train on" in done.stdout
    assert "'sample-9': its image '../x.png' is outside" in done.stdout
    done = run("preview_batch.py", *common, "--data.num-samples", "8")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: sample 'sample-5': nothing to train on")


def test_check_data_against_another_file(world):
    """Answers of sample i have i + 1 words, each a token at least, and </s>."""
    world.dataset()
    shorter = [sample for i, sample in enumerate(world.samples) if i < 5]
    (world.root / "shorter.json").write_text(json.dumps(shorter))
    tower = write_tower(world.root / "tower")
    done = run(
        "check_data.py", "--data.path", world.root / "data.json",
        "--data.image-root", world.root / "images", "--model.tokenizer", world.tokenizer.path,
        "--model.vision-tower", tower, "--against", world.root / "shorter.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"Supervised tokens per sample\W+data.json\W+shorter.json", done.stdout)
    assert re.search(r"samples\W+20\W+5\b", done.stdout)
    assert re.search(r"Wasserstein distance [1-9]\d*\.\d\d tokens, Kolmogorov-Smirnov", done.stdout)


def test_check_data_writes_its_report(world, tmp_path, shared_data):
    world.dataset()
    arguments = ["--data.path", world.root / "data.json", "--data.image-root"]
    arguments += [world.root / "images", "--model.tokenizer", world.tokenizer.path]
    arguments += ["--model.vision-tower", write_tower(world.root / "tower"), "--json"]
    output = tmp_path / "out"
    done = run("check_data.py", *arguments, "--output", output, "--data-root", shared_data)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts == json.loads((output / "report.json").read_text())
    assert facts["usable"] == 20 and facts["overlap"]["tasks"]["truthfulqa_mc1"]["whole"] == 0
    assert {path.name for path in output.iterdir()} == {
        *("report.md", "report.json", "lengths.png", "pictures.png")
    }
    assert "![pictures.png](pictures.png)" in (output / "report.md").read_text()
    done = run("check_data.py", *arguments)
    assert json.loads(done.stdout)["not_looked_for"] and not json.loads(done.stdout)["overlap"]


@pytest.mark.parametrize("script", ["check_data.py", "preview_batch.py"])
def test_commands_without_a_tokenizer(world, script):
    world.dataset()
    done = run(
        script, "--data.path", world.root / "data.json", "--model.tokenizer", world.root / "absent"
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no tokenizer: looked for") and done.stdout == ""
