"""evaluate.py on pictures: a small random LLaVA against transformers, one question at a time."""

import runpy
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.data.samples import Turn
from mmalign.data.templates import SpecialIds
from mmalign.errors import UserError
from mmalign.evaluation.corruptions import corrupt
from mmalign.evaluation.items import read_items, read_results
from mmalign.evaluation.tasks import as_released
from mmalign.evaluation.vision import evaluate_pictures
from mmalign.model.generate import generate
from tests.evaluation.vision_files import NUM_PICTURES, coco_name, write_pope, write_vqa
from tests.model.tiny import IMAGE_SIZE, hf_pixels
from tests.test_chat import ROOT, SYSTEM, first_question, pixels_of
from tests.test_chat import run as run  # a fixture

NAMES = [coco_name(number) for number in range(NUM_PICTURES)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "coco/val2014").mkdir(parents=True)
    random = np.random.default_rng(5)
    for name in NAMES:
        pixels = random.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(root / "coco/val2014" / name, quality=95)
    write_pope(root)
    write_vqa(root)
    return root


def evaluate(run, data, output, **options):
    settings = {"tasks": ["pope"], "quiet": True, "num_workers": 0} | options
    return evaluate_pictures(run.folder, data_root=data, output=output, **settings)


def theirs(run, items, data, picture=lambda item: item["image"]):
    """Words of transformers' answer to every question, alone."""
    pairs = ((first_question(x["question"]), pixels_of(data / picture(x))) for x in items)
    return [run.answer(*pair, num_tokens=16).split() for pair in pairs]


def words(items):
    """Beside a special token in the middle of an answer we write one blank, sentencepiece two."""
    return [item["answer"].split() for item in items]


def test_answers_are_those_of_one_question_at_a_time(run, data, tmp_path):
    evaluate(run, data, tmp_path, tasks=["pope", "vqav2"])
    for task, rows in read_items(tmp_path).items():
        assert len(rows) == {"pope": 6 * NUM_PICTURES, "vqav2": 3 * NUM_PICTURES}[task]
        assert words(rows) == theirs(run, rows, data)


def test_log_odds_are_those_of_the_first_word(run, data, tmp_path):
    evaluate(run, data, tmp_path, limit=4)
    for item in read_items(tmp_path)["pope"]:
        ids = [
            i
            for part in first_question(item["question"])
            for i in ([part] if isinstance(part, int) else run.pieces.encode(part))
        ]
        with torch.no_grad():
            pixels = hf_pixels(pixels_of(data / item["image"]))
            logits = run.model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1]
        prompt = ids[len(ids) - len(run.pieces.encode(first_question(item["question"])[-1])) :]
        firsts = {
            word: run.pieces.encode(f"{first_question(item['question'])[-1]} {word}")[len(prompt)]
            for word in ("Yes", "yes", "No", "no")
        }
        yes, no = (
            logits[sorted({firsts[x] for x in words})].logsumexp(0)
            for words in (("Yes", "yes"), ("No", "no"))
        )
        assert item["log_odds"] == pytest.approx(float(yes - no), abs=1e-4)


def test_controls_and_corruptions(run, data, tmp_path):
    ways = {"controls": ["blind", "mismatched"], "corruptions": ["contrast:2,5"]}
    folders = evaluate(run, data, tmp_path, num_workers=1, **ways)
    assert list(folders) == ["", "blind", "mismatched", "contrast-2", "contrast-5"]
    clean = read_items(folders[""])["pope"]
    other = dict(zip(NAMES, NAMES[2:] + NAMES[:2], strict=True))
    exchanged = read_items(folders["mismatched"])["pope"]

    def shown(item):
        return f"coco/val2014/{other[item['image'].rpartition('/')[2]]}"

    assert words(exchanged) == theirs(run, exchanged, data, shown)
    blind = read_items(folders["blind"])["pope"][0]
    question = f"{SYSTEM['v1']} USER: {blind['question']} ASSISTANT:"
    assert blind["answer"].strip() == run.answer([1, question], num_tokens=16)
    item = read_items(folders["contrast-5"])["pope"][0]
    picture = corrupt(Image.open(data / item["image"]), "contrast", 5, NAMES[0])
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    expected = run.answer(first_question(item["question"]), pixels, num_tokens=16)
    assert item["answer"].strip() == expected
    report = (tmp_path / "pictures.md").read_text()
    gained = sum(a["score"] < b["score"] for a, b in zip(clean, exchanged, strict=True))
    line = next(x for x in report.splitlines() if x.startswith("| pope | mismatched"))
    assert line.split(" | ")[8] == str(gained)
    assert (tmp_path / "corruptions.png").stat().st_size > 10_000


def test_interrupted_evaluation_continues(run, data, tmp_path, monkeypatch):
    from mmalign.evaluation import vision

    monkeypatch.setattr(vision, "_CHUNK_TOKENS", 100)  # a picture or two
    evaluate(run, data, tmp_path / "whole")
    calls = []

    def counting(llava, tokenizer, prompts, *rest, **options):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(llava, tokenizer, prompts, *rest, **options)

    monkeypatch.setattr(vision, "generate", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, data, tmp_path / "cut")
    log = tmp_path / "cut/answers.jsonl"
    assert log.read_text().count("\n") == 1 + calls[0]
    with open(log, "a") as file:
        file.write('{"task": "pope", "doc')  # a kill in the middle of a line
    evaluate(run, data, tmp_path / "cut")
    assert sum(calls) - calls[1] == 6 * NUM_PICTURES
    assert read_items(tmp_path / "cut") == read_items(tmp_path / "whole")
    before = len(calls)
    evaluate(run, data, tmp_path / "cut")  # finished: nothing is asked
    assert len(calls) == before


def test_answers_of_other_questions_are_replaced_only_where_asked(run, data, tmp_path):
    """Finished or not."""
    output = tmp_path / "output"
    evaluate(run, data, output, limit=4)
    with pytest.raises(UserError, match="first 4 documents of each task, more than --limit 3"):
        evaluate(run, data, output, limit=3)
    assert read_results(output)["pope"]["n"] == 4
    (output / "results.json").unlink()  # as if the evaluation had been stopped
    for limit in (3, None):
        with pytest.raises(UserError, match="answers.jsonl holds the answers of .* another limit"):
            evaluate(run, data, output, limit=limit)
    evaluate(run, data, output, limit=3, overwrite=True)
    assert read_results(output)["pope"]["n"] == 3


def test_command_line(run, data, tmp_path, monkeypatch, capsys):
    command = ["evaluate.py", "--model", run.folder, "--tasks", "pope", "--data-root", data]
    command += ["--output", tmp_path, "--limit", 6, "--workers", 0]
    monkeypatch.setattr(sys, "argv", [str(x) for x in command])
    runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    assert "pope_adversarial" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [str(x) for x in [*command, "--tasks", "ethics", "pope"]])
    with pytest.raises(SystemExit, match="Evaluate the two kinds"):
        runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    arguments = [*command, "--tasks", "ethics", "--controls", "blind"]
    monkeypatch.setattr(sys, "argv", [str(x) for x in arguments])
    with pytest.raises(SystemExit, match="are for tasks about pictures"):
        runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")


def test_models_and_pictures_that_do_not_do(run, data, tmp_path):
    with pytest.raises(UserError, match="has no vision tower"):
        evaluate_pictures(run.folder.parent / "text", ["pope"], data, tmp_path, quiet=True)
    copy = tmp_path / "copy"
    shutil.copytree(run.folder / "export/llava", copy)
    with pytest.raises(UserError, match="its conversation template is unknown"):
        evaluate_pictures(copy, ["pope"], data, tmp_path / "a", quiet=True)
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    (broken / "coco/val2014" / NAMES[1]).write_bytes(b"no picture")
    for workers in (0, 1):
        with pytest.raises(UserError, match=f"{NAMES[1]} cannot be decoded"):
            evaluate(run, broken, tmp_path / f"b{workers}", num_workers=workers)
    if find_spec("imagecorruptions") is None:
        with pytest.raises(UserError, match="pip install imagecorruptions-imaug"):
            evaluate(run, data, tmp_path / "d", corruptions=["all"])
        assert not (tmp_path / "d").exists()
    with pytest.raises(UserError, match="more than the model's context of 400"):
        evaluate(run, data, tmp_path / "c", protocol="as-released")


def test_prompt_of_the_scripts():
    """conv_vicuna_v0's get_prompt, written by hand."""
    special = SpecialIds(1, 2, 7, 8, use_im_start_end=True)
    turns = [
        *(Turn("human", "What is red?"), Turn("gpt", "cup")),
        *(Turn("human", "<image>\nWhere?"), Turn("gpt", "")),
    ]
    segments = [x for x, _ in as_released.TEMPLATE.render(turns, special)]
    text = "".join(x if isinstance(x, str) else f"[{x}]" for x in segments)
    assert text.startswith(f"[1]{SYSTEM['v0']}###Human: What are the key differences")
    assert "sources?###Assistant: Renewable energy sources are those" in text
    assert text.endswith(
        "instability.\n###Human: What is red?###Assistant: cup###Human: [7][-200][8]\nWhere?"
        "###Assistant: ###"
    )
