"""Scores of the language model during training: base model, every N steps, everything at the end.

Each evaluation writes a folder run_dir/evaluation/step_N (all/ at the end) in evaluate.py's form,
so compare.py takes any two that contain the same documents. Training is unaffected: nothing is
drawn, no weight is written, and the configuration alone decides which documents are scored.
"""

import logging
import time

import numpy as np

from mmalign.command import Stopped, StopSignal
from mmalign.config import TrainConfig
from mmalign.data.check import CheckReport
from mmalign.distributed import DistributedContext
from mmalign.errors import UserError
from mmalign.evaluation.evaluation import Answers, Evaluation, Plan, make_items
from mmalign.evaluation.items import Items, is_finished, read_results
from mmalign.evaluation.metrics import percent
from mmalign.evaluation.tasks import TASKS, Documents, load_documents, resolve_tasks, score_rows
from mmalign.model.config import DecoderConfig
from mmalign.model.llava import Llava
from mmalign.tokenizer import Tokenizer

log = logging.getLogger("mmalign")
MAX_SHARE = 0.05  # of the run's FLOPs
MIN_DOCUMENTS = 20  # per task; whole groups of 4 (deontology, justice) and of 5 (virtue)
# forward and backward pass, with LoRA; training all weights costs 3, and an image comes on top
_FORWARDS_PER_TRAINED_TOKEN = 2


class EvaluationDuringTraining:
    """When the model is evaluated, and on how many documents; for config.evaluation.every > 0."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: DistributedContext,
        tokenizer: Tokenizer,
        report: CheckReport,
        num_steps: int,
        stop: StopSignal,
    ):
        """Raises UserError where nothing can be scored, or it would cost more than MAX_SHARE."""
        _require_finetuning(config)
        self.config, self.settings, self.ranks = config, config.evaluation, ranks
        self.stop = stop
        self.num_steps, self.folder = num_steps, config.run_dir / "evaluation"
        tasks = _scored_tasks(self.settings.tasks)
        self.documents: Documents = load_documents(tasks, self.settings.data_root)
        self.evaluation = Evaluation(
            self.settings.data_root,
            tokenizer,
            DecoderConfig.from_hf(config.model.decoder),
            self.settings.batch_tokens,
            config.precision,
        )
        # sharded weights are gathered by all processes together, so each scores everything
        self.sharded = config.parallel.is_sharded(ranks.world_size)
        trained = float(np.mean(report.lengths)) * config.global_batch_size * num_steps
        self.limit = ranks.broadcast_from_main(
            self._choose_limit(trained) if ranks.is_main else None
        )
        self.plan: Plan | None = None  # of the first `limit` documents, made once
        self.scores: dict[str, float] = {}  # of the last evaluation, for metrics.jsonl
        self.seconds, self.started = 0.0, time.perf_counter()

    def catch_up(self, first_step: int, model: Llava) -> None:
        """Before the first step of this process: the base model, or what a kill left undone."""
        if not self.is_due(first_step):
            return
        name = "all" if first_step == self.num_steps else f"step_{first_step}"
        if not self.ranks.broadcast_from_main(is_finished(self.folder / name)):
            self.after(first_step, model)

    def is_due(self, step: int) -> bool:
        return step % self.settings.every == 0 or step == self.num_steps

    def after(self, step: int, model: Llava) -> None:
        """Scores the model, which has completed `step` steps; called by all processes.

        Raises Stopped, on all of them, soon after a signal: its caller has saved the step.
        """
        started, last = time.perf_counter(), step == self.num_steps
        items = self._score(last, model)
        if not self.ranks.is_main:
            return
        scored = round(time.perf_counter() - started, 3)
        if last:
            self._write("all", step, items, scored, None)
            items = {task: rows[: self.limit] for task, rows in items.items()}
        rows = score_rows(self._write(f"step_{step}", step, items, scored, self.limit))
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self._report(step, rows, seconds, last)
        self.scores = {f"evaluation/{name}": row["acc"] for name, row in rows.items()}
        self.scores["evaluation_seconds"] = seconds

    # ---- scoring ----

    def _score(self, everything: bool, model: Llava) -> Items:
        """Items on the main process, nothing on the others."""
        documents = self.documents if everything else self._first(self.limit)
        answers = {}
        try:
            with self.stop.raising(not self.sharded):  # sharded, the ranks stop between batches
                answers = self._answers(everything, documents, model)
            stopped = False
        except Stopped:
            stopped = True
        if self.ranks.any(stopped):
            raise Stopped()
        if not self.sharded:
            shares = self.ranks.gather_to_main(answers)
            answers = {key: value for share in shares for key, value in share.items()}
        return make_items(documents, answers) if self.ranks.is_main else {}

    def _answers(self, everything: bool, documents: Documents, model: Llava) -> Answers:
        plan = self.plan
        if everything or plan is None:
            plan = self.evaluation.plan(self._share_of_rank(documents))
        if not everything:
            self.plan = plan
        check = self._stop_together if self.sharded else None
        device, score = self.ranks.device, self.evaluation.score
        return model.with_decoder(lambda decoder: score(decoder, plan, device, check))

    def _stop_together(self) -> None:
        if self.ranks.any(self.stop.requested):
            raise Stopped()

    def _share_of_rank(self, documents: Documents) -> Documents:
        """Every world_size-th document; mc1 and mc2 of a question share a prefix and a process."""
        rank, size = (0, 1) if self.sharded else (self.ranks.rank, self.ranks.world_size)
        return {
            task: [document for document in rows if document.doc_id % size == rank]
            for task, rows in documents.items()
        }

    def _first(self, limit: int | None) -> Documents:
        return {task: rows[:limit] for task, rows in self.documents.items()}

    def _write(
        self, name: str, step: int, items: Items, seconds: float, limit: int | None
    ) -> dict[str, dict]:
        about = {"model": f"{self.config.run_dir} after step {step}", "limit": limit}
        about["data_root"] = self.settings.data_root
        cost = {"step": step, "seconds": {"score": seconds}}
        return self.evaluation.write(self.folder / name, items, about, cost)

    def _report(self, step: int, rows: dict, seconds: float, last: bool) -> None:
        scores = ", ".join(f"{name} {percent(row['acc'])}" for name, row in rows.items())
        log.info("scores after step %d: %s (%.1f s)", step, scores, seconds)
        if last:
            share = self.seconds / (time.perf_counter() - self.started)
            log.info("evaluation took %.1f s, %.1f%% of this run", self.seconds, 100 * share)

    # ---- how many documents ----

    def _choose_limit(self, trained_tokens: float) -> int:
        """Documents per task before the end: given, or as many as MAX_SHARE allows.

        A continued run keeps the number that it started with, whatever the number of processes.
        """
        for earlier in filter(is_finished, self.folder.glob("step_*")):
            return read_results(earlier)["config"]["limit"]
        copies = self.ranks.world_size if self.sharded else 1
        forwards = _FORWARDS_PER_TRAINED_TOKEN * trained_tokens / copies
        times = -(-self.num_steps // self.settings.every)  # including the base model
        everything = self._num_tokens(None)

        def share(limit: int) -> float:
            return (times * self._num_tokens(limit) + everything) / forwards

        limit = self.settings.limit
        if limit is None:
            most = max(map(len, self.documents.values()))
            limit = largest_limit(share, most, f"{everything / forwards:.1%}")
        log.info(
            "evaluation: the first %d documents of each task %d times, all %d at the end; "
            "at most %.1f%% of the run's FLOPs",
            limit,
            times,
            sum(map(len, self.documents.values())),
            100 * share(limit),
        )
        return limit

    def _num_tokens(self, limit: int | None) -> int:
        return self.evaluation.plan(self._first(limit)).num_tokens


def largest_limit(share, most: int, share_of_the_end: str) -> int:
    """The largest of 20, 40, 80, ... documents whose share(limit) of the run is below MAX_SHARE.

    Raises UserError where not even MIN_DOCUMENTS fit.
    """
    fitting, limit = None, MIN_DOCUMENTS
    while share(limit) < MAX_SHARE:
        fitting = limit
        if limit >= most:
            break
        limit *= 2
    if fitting is None:
        raise UserError(
            f"scoring {MIN_DOCUMENTS} documents of each task would take up to "
            f"{share(MIN_DOCUMENTS):.0%} of this run's FLOPs (all documents at the end: "
            f"{share_of_the_end}), more than {MAX_SHARE:.0%}. Raise --evaluation.every, name "
            "fewer --evaluation.tasks, or accept the cost with --evaluation.limit N documents per "
            "task"
        )
    return fitting


def _scored_tasks(names: tuple[str, ...]) -> list[str]:
    tasks = resolve_tasks(names)
    if generated := [task for task in tasks if TASKS[task].kind != "loglikelihood"]:
        raise UserError(
            f"--evaluation.tasks {' '.join(generated)}: tasks that generate text are not scored "
            "during training. Leave them out and run scripts/evaluate.py --tasks "
            f"{' '.join(generated)} on the finished run"
        )
    return tasks


def _require_finetuning(config: TrainConfig) -> None:
    if config.stage == "pretrain":
        raise UserError(
            "--evaluation.every: stage pretrain does not change the language model, so its scores "
            "would be the base model's at every step. Evaluate the base model once with "
            "scripts/evaluate.py, and use --evaluation.every in stage finetune"
        )
    if not config.evaluation.data_root:
        raise UserError(
            "--evaluation.every needs --evaluation.data-root: name the folder with truthfulqa/ and "
            "ethics/"
        )
