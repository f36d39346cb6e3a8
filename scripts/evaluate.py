"""Score a model on TruthfulQA, ETHICS and other texts, or on questions about pictures.

python scripts/evaluate.py --model HFDIR|RUN --tasks truthfulqa ethics --data-root DIR --output DIR
python scripts/evaluate.py --model RUN --tasks vqav2 coco_captions pope mme --data-root DIR
    --output DIR [--controls blind mismatched] [--corruptions gaussian_noise:1,3,5 ...]
"""

from pathlib import Path
from typing import Literal

import tyro

from mmalign.chat import ChatTemplate
from mmalign.command import command_line
from mmalign.errors import UserError
from mmalign.evaluation.evaluation import evaluate_model
from mmalign.evaluation.pictures import Control
from mmalign.evaluation.report import write_report
from mmalign.evaluation.tasks import TASKS, TaskName, resolve_tasks
from mmalign.evaluation.tasks.vision_task import Protocol
from mmalign.evaluation.vision import evaluate_pictures

BATCH_TOKENS = 8192


def main(
    model: Path,
    data_root: Path,
    output: Path,
    tasks: tuple[TaskName, ...] = ("truthfulqa", "ethics"),
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    overwrite: bool = False,
    protocol: Protocol = "standard",
    template: ChatTemplate | None = None,
    controls: tuple[Control, ...] = (),
    corruptions: tuple[str, ...] = (),
    corruption_seed: int = 0,
    workers: int = 2,
) -> None:
    """Score a model on TruthfulQA, ETHICS and other texts, or on questions about pictures.

    Args:
        model: Hugging Face folder, or a finetune run (its export/llama is scored, and export/llava
            on tasks about pictures).
        data_root: Folder with the tasks' files as published, e.g. truthfulqa/mc_task.json.
        output: Folder for results.json, items.jsonl, report.md, its CSV files and scores.png.
        tasks: Groups of tasks, or single ones.
        limit: Score only the first N documents of each task.
        batch_tokens: Tokens in one forward pass; a longer document takes several.
        precision: Of weights and activations. auto: bf16 on a GPU, fp32 on a CPU.
        device: auto takes a GPU where there is one.
        overwrite: Replace results of another model, of other tasks or of more documents in the
            output folder.
        protocol: Of tasks about pictures. as-released: what the paper's scripts run.
        template: Conversation template, of tasks about pictures; unset: that of the run.
        controls: Ask again without the picture (blind), or with another one (mismatched).
        corruptions: Ask again about corrupted pictures: NAME:SEVERITIES such as
            gaussian_noise:1,3,5, a NAME (1, 3 and 5), or all.
        corruption_seed: Of the random corruptions, together with a picture's name.
        workers: Processes that decode pictures.
    """
    if any(TASKS[name].kind == "vision" for name in resolve_tasks(tasks)):
        if corruption_seed > 0 and not corruptions:
            raise UserError("--corruption-seed has no effect without --corruptions. Leave it out")
        if batch_tokens != BATCH_TOKENS:
            raise UserError(
                "--batch-tokens is for tasks that are scored by log-likelihoods, not for "
                f"{' and '.join(tasks)}. Leave it out"
            )
        evaluate_pictures(
            model, tasks, data_root, output, limit, protocol, template, corruptions, controls,
            corruption_seed, workers, batch_tokens, precision, device, overwrite=overwrite,
        )  # fmt: skip
        return
    if controls or corruptions or corruption_seed or template or protocol != "standard":
        raise UserError(
            "--protocol, --template, --controls, --corruptions and --corruption-seed are for tasks "
            f"about pictures, not for {' and '.join(tasks)}. Leave them out"
        )
    how = (limit, batch_tokens, precision, device)
    evaluate_model(model, tasks, data_root, output, *how, overwrite=overwrite)
    evaluations = {model.resolve().name: output}
    report = write_report(output / "report.md", {}, evaluations, title="Evaluation")
    print(f"report:  {report}")


if __name__ == "__main__":
    with command_line():
        tyro.cli(main, description=__doc__)
