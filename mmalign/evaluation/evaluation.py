"""Scores a language model on tasks and writes results.json and items.jsonl."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from mmalign.errors import UserError
from mmalign.evaluation.beside import summarize_beside
from mmalign.evaluation.items import FILES, PROTOCOL, Items, require_no_loss, write_items
from mmalign.evaluation.report.tables import print_results
from mmalign.evaluation.requests import Request
from mmalign.evaluation.scoring import Score, ScoringPlan, plan_scoring, run_plan
from mmalign.evaluation.tasks import (
    TASKS,
    Documents,
    describe_data,
    load_documents,
    resolve_tasks,
    summarize,
)
from mmalign.evaluation.tasks.free_form import FreeForm, OpenDocument
from mmalign.evaluation.tasks.multiple_choice import Document
from mmalign.evaluation.warm_up import compiled_kernels
from mmalign.model.config import DecoderConfig
from mmalign.model.decoder import Decoder
from mmalign.model.generate import Generation, Prompt, generate
from mmalign.model.hf import load_decoder
from mmalign.model.llava import Llava
from mmalign.ownership import owned, require_names
from mmalign.system import DTYPES, choose_device, choose_precision, versions
from mmalign.tokenizer import Tokenizer
from mmalign.validation import check

Answers = dict[tuple[str, int], list[Score] | Generation]  # by task and doc_id


@dataclass(frozen=True)
class Plan:
    """What the model is asked about some documents, in tokens."""

    documents: Documents
    scoring: ScoringPlan  # requests of the tasks that are scored by log-likelihoods
    answers_only: ScoringPlan  # apart, because requests in one batch change others by rounding
    prompts: dict[str, list[Prompt]]  # by task, of those that generate

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model for log-likelihoods."""
        return self.scoring.num_tokens + self.answers_only.num_tokens


@dataclass(frozen=True)
class Evaluation:
    """How models of one tokenizer and shape are evaluated: plan, score, write."""

    data_root: str | Path
    tokenizer: Tokenizer
    model_config: DecoderConfig
    batch_tokens: int
    precision: str
    progress: bool = False

    def plan(self, documents: Documents) -> Plan:
        """Tokenises everything; raises UserError for what the model's context cannot hold."""
        scored = _scored(documents)
        scoring = self._plan_scoring([(x.name, request) for x in scored for request in x.requests])
        alone = self._plan_scoring(
            [(x.name, request) for x in scored for request in x.answers_only]
        )
        prompts = {
            task.name: self._prompts(task, documents[task.name]) for task in _generated(documents)
        }
        return Plan(documents, scoring, alone, prompts)

    def _plan_scoring(self, named: Sequence[tuple[str, Request]]) -> ScoringPlan:
        return plan_scoring(
            self.tokenizer,
            [request for _, request in named],
            self.model_config.context_length,
            self.model_config.vocab_size,
            self.batch_tokens,
            progress=self.progress and bool(named),
            names=[name for name, _ in named],
        )

    def _prompts(self, task: FreeForm, documents: Sequence[OpenDocument]) -> list[Prompt]:
        prompts = [Prompt(self.tokenizer.encode(document.prompt)) for document in documents]
        longest = max(len(prompt.input_ids) for prompt in prompts)
        num_new, context = task.options.max_new_tokens, self.model_config.context_length
        if longest + num_new > context:
            raise UserError(
                f"{task.name}: the longest prompt has {longest} tokens and its answer up to "
                f"{num_new}, more than the model's context of {context}. Leave this task out or "
                "evaluate a model with a longer context"
            )
        return prompts

    def score(
        self,
        decoder: Decoder,
        plan: Plan,
        device: torch.device,
        after_batch: Callable[[], None] | None = None,
    ) -> Answers:
        """Log-likelihoods of all requests; after_batch may raise, to end it."""
        if not plan.scoring.encoded:
            return {}
        scores, alone = (
            iter(run_plan(decoder, part, device, self.progress, after_batch=after_batch))
            if part.encoded
            else iter(())
            for part in (plan.scoring, plan.answers_only)
        )
        return {
            (document.task, document.doc_id): [
                *islice(scores, len(document.requests)),
                *islice(alone, len(document.answers_only)),
            ]
            for document in _scored(plan.documents)
        }

    def generate(self, decoder: Decoder, plan: Plan) -> Answers:
        """The model's continuations of all prompts."""
        llava, answers = Llava(decoder, None, None, self.tokenizer), {}
        for task in _generated(plan.documents):
            prompts, documents = plan.prompts[task.name], plan.documents[task.name]
            found = generate(llava, self.tokenizer, prompts, task.options, progress=self.progress)
            for document, generation in zip(documents, found, strict=True):
                answers[task.name, document.doc_id] = generation
        return answers

    def write(self, output: Path, items: Items, about: dict, cost: dict) -> dict:
        """Writes items.jsonl, then results.json, and returns what the latter holds.

        about: what the caller knows of model and documents, for "config"; cost: "seconds" and more.
        """
        config = PROTOCOL | about | {"data_files": describe_data(items, self.data_root)}
        config |= {
            "tasks": {task: TASKS[task].protocol() for task in items},
            "tokenizer": f"{self.tokenizer.path.name}, {self.tokenizer.vocab_size:,} tokens",
            "tokenizer_sha256": self.tokenizer.fingerprint,
            "max_length": self.model_config.context_length,
            "precision": self.precision,
            "versions": versions(),
            "num_requests": sum(len(x.get("choices", ())) for rows in items.values() for x in rows),
            "batch_tokens": self.batch_tokens,
        }
        results = summarize(items)
        for name, rows in summarize_beside(items).items():
            results[name]["beside"] = rows
        results |= cost | {"config": config}
        write_items(output, items, results)
        return results


def make_items(documents: Documents, answers: Answers) -> Items:
    return {
        task: TASKS[task].make_items(rows, [answers[task, document.doc_id] for document in rows])
        for task, rows in documents.items()
    }


def _scored(documents: Documents) -> list[Document]:
    names = [name for name in documents if TASKS[name].kind == "loglikelihood"]
    return [document for name in names for document in documents[name]]


def _generated(documents: Documents) -> list[FreeForm]:
    return [task for name in documents if isinstance(task := TASKS[name], FreeForm)]


# ---- the command ----


def evaluate_model(
    model: str | Path,
    tasks: Sequence[str],
    data_root: str | Path,
    output: str | Path,
    limit: int | None = None,
    batch_tokens: int = 8192,
    precision: str = "auto",
    device: str = "auto",
    quiet: bool = False,
    overwrite: bool = False,
) -> dict:
    """Scores `model` (a Hugging Face folder or a run) and returns what results.json holds.

    tasks: names that resolve_tasks knows; data_root holds their files; limit keeps the first
    documents of each task. Writes output/items.jsonl and output/results.json, which replace earlier
    ones when both are complete; those of another model, of other tasks or of more documents only
    with overwrite. Prints progress and a table unless quiet. Raises UserError for bad arguments,
    data or weights, and for an output that another process writes.
    """
    check("limit", limit)
    check("batch_tokens", batch_tokens)
    with owned(output, "--output"):
        require_names(output, FILES)
        if not overwrite:
            require_no_loss(Path(output), find_weights(model), resolve_tasks(tasks), limit)
        return _evaluate(
            model, tasks, data_root, Path(output), limit, batch_tokens, precision, device, quiet
        )


def _evaluate(
    model: str | Path,
    tasks: Sequence[str],
    data_root: str | Path,
    output: Path,
    limit: int | None,
    batch_tokens: int,
    precision: str,
    device: str,
    quiet: bool,
) -> dict:
    weights, names = find_weights(model), resolve_tasks(tasks)
    target, seconds = choose_device(device), {}
    precision = choose_precision(precision, target)
    documents = load_documents(names, data_root, limit)
    model_config, tokenizer = DecoderConfig.from_hf(weights), Tokenizer.from_pretrained(weights)
    evaluation = Evaluation(
        data_root, tokenizer, model_config, batch_tokens, precision, progress=not quiet
    )
    scores, answers = (bool(find(documents)) for find in (_scored, _generated))
    with compiled_kernels(weights, DTYPES[precision], target, scores, answers):
        with _timed(seconds, "tokenise"):  # checks compatibility before loading weights
            plan = evaluation.plan(documents)
        with _timed(seconds, "load"):
            decoder = load_decoder(weights, dtype=DTYPES[precision]).to(target)
    answers = _run(evaluation, decoder, plan, target, seconds)
    about = {"model": str(model), "weights": str(weights.resolve()), "data_root": str(data_root)}
    cache_bytes = plan.scoring.cache_bytes(model_config, DTYPES[precision])
    about |= {"limit": limit, "cache_bytes": cache_bytes}
    items = make_items(documents, answers)
    results = evaluation.write(output, items, about, _cost(plan, seconds))
    if not quiet:
        print_results(results, output)
    return results


def _run(
    evaluation: Evaluation,
    decoder: Decoder,
    plan: Plan,
    device: torch.device,
    seconds: dict[str, float],
) -> Answers:
    answers: Answers = {}
    if plan.scoring.encoded:
        with _timed(seconds, "score"):
            answers |= evaluation.score(decoder, plan, device)
    if plan.prompts:
        with _timed(seconds, "generate"):
            answers |= evaluation.generate(decoder, plan)
    return answers


def find_weights(model: str | Path) -> Path:
    """The folder with the language model: `model` itself, or export/llama of a run."""
    path = Path(model)
    exported = path / "export" / "llama"
    if exported.is_dir():
        return exported
    if (path / "export").is_dir() or (path / "metrics.jsonl").exists():
        raise UserError(
            f"{path} is a run without export/llama: it is unfinished, or it is a pretrain run, "
            "which does not change the language model. Name a finetune run or the base model"
        )
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; name a Hugging Face folder or a run")
    if not (path / "config.json").is_file():
        runs = [str(x.parent.parent) for x in sorted(path.glob("*/export/llama"))]
        if runs:
            raise UserError(f"{path} is not a run; it contains runs: name {' or '.join(runs)}")
        raise UserError(
            f"{path} is neither a Hugging Face folder (no config.json) nor a run (no "
            "export/llama); name one of these"
        )
    return path


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = round(time.perf_counter() - started, 3)


def _cost(plan: Plan, seconds: dict[str, float]) -> dict:
    """Time and tokens of the evaluation, with the harness's Hugging Face backend to compare."""
    return {
        "seconds": seconds,
        "tokens_computed": plan.scoring.num_tokens,
        "tokens_computed_by_harness": plan.scoring.num_tokens_harness,
        "tokens_computed_for_answers_only": plan.answers_only.num_tokens,
    }
