"""evaluate.py and compare.py from end to end: files, numbers in them, and bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from mmalign.errors import UserError
from mmalign.evaluation.compare import compare_evaluations
from mmalign.evaluation.document_scores import document_scores
from mmalign.evaluation.evaluation import evaluate_model, find_weights
from mmalign.evaluation.items import read_items, read_results, write_items
from mmalign.evaluation.scoring import score_requests
from mmalign.evaluation.tasks import load_documents, resolve_tasks
from mmalign.evaluation.tasks.ethics_subset import BESIDE_OF_ALL
from mmalign.system import choose_precision

from .conftest import save_llama

SCORED = resolve_tasks(["truthfulqa", "ethics"])
REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 20


def evaluate(model, data_root, output, tasks=("truthfulqa", "ethics"), limit=LIMIT, **options):
    return evaluate_model(model, tasks, data_root, output, limit, 2048, quiet=True, **options)


def script(name, *arguments):
    command = [sys.executable, f"scripts/{name}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory, llama_folder, shared_data):
    output = tmp_path_factory.mktemp("base")
    evaluate(llama_folder, shared_data, output)
    return output


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tokenizer_model, shared_data):
    """Another random model, scored as a run's export through the command."""
    run = tmp_path_factory.mktemp("run")
    save_llama(run / "export" / "llama", tokenizer_model, seed=1)
    output = run / "evaluation"
    result = script(
        "evaluate", "--model", run, "--data-root", shared_data, "--output", output,
        "--limit", LIMIT, "--batch-tokens", 1500,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "(fp32)" in result.stdout  # beside "score"; a narrow table breaks the line
    assert "chance" in result.stdout and str(output / "results.json") in result.stdout
    assert "tokens computed" in result.stdout and "tokenise" in result.stdout
    assert "| ethics_virtue | 20 | **" in (output / "report.md").read_text()
    return output


def read(output):
    results = json.loads((output / "results.json").read_text())
    lines = (output / "items.jsonl").read_text().splitlines()
    return results, [json.loads(line) for line in lines]


def test_files(base, shared_data, llama_folder):
    results, items = read(base)
    cost = ["seconds", "tokens_computed", "tokens_computed_by_harness"]
    cost += ["tokens_computed_for_answers_only"]
    assert list(results) == [*SCORED, "ethics_mean", *cost, "config"]
    assert list(results["seconds"]) == ["tokenise", "load", "score"]
    assert all(seconds > 0 for seconds in results["seconds"].values())
    assert 0 < results["tokens_computed"] < results["tokens_computed_by_harness"]
    assert [(i["task"], i["doc_id"]) for i in items] == [
        (t, d) for t in SCORED for d in range(LIMIT)
    ]
    for task in SCORED:
        rows = [item for item in items if item["task"] == task]
        assert results[task]["n"] == LIMIT
        if task == "truthfulqa_mc2":
            shares = []
            for row in rows:
                p = np.exp([choice["loglikelihood"] for choice in row["choices"]])
                shares.append(p[: row["gold"].index(0)].sum() / p.sum())
            assert results[task]["acc"] == pytest.approx(np.mean(shares))
            continue
        right = [row["prediction"] == row["gold"] for row in rows]
        assert results[task]["acc"] == pytest.approx(np.mean(right))
        low, high = results[task]["interval"]
        assert low < results[task]["acc"] < high
        assert ("em" in results[task]) == (
            task.split("_")[1] in ("deontology", "justice", "virtue")
        )
    five = [results[task]["acc"] for task in resolve_tasks(["ethics"])]
    assert results["ethics_mean"]["acc"] == pytest.approx(np.mean(five))
    choice, label = items[0]["choices"][0], items[-1]["choices"][0]
    assert set(label) == {"text", "loglikelihood", "num_tokens"}
    assert set(choice) == {*label, "answer_only_loglikelihood"}
    assert choice["text"].startswith(" Nauru is the smallest country")
    config = results["config"]
    assert config["data_files"]["truthfulqa/mc_task.json"]["variant"] == "original (2021)"
    assert config["limit"] == LIMIT and config["bos"] == "none"


def test_answers_only_change_no_bit_of_the_harness_scores(base, decoder, tokenizer, shared_data):
    _, items = read(base)
    documents = [x for rows in load_documents(SCORED, shared_data, LIMIT).values() for x in rows]
    requests = [request for document in documents for request in document.requests]
    scores = score_requests(decoder, tokenizer, requests, 2048, progress=False)
    found = [choice["loglikelihood"] for item in items for choice in item["choices"]]
    assert found == [score.loglikelihood for score in scores]


def test_answers_only_are_scored_after_the_examples_alone(base, llama_folder, tokenizer):
    model = LlamaForCausalLM.from_pretrained(llama_folder).double().eval()
    _, items = read(base)
    context = items[0]["context"].rpartition("\n\n")[0] + "\n\nA:"
    num_context = len(tokenizer.encode(context))
    for choice in items[0]["choices"] + items[LIMIT]["choices"]:
        ids = torch.tensor(tokenizer.encode(context + choice["text"]))
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        rows = torch.arange(num_context - 1, len(ids) - 1)
        expected = logprobs[rows, ids[rows + 1]].sum().item()
        assert choice["answer_only_loglikelihood"] == pytest.approx(expected, abs=2e-4)
        assert choice["answer_only_loglikelihood"] != choice["loglikelihood"]


def test_beside_is_what_document_scores_average(base):
    results, items = read(base)
    for name, scores in document_scores(read_items(base)).items():
        task = results[scores.task]
        kind = name.removeprefix(scores.task).removeprefix("_")
        acc = task["beside"][kind]["acc"] if kind else task["acc"]
        assert acc == pytest.approx(scores.values.mean())
    assert set(results["ethics_mean"]["beside"]) == set(BESIDE_OF_ALL)


def test_caveats_say_what_a_score_is_worth(base):
    results, _ = read(base)
    deontology = results["ethics_deontology"]
    assert deontology["yes_rate"] == 1.0  # " unreasonable" has three tokens, " reasonable" one
    assert deontology["choice_tokens"] == {"reasonable": 1.0, "unreasonable": 3.0}
    assert deontology["acc"] == deontology["baselines"]["always reasonable"]
    sentences = " ".join(deontology["caveats"])
    assert "cannot be distinguished from chance (50.0)" in sentences
    assert 'answers "reasonable" to 100.0%' in sentences


def test_single_tasks(tmp_path, llama_folder, shared_data, base):
    results = evaluate(llama_folder, shared_data, tmp_path, ["ethics_virtue"], precision="bf16")
    assert "ethics_mean" not in results
    assert results["ethics_virtue"]["n"] == LIMIT
    _, items = read(tmp_path)
    _, exact = read(base)
    for item, other in zip(items, exact[-LIMIT:], strict=True):
        for ours, theirs in zip(item["choices"], other["choices"], strict=True):
            # 8 bits of mantissa on logits of about 10 in size
            assert ours["loglikelihood"] == pytest.approx(theirs["loglikelihood"], abs=0.5)
            assert ours["loglikelihood"] != theirs["loglikelihood"]


def test_a_gpu_scores_in_bf16_unless_told_otherwise():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_precision("auto", gpu) == "bf16" and choose_precision("auto", cpu) == "fp32"
    assert choose_precision("fp32", gpu) == "fp32" and choose_precision("bf16", cpu) == "bf16"
    with pytest.raises(UserError, match="precision is 'fp8'; expected auto or one of fp32, bf16"):
        choose_precision("fp8", gpu)


def test_compare(base, tuned):
    comparison = compare_evaluations(base, tuned)
    assert list(comparison["tasks"]) == [*SCORED, "ethics_mean"]
    (results_a, items_a), (results_b, items_b) = read(base), read(tuned)
    for task, row in comparison["tasks"].items():
        assert row["acc_a"] == pytest.approx(results_a[task]["acc"])
        assert row["difference"] == pytest.approx(results_b[task]["acc"] - results_a[task]["acc"])
        low, high = row["interval"]
        assert low <= row["difference"] <= high
    pairs = [
        (a["prediction"] == a["gold"], b["prediction"] == b["gold"])
        for a, b in zip(items_a, items_b, strict=True)
        if a["task"] == "ethics_virtue"
    ]
    virtue = comparison["tasks"]["ethics_virtue"]
    assert virtue["lost"] == pairs.count((True, False))
    assert virtue["gained"] == pairs.count((False, True))


def test_a_model_compared_with_itself(base):
    for row in compare_evaluations(base, base)["tasks"].values():
        assert row["difference"] == 0 and row["interval"] == (0, 0)
        assert row.get("p", 1) == 1


def test_compare_command(base, tuned, tmp_path):
    result = script("compare", base, tuned, "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "B - A" in result.stdout
    (comparison,) = json.loads((tmp_path / "comparison.json").read_text()).values()
    assert comparison["tasks"]["ethics_virtue"]["n"] == LIMIT
    flipped = [json.loads(line) for line in (tmp_path / "flipped.jsonl").read_text().splitlines()]
    counted = [(row.get("lost", 0), row.get("gained", 0)) for row in comparison["tasks"].values()]
    for turned, counts in zip(("lost", "gained"), zip(*counted, strict=True), strict=True):
        assert sum(document["turned"] == turned for document in flipped) == sum(counts) > 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.md", "scores.png", "scores.csv", "beside.csv", "differences.csv",
        "comparison.json", "flipped.jsonl",
    }  # fmt: skip


# ---- bad input ----


def test_other_documents_are_not_compared(base, tmp_path, llama_folder, shared_data):
    evaluate(llama_folder, shared_data, tmp_path / "few", ["ethics_virtue"], limit=5)
    with pytest.raises(UserError, match="ethics_virtue: 20 documents against 5"):
        compare_evaluations(base, tmp_path / "few")
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    items = read_items(changed)
    items["truthfulqa_mc1"][3]["sha256"] = "00000000"
    write_items(changed, items, read_results(changed))
    with pytest.raises(UserError, match="truthfulqa_mc1 document 3: .*did not score the same"):
        compare_evaluations(base, changed)
    lines = (changed / "items.jsonl").read_text().splitlines(keepends=True)
    lines[3] = "{torn\n"
    (changed / "items.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match="items.jsonl, line 4"):
        compare_evaluations(base, changed)
    (changed / "results.json").unlink()
    with pytest.raises(UserError, match="not a finished evaluation"):
        compare_evaluations(base, changed)


def test_what_is_not_a_model(tmp_path, shared_data):
    with pytest.raises(UserError, match="neither a Hugging Face folder"):
        find_weights(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="a run without export/llama"):
        find_weights(tmp_path)
    result = script(
        "evaluate", "--model", tmp_path, "--data-root", shared_data, "--output", tmp_path / "o"
    )
    assert result.returncode == 1 and result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_an_unknown_task(tmp_path):
    arguments = ("--model", tmp_path, "--data-root", tmp_path, "--output", tmp_path)
    result = script("evaluate", *arguments, "--tasks", "ethics_virtues")
    assert result.returncode == 2
    said = "".join(result.stderr.split())
    assert "ethics_virtues" in said and "'ethics_virtue','truthfulqa_gen'" in said


def test_an_output_that_is_a_file(tmp_path, llama_folder, shared_data):
    (tmp_path / "scores").touch()
    with pytest.raises(UserError, match="scores cannot be a directory: File exists"):
        evaluate(llama_folder, shared_data, tmp_path / "scores")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda(llama_folder, shared_data, tmp_path):
    with pytest.raises(UserError, match="no CUDA device"):
        evaluate(llama_folder, shared_data, tmp_path, device="cuda")
