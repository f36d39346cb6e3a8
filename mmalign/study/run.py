"""One run of a study, in a process of its own: data, training, evaluation, outcome.json.

FOLDER/run.json      what the run is: names, identity, settings, versions
FOLDER/log.txt       what its processes have printed
FOLDER/train/        the run folder of train.py
FOLDER/scores/       the output of evaluate.py; pictures/, visual.json, forgetting/: if asked for
FOLDER/outcome.json  how its last process ended: done, or failed and why
"""

import json
import logging
import os
import shutil
import sys
import time
import traceback
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from mmalign.command import Stopped, StopSignal, reason
from mmalign.config import TrainConfig
from mmalign.errors import UserError
from mmalign.evaluation.evaluation import evaluate_model
from mmalign.evaluation.tasks import picture_tasks, resolve_tasks
from mmalign.evaluation.visual_questions import right_answers
from mmalign.files import write_json, write_text
from mmalign.ownership import owned
from mmalign.study.data import with_data
from mmalign.study.forgetting import score_forgetting
from mmalign.study.identity import Order
from mmalign.study.pictures import ask_about_pictures
from mmalign.system import versions
from mmalign.training.loop import train

IN_USE = 17  # exit code: another process owns the run


def execute(order: Order, threads: int, gpu: str) -> None:
    """The target of a run's process. gpu: its CUDA_VISIBLE_DEVICES; empty: as they are."""
    os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the study, which passes it on once
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    order.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(order.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    torch.set_num_threads(threads)
    with StopSignal():
        try:
            with ExitStack() as stack:
                try:
                    stack.enter_context(owned(order.folder, "the run"))
                except UserError:
                    sys.exit(IN_USE)
                if not order.is_done():  # by a process that was faster
                    _run(order)
        except Stopped as stopped:
            print(stopped, flush=True)
            sys.exit(stopped.exit_code)
        except UserError as error:
            sys.exit(_fail(order, str(error), None))
        except OSError as error:
            sys.exit(_fail(order, reason(error), error))
        except Exception as error:  # a defect: the other runs go on
            sys.exit(_fail(order, f"{type(error).__name__}: {error} (see log.txt)", error))


def _run(order: Order) -> None:
    (order.folder / "outcome.json").unlink(missing_ok=True)
    about = {"name": order.run.name, "identity": order.identity, "versions": versions()}
    order_json = json.loads(json.dumps(asdict(order), default=str))
    write_json(order.folder / "run.json", about | {"order": order_json})
    seconds, model, config = {}, Path(order.run.decoder), with_data(order)
    if config:
        began = time.perf_counter()
        train(config)
        seconds["train"] = time.perf_counter() - began
        model = config.run_dir
    if order.evaluation:
        began = time.perf_counter()
        _evaluate(order, model, config)
        seconds["evaluate"] = time.perf_counter() - began
    key = order.evaluation.key if order.evaluation else None
    done = {"outcome": "done", "evaluation": key, "seconds": seconds, "time": time.time()}
    write_json(order.folder / "outcome.json", done)


def _evaluate(order: Order, model: Path, config: TrainConfig | None) -> None:
    asked = order.evaluation
    assert asked is not None
    texts = [x for x in resolve_tasks(asked.tasks) if x not in picture_tasks(asked.tasks)]
    evaluate_model(*(model, texts, asked.data_root, order.scores, asked.limit), overwrite=True)
    if asked.forgetting:
        score_forgetting(model, asked.forgetting, order.folder / "forgetting")
    if config is None or config.data.text_only:
        return
    if picture_tasks(asked.tasks):
        ask_about_pictures(model, asked, order.pictures, config.data.num_workers)
    if asked.visual_questions:
        right = right_answers(config, asked.visual_questions, asked.visual_questions_images)
        rows = {image: [int(x) for x in values] for image, values in right.items()}
        write_text(order.folder / "visual.json", json.dumps(rows) + "\n")


def _fail(order: Order, why: str, error: BaseException | None) -> int:
    if error:
        traceback.print_exception(error)
    print(f"error: {why}", flush=True)
    write_failure(order, why)
    return 1


def write_failure(order: Order, why: str) -> None:
    line = " ".join(why.split())
    record = {"outcome": "failed", "reason": line, "time": time.time()}
    write_json(order.folder / "outcome.json", record)


def delete_weights(order: Order) -> None:
    """Exports, checkpoints and transformed data; settings, metrics and scores stay."""
    for name in ("export", "checkpoints"):
        shutil.rmtree(order.train_dir / name, ignore_errors=True)
    (order.folder / "data.json").unlink(missing_ok=True)
    shutil.rmtree(order.folder / "data", ignore_errors=True)
