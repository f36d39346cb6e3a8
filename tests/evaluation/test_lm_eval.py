"""lm-evaluation-harness's results through our model and through its Hugging Face backend."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mmalign.data.chat_template import chat_template
from mmalign.data.templates import TEMPLATES
from mmalign.errors import UserError
from mmalign.lm_eval import MmalignLM
from mmalign.tokenizer import Tokenizer

from .conftest import save_llama

REPOSITORY = Path(__file__).resolve().parents[2]
CONTEXT = 96  # tokens: shorter than the longest prompts, so that cutting is compared, too
WORDS = ["river", "stone", "lamp", "seven", "green", "under", "walks", "never", "paper", "cloud"]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": ["no", "yes", "perhaps not"],
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "num_fewshot": 2,
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{passage}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "num_fewshot": 1,
        "generation_kwargs": {"until": ["Question:", "e"], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_model) -> Path:
    """With a tokenizer.json: transformers 5 does not read LLaMA's tokenizer.model rightly."""
    path = tmp_path_factory.mktemp("model")
    save_llama(path, tokenizer_model, seed=3, max_position_embeddings=CONTEXT)
    Tokenizer.from_pretrained(path).save(path)
    return path


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(0)

    def words(n: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(10, (n,), generator=generator))

    documents = [
        {
            "question": words(5 + 9 * (i % 5)) + "?",
            "answer": words(1),
            "label": i % 3,
            "passage": words(10 + 60 * i) + ".",
        }
        for i in range(6)
    ]
    (path / "data.json").write_text("\n".join(map(json.dumps, documents)))
    for name, task in TASKS.items():
        task = task | {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path / "data.json")}},
            "test_split": "test",
            "fewshot_split": "test",
        }
        (path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return path


def evaluate(lm, task_folder: Path, monkeypatch) -> tuple[dict, dict]:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(task_folder / "cache"))
    found = lm_eval.simple_evaluate(
        lm,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    responses = {
        task: [sample["resps"] for sample in sorted(samples, key=lambda x: x["doc_id"])]
        for task, samples in found["samples"].items()
    }
    return found["results"], responses


@pytest.mark.parametrize("add_bos_token", [None, False])
def test_results_equal_the_hugging_face_backend(folder, task_folder, monkeypatch, add_bos_token):
    bos = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    hf = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=3, **bos)
    ours = MmalignLM(pretrained=str(folder), device="cpu", batch_tokens=100, **bos)
    expected, expected_responses = evaluate(hf, task_folder, monkeypatch)
    found, responses = evaluate(ours, task_folder, monkeypatch)
    assert found.keys() == expected.keys() == set(TASKS)
    for task, metrics in expected.items():
        numbers = {name: x for name, x in metrics.items() if isinstance(x, float)}
        assert numbers == pytest.approx({name: found[task][name] for name in numbers}, rel=1e-5)
    assert responses["writing"] == expected_responses["writing"]
    assert len({text for ((text,),) in responses["writing"]}) > 1
    for task in ("choices", "last_word"):
        theirs = [answer for sample in expected_responses[task] for (answer,) in sample]
        mine = [answer for sample in responses[task] for (answer,) in sample]
        assert [x[0] for x in mine] == pytest.approx([x[0] for x in theirs], abs=1e-3)
        assert [x[1] for x in mine] == [x[1] for x in theirs]


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=x, idx=i) for i, x in enumerate(arguments)]


def test_greedy_continuations_empty_contexts_and_written_bos(folder):
    hf = HFLM(pretrained=str(folder), dtype="float32", device="cpu")
    ours = MmalignLM(pretrained=str(folder), device="cpu")
    (written,) = ours.generate_until(
        instances("generate_until", ("green under", {"max_gen_toks": 3}))
    )
    first = ours._tokens.decode(ours._tokens.encode(written)[:1])
    requests = instances(
        "loglikelihood",
        ("green under", " " + first),
        ("green under", " lamp"),
        ("", "paper cloud"),
        ("<s>never", " walks"),
        ("trailing blank ", "walks"),
        ("long " * 200, " walks"),
    )
    expected = hf.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [x[0] for x in found] == pytest.approx([x[0] for x in expected], abs=1e-3)
    assert [x[1] for x in found] == [x[1] for x in expected]


@pytest.mark.parametrize("subcommand", [[], ["run"]], ids=["arguments alone", "run"])
def test_command(folder, task_folder, tmp_path, subcommand):
    command = [sys.executable, "-m", "mmalign.lm_eval", *subcommand, "--model", "mmalign"]
    command += ["--model_args", f"pretrained={folder}", "--include_path", str(task_folder)]
    command += ["--tasks", "choices", "--output_path", str(tmp_path)]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("**/results*.json")
    results = json.loads(path.read_text())
    assert results["config"]["model"] == "mmalign" and results["config"]["add_bos_token"] is True
    assert 0 <= results["results"]["choices"]["acc,none"] <= 1


def test_other_subcommands(task_folder, tmp_path):
    """And an import that registers the model without the command."""
    listed = run([sys.executable, "-m", "mmalign.lm_eval", "ls", "--help"], tmp_path)
    assert listed.returncode == 0 and "tasks" in listed.stdout
    code = "import mmalign.lm_eval, lm_eval.api.registry as r; print(r.get_model('mmalign'), "
    code += "r.get_model('hf'))"
    found = run([sys.executable, "-c", code], tmp_path)
    assert "mmalign.lm_eval.MmalignLM" in found.stdout and "HFLM" in found.stdout, found.stderr


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        cwd=REPOSITORY,
        timeout=300,
        check=False,
    )


def test_what_cannot_be_done(folder):
    lm = MmalignLM(pretrained=str(folder), device="cpu")

    def fails(settings: dict, message: str) -> None:
        with pytest.raises(UserError, match=message):
            lm.generate_until(instances("generate_until", ("river", settings)))

    fails({"max_gen_toks": CONTEXT}, f"max_gen_toks is {CONTEXT}, which leaves no space")
    fails({"num_beams": 4, "max_gen_toks": 4}, "generation_kwargs num_beams: supported are")
    fails({"do_sample": True, "max_gen_toks": 4}, "needs a temperature above 0")
    with pytest.raises(UserError, match="0 continuation tokens"):
        lm.loglikelihood(instances("loglikelihood", ("river", "")), disable_tqdm=True)
    with pytest.raises(UserError, match="--model_args dtype: supported are pretrained, precision,"):
        MmalignLM(pretrained=str(folder), dtype="float16")
    with pytest.raises(UserError, match="precision is 'fp8'"):
        MmalignLM(pretrained=str(folder), precision="fp8")
    for number in (-1, 10**6, "x", True):
        with pytest.raises(UserError, match=f"prefix_token_id is {number!r}; expected the id of a"):
            MmalignLM(pretrained=str(folder), prefix_token_id=number)


def test_chat_template_equals_the_hugging_face_backend(folder, tmp_path):
    """Texts and ids of --apply_chat_template, also of a last message that is to be continued."""
    tokenizer = Tokenizer.from_pretrained(folder)
    shutil.copytree(folder, tmp_path / "model")
    tokenizer.save(tmp_path / "model", 0, chat_template(TEMPLATES["v1"], tokenizer, False))
    ours = MmalignLM(str(tmp_path / "model"), device="cpu")
    theirs = HFLM(str(tmp_path / "model"), device="cpu", dtype="float32")
    assert ours.chat_template(True) == theirs.chat_template(True)
    chat = [
        {"role": "user", "content": "Is a lamp green?"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "Seven?"},
        {"role": "assistant", "content": "The answer is"},
    ]
    for messages, prompt in ((chat[:1], True), (chat[:3], True), (chat, False)):
        text = ours.apply_chat_template(messages, prompt)
        assert text == theirs.apply_chat_template(messages, prompt)
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.tok_encode(text).count(tokenizer.eos_token_id) == 1
    with pytest.raises(
        UserError, match=r"chat_template\.jinja, given a system turn: .* system prompt"
    ):
        ours.apply_chat_template([{"role": "system", "content": "x"}])
    with pytest.raises(UserError, match="has no chat template"):
        MmalignLM(str(folder), device="cpu").chat_template(True)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({}, "needs pretrained=DIR"),
        ({"pretrained": ""}, "needs pretrained=DIR"),
        ({"pretrained": "x", "max_length": 0}, "max_length is 0; expected a number of tokens"),
        ({"pretrained": "x", "cache_tokens": "y"}, "cache_tokens is 'y'"),
        ({"pretrained": "x", "add_bos_token": "maybe"}, "expected True or False"),
    ],
)
def test_arguments_that_cannot_be(arguments, said):
    with pytest.raises(UserError, match=said):
        MmalignLM(**arguments)
