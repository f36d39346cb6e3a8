"""Lets a language model answer TruthfulQA in writing; scores, files and table."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mmalign.errors import UserError
from mmalign.evaluation.evaluation import find_weights
from mmalign.evaluation.items import PROTOCOL, describe_model, make_folder
from mmalign.evaluation.report.tables import make_table, open_console
from mmalign.evaluation.tasks import GENERATION_TASK
from mmalign.evaluation.tasks.truthfulqa_gen import (
    CONSTANT_ANSWER,
    METRICS,
    OPTIONS,
    Question,
    Similarity,
    describe_data,
    load_questions,
    load_similarity,
    score_answer,
    summarize,
)
from mmalign.model.config import DecoderConfig
from mmalign.model.generate import Generation, Prompt, generate
from mmalign.model.hf import load_decoder
from mmalign.model.llava import Llava
from mmalign.system import DTYPES, choose_device
from mmalign.tokenizer import Tokenizer


def evaluate_written_answers(
    model: str | Path,
    data_root: str | Path,
    output: str | Path,
    limit: int | None = None,
    precision: str = "fp32",
    device: str = "auto",
    cache_tokens: int = 16384,
    quiet: bool = False,
) -> dict:
    """Scores of `model`, a Hugging Face folder or a run, as truthfulqa_gen.json holds them.

    data_root holds truthfulqa/TruthfulQA.csv; limit keeps its first questions; cache_tokens: as in
    generate. Writes output/truthfulqa_gen.jsonl, then output/truthfulqa_gen.json. Prints progress
    and a table unless quiet. Raises UserError for anything wrong with what was given.
    """
    weights, similarity = find_weights(model), load_similarity()
    questions, target = load_questions(data_root, limit), choose_device(device)
    tokenizer, max_length = Tokenizer.from_pretrained(weights), _max_length(weights)
    prompts, output = _encode(questions, tokenizer, max_length), make_folder(output)
    config = {"model": str(model), "weights": str(weights), "data": describe_data(data_root)}
    config |= PROTOCOL | {"score": "BLEU and ROUGE, 0 to 100", "generation": asdict(OPTIONS)}
    config |= {"limit": limit, "cache_tokens": cache_tokens}
    config |= describe_model(tokenizer, max_length, precision)
    config["versions"] |= {name: version(name) for name in ("sacrebleu", "rouge-score")}
    started = time.perf_counter()
    decoder = load_decoder(weights, DTYPES[precision]).to(target)
    loaded = time.perf_counter()
    llava = Llava(decoder, None, None, tokenizer)
    answers = generate(llava, tokenizer, prompts, OPTIONS, cache_tokens, progress=not quiet)
    seconds = {"load": loaded - started, "generate": time.perf_counter() - loaded}
    rows, summary = _score(questions, answers, similarity)
    results = {
        GENERATION_TASK: summary,
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "config": config,
    }
    _write(output, questions, answers, rows, results)
    if not quiet:
        print_scores(results, output)
    return results


def _max_length(weights: Path) -> int:
    return DecoderConfig.from_hf(weights).max_position_embeddings


def _encode(questions: Sequence[Question], tokenizer: Tokenizer, max_length: int) -> list[Prompt]:
    prompts = [Prompt(tokenizer.encode(question.prompt)) for question in questions]
    longest = max(len(prompt.input_ids) for prompt in prompts)
    if longest + OPTIONS.max_new_tokens > max_length:
        raise UserError(
            f"{GENERATION_TASK}: the longest prompt has {longest} tokens and its answer up to "
            f"{OPTIONS.max_new_tokens}, which the model's context of {max_length} does not hold"
        )
    return prompts


def _score(
    questions: Sequence[Question], answers: Sequence[Generation], similarity: Similarity
) -> tuple[list[dict], dict]:
    """Scores of each answer, and their summary."""
    pairs = zip(questions, answers, strict=True)
    rows = [score_answer(question, answer.text.strip(), similarity) for question, answer in pairs]
    constant = [score_answer(question, CONSTANT_ANSWER, similarity) for question in questions]
    num_unfinished = sum(answer.reason == "length" for answer in answers)
    return rows, summarize(rows, constant) | {"num_unfinished": num_unfinished}


def _write(
    output: Path,
    questions: Sequence[Question],
    answers: Sequence[Generation],
    rows: Sequence[dict[str, float]],
    results: dict,
) -> None:
    """truthfulqa_gen.json appears last and whole: it stands for a finished evaluation."""
    path = output / f"{GENERATION_TASK}.json"
    path.unlink(missing_ok=True)
    lines = [
        {"doc_id": i, "question": question.text, "answer": answer.text.strip()}
        | {"reason": answer.reason, "scores": row}
        for i, (question, answer, row) in enumerate(zip(questions, answers, rows, strict=True))
    ]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torn = path.with_suffix(".tmp")
    torn.write_text(json.dumps(results, indent=2) + "\n")
    torn.rename(path)


def print_scores(results: dict, output: Path) -> None:
    """Every metric with intervals, and what the constant answer scores."""
    console, config, summary = open_console(), results["config"], results[GENERATION_TASK]
    headings = ("max", "diff", "95% interval", "constant", "acc", "95% interval", "constant")
    table = make_table(f"[bold]{config['model']}[/bold]", GENERATION_TASK, *headings)
    for name in METRICS:
        most, diff, right = (summary[f"{name}_{kind}"] for kind in ("max", "diff", "acc"))
        right = {key: np.multiply(100, value) for key, value in right.items()}
        table.add_row(name, f"{most['mean']:.1f}", *_cells(diff), *_cells(right))
    console.print(table)
    data, seconds = config["data"], results["seconds"]
    console.print(
        f"{summary['n']:,} questions; {summary['num_unfinished']:,} answers ran to "
        f"{OPTIONS.max_new_tokens} tokens\n"
        'constant: always "I have no comment", which is a true reference of every question\n'
        f"prompts of {config['prompts']}; no BOS; greedy up to the first full stop\n"
        f"{data['file']}: {data['variant']}, sha256 {data['sha256'][:16]}\n"
        f"load {seconds['load']:,.1f} s, generate {seconds['generate']:,.1f} s\n"
        f"results: {output / f'{GENERATION_TASK}.json'}\n"
        f"answers: {output / f'{GENERATION_TASK}.jsonl'}"
    )


def _cells(score: dict) -> list[str]:
    low, high = score["interval"]
    return [f"{score['mean']:.1f}", f"{low:.1f} to {high:.1f}", f"{score['constant']:.1f}"]
