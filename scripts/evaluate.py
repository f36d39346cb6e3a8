"""Score a language model, without vision, on TruthfulQA, ETHICS and other tasks.

python scripts/evaluate.py --model HFDIR|RUN --tasks truthfulqa ethics --data-root DIR --output DIR
"""

from pathlib import Path
from typing import Literal

import tyro

from mmalign.command import command_line
from mmalign.evaluation.evaluation import evaluate_model
from mmalign.evaluation.report import write_report
from mmalign.evaluation.tasks import TaskName


def main(
    model: Path,
    data_root: Path,
    output: Path,
    tasks: tuple[TaskName, ...] = ("truthfulqa", "ethics"),
    limit: int | None = None,
    batch_tokens: int = 8192,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    overwrite: bool = False,
) -> None:
    """Score a language model, without vision, on TruthfulQA, ETHICS and other tasks.

    Args:
        model: Hugging Face folder, or a finetune run (its export/llama is scored).
        data_root: Folder with the tasks' files as published, e.g. truthfulqa/mc_task.json.
        output: Folder for results.json, items.jsonl, report.md, its CSV files and scores.png.
        tasks: Groups of tasks, or single ones.
        limit: Score only the first N documents of each task.
        batch_tokens: Tokens in one forward pass; a longer document takes several.
        precision: Of weights and activations. auto: bf16 on a GPU, fp32 on a CPU.
        device: auto takes a GPU where there is one.
        overwrite: Replace the results of another model in the output folder.
    """
    how = (limit, batch_tokens, precision, device)
    evaluate_model(model, tasks, data_root, output, *how, overwrite=overwrite)
    evaluations = {model.resolve().name: output}
    report = write_report(output / "report.md", {}, evaluations, title="Evaluation")
    print(f"report:  {report}")


if __name__ == "__main__":
    with command_line():
        tyro.cli(main, description=__doc__)
