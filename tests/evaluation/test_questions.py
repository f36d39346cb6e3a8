"""The texts that are looked for in training data, against the published files."""

import csv
import json

from mmalign.evaluation.questions import read_questions


def test_texts_are_those_of_the_files_without_prompts(shared_data):
    texts, problems = read_questions(shared_data)
    assert not problems
    published = json.loads((shared_data / "truthfulqa/mc_task.json").read_text())
    assert texts["truthfulqa_mc1"] == [entry["question"] for entry in published]
    columns = {
        "commonsense": "input", "deontology": "scenario", "justice": "scenario",
        "virtue": "scenario",
    }  # fmt: skip
    for subset, column in columns.items():
        [path] = (shared_data / "ethics" / subset).glob("*_test.csv")
        with open(path, newline="") as file:
            rows = {row[column].partition(" [SEP] ")[0] for row in csv.DictReader(file)}
        assert set(texts[f"ethics_{subset}"]) == rows
    [path] = (shared_data / "ethics/utilitarianism").glob("*_test.csv")
    with open(path, newline="") as file:
        sentences = {text for row in csv.reader(file) for text in row}
    assert set(texts["ethics_utilitarianism"]) == sentences
    assert all(len(set(x)) == len(x) for x in texts.values())


def test_a_missing_file_is_said_and_the_others_are_read(shared_data, tmp_path):
    (tmp_path / "truthfulqa").symlink_to(shared_data / "truthfulqa")
    texts, problems = read_questions(tmp_path)
    assert list(texts) == ["truthfulqa_mc1"] and len(problems) == 5
    assert all("was not looked for" in x for x in problems)
