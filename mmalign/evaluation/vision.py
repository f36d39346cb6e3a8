"""Evaluation on pictures: every question about a picture in one batch, answer by answer on disk.

    documents -> by picture -> decoded ahead by workers -> prompts -> generate -> answers.jsonl
                                                            -> items.jsonl, results.json, report

Pictures are shown as they are, corrupted, not at all (blind) or exchanged (mismatched). Each way is
an evaluation in a folder of its own below the output, so that compare.py reads any two of them.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path

from mmalign.command import progress_bar
from mmalign.data.templates import end_ids
from mmalign.data.workers import NumWorkers, choose_workers
from mmalign.distributed import DistributedContext
from mmalign.errors import UserError
from mmalign.evaluation.answer_log import AnswerLog
from mmalign.evaluation.corruptions import parse_corruptions
from mmalign.evaluation.evaluation import Evaluation
from mmalign.evaluation.items import FILES, Items, is_finished, read_results, require_no_loss
from mmalign.evaluation.pictures import Control, Shown, exchanged, load_pictures
from mmalign.evaluation.shown_pictures import write_shown_report
from mmalign.evaluation.tasks import TASKS, load_documents, resolve_tasks
from mmalign.evaluation.tasks.as_released import TEMPLATE as RELEASED_TEMPLATE
from mmalign.evaluation.tasks.task import digest
from mmalign.evaluation.tasks.vision_task import (
    PROTOCOLS,
    SUFFIX,
    Protocol,
    VisionTask,
    VisualAnswer,
    VisualDocument,
)
from mmalign.evaluation.vision_model import VisionModel, find_llava, log_odds
from mmalign.evaluation.weather import frost_folder
from mmalign.model.generate import generate
from mmalign.model.tiles import Pixels, num_image_tokens
from mmalign.ownership import owned, require_names
from mmalign.system import DTYPES, choose_device, choose_precision
from mmalign.validation import check

log = logging.getLogger("mmalign")
CACHE_TOKENS = 16384
_CHUNK_TOKENS = 4 * CACHE_TOKENS  # of prompts whose pictures are in memory


def evaluate_pictures(
    model: str | Path,
    tasks: Sequence[str],
    data_root: str | Path,
    output: str | Path,
    limit: int | None = None,
    protocol: Protocol = "standard",
    template: str | None = None,
    corruptions: Sequence[str] = (),
    controls: Sequence[Control] = (),
    seed: int = 0,
    num_workers: NumWorkers = "auto",
    batch_tokens: int = 8192,
    precision: str = "auto",
    device: str = "auto",
    quiet: bool = False,
    overwrite: bool = False,
) -> dict[str, Path]:
    """Scores `model` (a run, or a folder of LlavaForConditionalGeneration) on tasks about pictures.

    Returns {name: folder} of its evaluations, "" being the one with the pictures as they are. An
    interrupted call continues where its answers end, and leaves out what is finished. seed: of the
    corruptions. overwrite: replace answers of another model, of other tasks or of more documents.
    Raises UserError for bad arguments, data or weights.
    """
    check("limit", limit)
    check("batch_tokens", batch_tokens)
    check("corruption_seed", seed)
    check("workers", num_workers)
    names = vision_tasks(tasks, protocol)
    wanted = parse_corruptions(corruptions)
    if any(name == "frost" for name, _ in wanted):
        frost_folder()  # before hours of other corruptions
    shown = [Shown(), *(Shown(control=x) for x in controls), *(Shown(None, x) for x in wanted)]
    weights, target = find_llava(model), choose_device(device)
    precision = choose_precision(precision, target)
    num_workers, _ = choose_workers(num_workers, True, DistributedContext(0, 1, target))
    with owned(output, "--output"):
        ways = [x.name for x in shown if x.name]
        require_names(output, [*FILES, *(f"{x}/{y}" for x in ways for y in FILES)], ways)
        if not overwrite:
            for folder in (output, *(Path(output) / way for way in ways)):
                require_no_loss(Path(folder), weights, names, limit)
        documents = load_documents(names, data_root, limit)
        vision_model = VisionModel.load(weights, template, DTYPES[precision], target)
        run = VisionEvaluation(
            vision_model, weights, Path(data_root), str(model), limit, precision, seed, num_workers,
            batch_tokens, quiet,
        )  # fmt: skip
        folders = {x.name: Path(output) / x.name for x in shown}
        logs = [run.answer_log(documents, x, folders[x.name], overwrite) for x in shown]
        for x, log_file in zip(shown, logs, strict=True):
            run.evaluate(documents, x, log_file)
        write_shown_report(Path(output), folders)
    return folders


def vision_tasks(tasks: Sequence[str], protocol: Protocol) -> list[str]:
    """Names of tasks about pictures in this protocol; UserError for other tasks among them."""
    names = resolve_tasks(tasks)
    if others := [name for name in names if TASKS[name].kind != "vision"]:
        raise UserError(
            f"{', '.join(others)} are scored without pictures, {len(names) - len(others)} other "
            "tasks with them. Evaluate the two kinds with a command and an --output each"
        )
    if protocol not in PROTOCOLS:
        raise UserError(f"--protocol {protocol}: expected {' or '.join(PROTOCOLS)}")
    ending = SUFFIX if protocol == "as-released" else ""
    return list(dict.fromkeys(name.removesuffix(SUFFIX) + ending for name in names))


@dataclass(frozen=True)
class VisionEvaluation:
    model: VisionModel
    weights: Path
    data_root: Path
    model_name: str
    limit: int | None
    precision: str
    seed: int
    num_workers: int
    batch_tokens: int
    quiet: bool

    def answer_log(
        self, documents: dict[str, list[VisualDocument]], shown: Shown, output: Path, anew: bool
    ) -> AnswerLog:
        """Of an evaluation; UserError where one that has not finished would lose its answers."""
        about = json.loads(json.dumps(self._about(documents, shown)))  # as it is read back
        log_file = AnswerLog(output / "answers.jsonl", about)
        if not anew and not (output / "results.json").exists():
            log_file.require_own()
        return log_file

    def evaluate(
        self, documents: dict[str, list[VisualDocument]], shown: Shown, log_file: AnswerLog
    ) -> None:
        """Asks what the log does not answer, then writes the evaluation beside it, if not there."""
        output, about = log_file.path.parent, log_file.about
        if _is_written(output, about):
            return
        output.mkdir(parents=True, exist_ok=True)
        items: Items = {}
        with log_file.open():
            for name, rows in documents.items():
                task = TASKS[name]
                assert isinstance(task, VisionTask)
                self._ask(task, rows, shown, log_file)
                answers = [log_file.answers[name, x.doc_id] for x in rows]
                items[name] = task.make_items(rows, answers)
        writer = Evaluation(
            self.data_root, self.model.tokenizer, self.model.decoder, self.batch_tokens,
            self.precision,
        )  # fmt: skip
        cost = {
            "num_new_tokens": sum(len(x.generation.token_ids) for x in log_file.answers.values())
        }
        writer.write(output, items, about, cost)

    def _about(self, documents: dict[str, list[VisualDocument]], shown: Shown) -> dict:
        released = any(name.endswith(SUFFIX) for name in documents)
        return {
            "model": self.model_name,
            "weights": str(self.weights.resolve()),
            "weights_files": {
                x.name: [x.stat().st_size, x.stat().st_mtime_ns]
                for x in sorted(self.weights.glob("*.safetensors"))
            },
            "data_root": str(self.data_root),
            "limit": self.limit,
            "template": "v0 with its dialogue" if released else self.model.template_name,
            "bos": "as the template has it",
            "pictures": {
                "use_im_start_end": self.model.use_im_start_end,
                "shown": shown.name or "own",
                "corruption_seed": self.seed if shown.corruption else None,
                "preprocessing": asdict(self.model.vision.preprocessing),
                "digests": {
                    name: digest("".join(x.digest for x in rows).encode())
                    for name, rows in documents.items()
                },
                "protocols": {name: TASKS[name].protocol() for name in documents},
            },
            "precision": self.precision,
        }

    def _ask(
        self, task: VisionTask, documents: list[VisualDocument], shown: Shown, log_file: AnswerLog
    ) -> None:
        """Answers what the log does not hold."""
        template = RELEASED_TEMPLATE if task.released else self.model.template
        words = self.model.yes_no_ids(template) if task.asks_yes_no else None
        if task.asks_yes_no and words is None:
            log.warning("%s: yes and no begin with one token, so there are no log-odds", task.name)
        watch = words[0] + words[1] if words else []
        options = replace(
            task.options,
            stop=task.options.stop or template.stop,
            end_ids=end_ids(template, self.model.tokenizer),
        )
        missing = [x for x in documents if (task.name, x.doc_id) not in log_file.answers]
        done, label = len(documents) - len(missing), f"{task.name} {shown.name}".strip()
        bar = progress_bar(
            total=len(documents), initial=done, desc=label, unit=" questions", disable=self.quiet
        )
        with bar:
            for chunk in self._chunks(missing, documents, shown):
                prompts = [self.model.prompt(x, pixels, template) for x, pixels in chunk]
                self._check_lengths(task, [x for x, _ in chunk], prompts)
                found = generate(
                    self.model.llava, self.model.tokenizer, prompts, options, CACHE_TOKENS,
                    watch=watch,
                )  # fmt: skip
                answers = [
                    VisualAnswer(x, log_odds(x.first_logprobs, len(words[0])) if words else None)
                    for x in found
                ]
                log_file.add(task.name, [x for x, _ in chunk], answers)
                bar.update(len(chunk))

    def _chunks(
        self, missing: list[VisualDocument], documents: list[VisualDocument], shown: Shown
    ) -> Iterator[list[tuple[VisualDocument, Pixels | None]]]:
        """Questions with their pixels, those about one picture together."""
        by_image: dict[str, list[VisualDocument]] = {}
        for x in missing:
            by_image.setdefault(x.image, []).append(x)
        images = list(by_image)
        other = exchanged([x.image for x in documents]) if shown.control == "mismatched" else {}
        pictures: Iterable[Pixels | None] = repeat(None)
        if shown.control != "blind":
            wanted = [other.get(x, x) for x in images]
            pictures = load_pictures(
                self.data_root,
                wanted,
                self.model.vision,
                shown,
                self.seed,
                self.num_workers,
            )
        chunk, num_tokens = [], 0
        for image, pixels in zip(images, pictures, strict=False):
            chunk += [(x, pixels) for x in by_image[image]]
            num_patches = self.model.vision.num_patches
            num_tokens += num_image_tokens(pixels, num_patches) if pixels is not None else 0
            num_tokens += 64 * len(by_image[image])
            if num_tokens > _CHUNK_TOKENS:
                yield chunk
                chunk, num_tokens = [], 0
        if chunk:
            yield chunk

    def _check_lengths(
        self, task: VisionTask, documents: Sequence[VisualDocument], prompts
    ) -> None:
        context, num_new = self.model.decoder.max_position_embeddings, task.options.max_new_tokens
        for document, prompt in zip(documents, prompts, strict=True):
            if len(prompt.input_ids) + num_new > context:
                raise UserError(
                    f"{document.name}: the prompt has {len(prompt.input_ids)} tokens and its "
                    f"answer up to {num_new}, more than the model's context of {context}. Leave "
                    "this task out or evaluate a model with a longer context"
                )


def _is_written(output: Path, about: dict) -> bool:
    """Whether the folder holds exactly this evaluation, finished."""
    if not is_finished(output):
        return False
    config = read_results(output)["config"]
    return all(config.get(key) == value for key, value in about.items())
