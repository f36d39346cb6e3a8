"""Scores a language model on TruthfulQA and ETHICS and writes results.json and items.jsonl."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmalign.errors import UserError
from mmalign.evaluation.documents import Document
from mmalign.evaluation.items import (
    PROTOCOL,
    describe_model,
    make_folder,
    make_items,
    summarize_tasks,
    write_evaluation,
)
from mmalign.evaluation.report.tables import print_results
from mmalign.evaluation.scoring import ScoringPlan, plan_scoring, run_plan
from mmalign.evaluation.tasks import describe_data, load_documents, resolve_tasks
from mmalign.model.config import DecoderConfig
from mmalign.model.hf import load_decoder
from mmalign.system import DTYPES, choose_device
from mmalign.tokenizer import Tokenizer


def evaluate_model(
    model: str | Path,
    tasks: Sequence[str],
    data_root: str | Path,
    output: str | Path,
    limit: int | None = None,
    batch_tokens: int = 8192,
    precision: str = "fp32",
    device: str = "auto",
    quiet: bool = False,
) -> dict:
    """Scores `model` (a Hugging Face folder or a run) and returns what results.json holds.

    tasks: names as resolve_tasks takes them; data_root holds truthfulqa/ and ethics/; limit keeps
    the first documents of each task. Writes output/items.jsonl, then output/results.json. Prints
    progress and a table unless quiet. Raises UserError for anything wrong with what was given.
    """
    weights, names = find_weights(model), resolve_tasks(tasks)
    if precision not in DTYPES:
        raise UserError(f"precision is {precision!r}; expected one of {', '.join(DTYPES)}")
    target = choose_device(device)
    documents = load_documents(names, data_root, limit)
    config = {"model": str(model), "weights": str(weights), "data_root": str(data_root)}
    config |= {"data_files": describe_data(names, data_root), "limit": limit} | PROTOCOL
    tokenizer = Tokenizer.from_pretrained(weights)
    model_config, seconds = DecoderConfig.from_hf(weights), {}
    # what does not fit together is told before the weights are read
    with _timed(seconds, "tokenise"):
        plan = _plan(documents, tokenizer, model_config, batch_tokens, quiet)
    output = make_folder(output)
    with _timed(seconds, "load"):
        decoder = load_decoder(weights, dtype=DTYPES[precision]).to(target)
    with _timed(seconds, "score"):
        scores = run_plan(decoder, plan, target, progress=not quiet)
    config |= describe_model(tokenizer, model_config.max_position_embeddings, precision)
    config |= {"num_requests": len(plan.unique_of), "batch_tokens": batch_tokens}
    config["cache_bytes"] = plan.cache_bytes(model_config, DTYPES[precision])
    items = make_items(documents, scores)
    results = summarize_tasks(items) | _cost(plan, seconds) | {"config": config}
    write_evaluation(output, items, results)
    if not quiet:
        print_results(results, output)
    return results


def find_weights(model: str | Path) -> Path:
    """The folder with the language model: `model` itself, or export/llama of a run."""
    path = Path(model)
    exported = path / "export" / "llama"
    if exported.is_dir():
        return exported
    if (path / "export").is_dir() or (path / "metrics.jsonl").exists():
        raise UserError(
            f"{path} is a run without export/llama: it is not finished, or it is a pretrain run, "
            "which leaves the language model as it was. Name a finetune run or the base model."
        )
    if not path.is_dir():
        raise UserError(f"{path} is no folder; expected a Hugging Face folder or a run")
    if not (path / "config.json").is_file():
        runs = [str(x.parent.parent) for x in sorted(path.glob("*/export/llama"))]
        if runs:
            raise UserError(f"{path} is no run, but holds some: name {' or '.join(runs)}")
        raise UserError(
            f"{path} is neither a Hugging Face folder (no config.json) nor a run (no export/llama)"
        )
    return path


def _plan(
    documents: dict[str, list[Document]],
    tokenizer: Tokenizer,
    config: DecoderConfig,
    batch_tokens: int,
    quiet: bool,
) -> ScoringPlan:
    flat = [document for rows in documents.values() for document in rows]
    return plan_scoring(
        tokenizer,
        [request for document in flat for request in document.requests],
        config.max_position_embeddings,
        config.vocab_size,
        batch_tokens,
        progress=not quiet,
        names=[document.name for document in flat for _ in document.requests],
    )


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = round(time.perf_counter() - started, 3)


def _cost(plan: ScoringPlan, seconds: dict[str, float]) -> dict:
    """What the evaluation took; tokens of lm-evaluation-harness's Hugging Face backend beside."""
    return {
        "seconds": {phase: seconds[phase] for phase in ("load", "tokenise", "score")},
        "tokens_computed": plan.num_tokens,
        "tokens_computed_by_harness": plan.num_tokens_harness,
    }
