"""Scores of the language model while it trains: base model, every N steps, and all at the end.

Each evaluation leaves a folder run_dir/evaluation/step_N, all/ at the end, in evaluate.py's form:
compare.py takes any two that hold the same documents. Nothing of the training changes: no draw is
made, no weight is written, and which documents are scored depends on the configuration alone.
"""

import logging
import time
from collections.abc import Mapping

import numpy as np
from tqdm import tqdm

from mmalign.config import TrainConfig
from mmalign.data.check import CheckReport
from mmalign.distributed import DistributedContext
from mmalign.errors import UserError
from mmalign.evaluation.caveats import percent
from mmalign.evaluation.documents import Document
from mmalign.evaluation.items import (
    PROTOCOL,
    Items,
    describe_model,
    make_items,
    read_results,
    summarize_tasks,
    write_evaluation,
)
from mmalign.evaluation.metrics import task_results
from mmalign.evaluation.scoring import ScoringPlan, plan_scoring, run_plan
from mmalign.evaluation.tasks import describe_data, load_documents, resolve_tasks
from mmalign.model.config import DecoderConfig
from mmalign.model.decoder import Decoder
from mmalign.model.llava import Llava
from mmalign.tokenizer import Tokenizer

log = logging.getLogger("mmalign")
MAX_SHARE = 0.05  # of the run's arithmetic
FEWEST_DOCUMENTS = 20  # of a task; whole groups of 4 (deontology, justice) and of 5 (virtue)
# forward and backward pass, with LoRA; training all weights costs 3, and an image comes on top
_FORWARDS_A_TRAINED_TOKEN = 2

Documents = Mapping[str, list[Document]]


class EvaluationDuringTraining:
    """Does nothing where config.evaluation.every is 0."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: DistributedContext,
        tokenizer: Tokenizer,
        report: CheckReport,
        num_steps: int,
    ):
        """Raises UserError where there is nothing to score or it would cost more than its share."""
        self.config, self.settings, self.ranks = config, config.evaluation, ranks
        self.tokenizer, self.num_steps = tokenizer, num_steps
        self.folder = config.run_dir / "evaluation"
        self.seconds, self.started = 0.0, time.perf_counter()
        self.scores, self.scored_step = {}, None
        self.plan: ScoringPlan | None = None  # of the fixed documents, made once
        if not self.settings.every:
            return
        _require_finetuning(config)
        tasks = resolve_tasks(self.settings.tasks)
        self.documents = load_documents(tasks, self.settings.data_root)
        self.model_config = DecoderConfig.from_hf(config.model.decoder)
        # sharded weights are gathered by all processes together, so each scores everything
        self.replicated = config.parallel.is_sharded(ranks.world_size)
        trained = float(np.mean(report.lengths)) * config.global_batch_size * num_steps
        self.limit = ranks.broadcast_from_main(
            self._choose_limit(trained) if ranks.is_main else None
        )

    def catch_up(self, step: int, model: Llava) -> None:
        """Before the first step of this process: the base model, or what a kill left undone."""
        if not self.is_due(step):
            return
        name = "all" if step == self.num_steps else f"step_{step}"
        if not self.ranks.broadcast_from_main((self.folder / name / "results.json").exists()):
            self.after(step, model)

    def is_due(self, step: int) -> bool:
        every = self.settings.every
        return every > 0 and (step % every == 0 or step == self.num_steps)

    def fields(self, step: int) -> dict[str, float]:
        """Scores for the line of `step` in metrics.jsonl; none where it was not evaluated."""
        return self.scores if step == self.scored_step else {}

    def after(self, step: int, model: Llava) -> None:
        """Scores the model, which has `step` steps behind it; called by all processes."""
        started, last = time.perf_counter(), step == self.num_steps
        documents = self.documents if last else self._first(self.limit)
        if last:
            self.plan = None
        items = self._score(documents, model)
        if not self.ranks.is_main:
            return
        scored = round(time.perf_counter() - started, 3)
        if last:
            self._write("all", step, items, scored, None)
            items = {task: rows[: self.limit] for task, rows in items.items()}
        summaries = self._write(f"step_{step}", step, items, scored, self.limit)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self._report(step, summaries, seconds, last)
        self.scores = {f"evaluation/{task}": x["acc"] for task, x in summaries.items()}
        self.scores["evaluation_seconds"] = seconds
        self.scored_step = step

    # ---- scoring ----

    def _score(self, documents: Documents, model: Llava) -> Items:
        """Items on the main process, nothing on the others."""
        parts = 1 if self.replicated else self.ranks.world_size
        # a question's mc1 and mc2 share their prefix, so they stay on one process
        mine = {
            task: [doc for doc in rows if doc.doc_id % parts == self.ranks.rank % parts]
            for task, rows in documents.items()
        }
        self.plan = self.plan or self._plan(mine)
        plan, device = self.plan, self.ranks.device

        def score(decoder: Decoder):
            return run_plan(decoder, plan, device, progress=False)

        remaining = iter(model.with_decoder(score))
        scores = {
            (task, doc.doc_id): [next(remaining) for _ in doc.requests]
            for task, rows in mine.items()
            for doc in rows
        }
        if parts > 1:
            gathered = self.ranks.gather_to_main(scores)
            scores = {key: value for part in gathered for key, value in part.items()}
        if not self.ranks.is_main:
            return {}
        in_order = [scores[task, doc.doc_id] for task, rows in documents.items() for doc in rows]
        return make_items(documents, [score for scores in in_order for score in scores])

    def _plan(self, documents: Documents) -> ScoringPlan:
        flat = [doc for rows in documents.values() for doc in rows]
        return plan_scoring(
            self.tokenizer,
            [request for doc in flat for request in doc.requests],
            self.model_config.max_position_embeddings,
            self.model_config.vocab_size,
            self.settings.batch_tokens,
            progress=False,
            names=[doc.name for doc in flat for _ in doc.requests],
        )

    def _first(self, limit: int | None) -> Documents:
        return {task: rows[:limit] for task, rows in self.documents.items()}

    # ---- which documents ----

    def _choose_limit(self, trained_tokens: float) -> int | None:
        """Documents of a task before the end: given, or as many as the share of 5% allows.

        A continued run keeps the number that it began with, whatever the number of processes.
        """
        for begun in self.folder.glob("step_*/results.json"):
            return read_results(begun.parent)["config"]["limit"]
        copies = self.ranks.world_size if self.replicated else 1
        forwards = _FORWARDS_A_TRAINED_TOKEN * trained_tokens / copies
        times = -(-self.num_steps // self.settings.every)  # the base model's among them
        everything = self._plan(self.documents).num_tokens

        def share(limit: int) -> float:
            return (times * self._plan(self._first(limit)).num_tokens + everything) / forwards

        limit = self.settings.limit
        if limit is None:
            most = max(map(len, self.documents.values()))
            limit = largest_limit(share, most, f"{everything / forwards:.1%}")
        log.info(
            "evaluation: the first %d documents of each task %d times, all %d at the end; "
            "at most %.1f%% of the run's arithmetic",
            limit,
            times,
            sum(map(len, self.documents.values())),
            100 * share(limit),
        )
        return limit

    # ---- what it leaves behind ----

    def _write(
        self, name: str, step: int, items: Items, seconds: float, limit: int | None
    ) -> dict[str, dict]:
        summaries = summarize_tasks(items)
        data_root, tasks = self.settings.data_root, list(items)
        config = {"model": f"{self.config.run_dir} after step {step}", "data_root": data_root}
        config |= {"data_files": describe_data(tasks, data_root)} | PROTOCOL | {"limit": limit}
        max_length = self.model_config.max_position_embeddings
        config |= describe_model(self.tokenizer, max_length, self.config.precision)
        config["num_requests"] = sum(len(x["choices"]) for rows in items.values() for x in rows)
        cost = {"step": step, "seconds": {"score": seconds}}
        write_evaluation(self.folder / name, items, summaries | cost | {"config": config})
        return task_results(summaries)

    def _report(self, step: int, summaries: dict, seconds: float, last: bool) -> None:
        scores = ", ".join(f"{task} {percent(x['acc'])}" for task, x in summaries.items())
        with tqdm.external_write_mode():  # the progress bar makes room for the lines
            log.info("scores after step %d: %s (%.1f s)", step, scores, seconds)
            if last:
                share = self.seconds / (time.perf_counter() - self.started)
                log.info("evaluation took %.1f s, %.1f%% of this run", self.seconds, 100 * share)


def largest_limit(share, most: int, share_of_the_end: str) -> int:
    """The largest of 20, 40, 80, ... documents whose share(limit) of the run is below 5%.

    Raises UserError where not even 20 fit.
    """
    fitting, limit = None, FEWEST_DOCUMENTS
    while share(limit) < MAX_SHARE:
        fitting = limit
        if limit >= most:
            break
        limit *= 2
    if fitting is None:
        raise UserError(
            f"scoring {FEWEST_DOCUMENTS} documents of each task would take up to "
            f"{share(FEWEST_DOCUMENTS):.0%} of the arithmetic of this run (all documents at the "
            f"end: {share_of_the_end}), more than {MAX_SHARE:.0%}. Raise --evaluation.every, name "
            "fewer --evaluation.tasks, or take the cost with --evaluation.limit N documents a task"
        )
    return fitting


def _require_finetuning(config: TrainConfig) -> None:
    if config.stage == "pretrain":
        raise UserError(
            "--evaluation.every: stage pretrain leaves the language model as it is, so its scores "
            "would be the base model's at every step. Evaluate the base model once with "
            "scripts/evaluate.py, and use --evaluation.every in stage finetune"
        )
    if not config.evaluation.data_root:
        raise UserError(
            "--evaluation.every needs --evaluation.data-root, the folder with truthfulqa/ and "
            "ethics/"
        )
