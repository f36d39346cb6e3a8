"""Data files, images and documents: the right meaning, or the sample, file or line by its name."""

import os

import pytest

# case -> what check_data.py names when it reads the case's data.json
DATA = {
    "29-data-one-pretty-object": ("data.json", "object", "list"),
    "31-image-under-another-key": ("list", "path"),
}
# case -> what check_data.py names and training with --data.on-bad-sample skip leaves out
SKIPPED = {
    "17-very-wide-picture": "s1",
    "18-half-an-emoji-in-an-answer": "s1",
    "19-nul-in-an-image-path": "s1",
}
# case -> tasks, and what evaluate.py names of the case's documents
DOCUMENTS = {
    "22-half-an-emoji-in-truthfulqa": ("truthfulqa", "mc_task.json", "question 0"),
    "36-truthfulqa-choice-twice": ("truthfulqa", "mc_task.json", "'a'"),
    "69-ethics-file-cut": ("ethics_justice", "justice_test.csv"),
    "70-ethics-row-missing": ("ethics_virtue", "virtue_test.csv", "5"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_a_bad_sample_is_named_and_can_be_skipped(case, name):
    changes = {"data__path": case.folder / "data.json"}
    if (case.folder / "images").exists():
        changes["data__image_root"] = case.folder / "images"
    ended = case.check(**changes)
    assert ended.code == 1 and f"sample '{SKIPPED[name]}'" in ended.text
    case.train(**changes, data__on_bad_sample="skip", num_steps=8).succeeded("1 samples skipped")
    listed = (case.run / "skipped_samples.txt").read_text()
    assert listed.startswith(f"sample '{SKIPPED[name]}'") and listed.count("\n") == 1


def test_20_a_picture_in_the_image_field(case):
    path = case.folder / "data.json"
    case.train(data__path=path, data__check_images=False).refused("sample 's1'")
    ended = case.check(data__path=path)
    assert ended.code == 1 and "s1" in ended.text and len(ended.text) < 3000


def test_21_an_integer_of_5000_digits(case):
    path = case.folder / "data.json"
    case.check(data__path=path).succeeded("8")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_refused(case, name):
    tasks, *names = DOCUMENTS[name]
    case.evaluate(data_root=case.folder / "evaluation", tasks=tasks).refused(*names)


@pytest.mark.parametrize("name", DATA)
def test_a_data_file_is_refused(case, name):
    ended = case.check(data__path=case.folder / "data.json")
    assert ended.code == 1 and all(word in ended.text for word in DATA[name]), ended.text


def test_30_data_wrapped_in_an_object(case):
    for name in ("data.json", "data_on_one_line.json"):
        case.check(data__path=case.folder / name).refused(name, "object", "'data'", "list")


def test_32_a_system_prompt_of_a_sample(case):
    path = case.folder / "data.json"
    case.check(data__path=path).succeeded("1")
    ended = case.check(data__path=path, data__template="mistral")
    ended.refused("sample 'french'", "system prompt", "template mistral")


def test_35_two_samples_of_one_name(case):
    ended = case.check(data__path=case.folder / "data.json")
    assert ended.code == 1 and "no1.jpg" in ended.text and "no2.jpg" in ended.text
    names = {line.split(":")[0] for line in ended.text.splitlines() if line.startswith("sample ")}
    assert len(names) == 2, ended.text


def test_61_a_picture_that_is_postscript(case, monkeypatch):
    folder, called = case.scratch / "bin", case.scratch / "CALLED"
    folder.mkdir()
    (folder / "gs").write_text(f'#!/bin/sh\necho "gs $*" >> "{called}"\n')
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    ended = case.check(data__image_root=case.folder / "images")
    assert ended.code == 1 and "sample 's1'" in ended.text and not called.exists()


def test_63_a_picture_that_is_a_fifo(case):
    images = case.scratch / "images"
    images.mkdir()
    for path in (case.base / "images").iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "a1.jpg").unlink()
    os.mkfifo(images / "a1.jpg")
    ended = case.check(data__image_root=images)
    assert ended.code == 1 and "sample 's1'" in ended.text
