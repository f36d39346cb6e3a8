"""The paper's tasks of lm-evaluation-harness, its own task files over made-up documents."""

from pathlib import Path

import datasets
import evaluate
import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mmalign.lm_eval import MmalignLM
from mmalign.tokenizer import Tokenizer

from .conftest import save_llama

NUM_FEWSHOT = {"mmlu_anatomy": 5, "mathqa": 4, "gsm8k": 8, "boolq": 0, "squadv2": 0}
FOLDERS = ("mmlu/default", "mathqa", "gsm8k", "super_glue/boolq", "squadv2")
WORDS = ["river", "stone", "lamp", "seven", "green", "under", "walks", "never", "paper", "cloud"]


@pytest.fixture
def documents(monkeypatch) -> None:
    """In place of what the task files load from the network."""
    generator = torch.Generator()

    def words(n: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(10, (n,), generator=generator))

    tables = {
        "cais/mmlu": lambda i: {
            "question": words(9),
            "choices": [words(1) for _ in "ABCD"],
            "answer": i % 4,
        },
        "regisss/math_qa": lambda i: {
            "Problem": words(9),
            "options": "a ) 1 , b ) 2 , c ) 38 , d ) 4 , e ) 5",
            "correct": "abcde"[i % 5],
        },
        "openai/gsm8k": lambda i: {"question": words(9), "answer": f"{words(5)}\n#### {i}"},
        "aps/super_glue": lambda i: {"passage": words(20), "question": words(5), "label": i % 2},
        "lighteval/squad_v2": lambda i: {
            "id": str(i),
            "title": words(1),
            "context": words(20),
            "question": words(5),
            "answers": {"text": [words(1)] * (i % 2), "answer_start": [0] * (i % 2)},
        },
    }

    def load_dataset(path: str, **settings) -> datasets.DatasetDict:
        generator.manual_seed(0)  # both backends are asked the same
        rows = datasets.Dataset.from_list([tables[path](i) for i in range(9)])
        splits = ("train", "dev", "validation", "test")
        return datasets.DatasetDict({split: rows for split in splits})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(evaluate, "load", lambda name: SquadScores())


class SquadScores:
    """What the adapter's answers have to do with: texts, and probabilities of having none."""

    def compute(self, predictions: list[dict], references: list[dict]) -> dict[str, float]:
        lengths = sum(len(prediction["prediction_text"]) for prediction in predictions)
        chances = sum(prediction["no_answer_probability"] for prediction in predictions)
        return {"exact": lengths, "f1": 1e3 * chances}


def test_results_equal_the_hugging_face_backend(tmp_path, tokenizer_model, documents):
    folder = save_llama(tmp_path, tokenizer_model, seed=4)
    Tokenizer.from_pretrained(folder).save(folder)
    backends = {
        "hf": HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4),
        "mmalign": MmalignLM(pretrained=str(folder), device="cpu"),
    }
    tasks = Path(lm_eval.__file__).parent / "tasks"  # reading all of them takes seconds
    files = [str(tasks / name) for name in FOLDERS]
    manager, results = TaskManager(include_path=files, include_defaults=False), {}
    for name, lm in backends.items():
        for task, num_fewshot in NUM_FEWSHOT.items():
            settings = dict(num_fewshot=num_fewshot, bootstrap_iters=0, limit=3, log_samples=True)
            found = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, **settings)
            results[name, task] = found
    for task in NUM_FEWSHOT:
        expected, found = results["hf", task], results["mmalign", task]
        numbers = {k: x for k, x in expected["results"][task].items() if isinstance(x, float)}
        assert numbers
        assert numbers == pytest.approx({k: found["results"][task][k] for k in numbers}, rel=1e-4)
        if task in ("gsm8k", "squadv2"):
            texts = [
                [str(sample["resps"][0]) for sample in x["samples"][task]]
                for x in (expected, found)
            ]
            assert texts[0] == texts[1] and len(set(texts[0])) > 1
