"""Score a language model, without vision, on TruthfulQA and ETHICS.

python scripts/evaluate.py --model HFDIR|RUN --tasks truthfulqa ethics --data-root DIR --output DIR
"""

import sys
from pathlib import Path
from typing import Literal

import tyro

from mmalign.errors import UserError
from mmalign.evaluation.evaluation import evaluate_model
from mmalign.evaluation.report import write_report
from mmalign.evaluation.tasks import GENERATION_TASK
from mmalign.evaluation.written_answers import evaluate_written_answers


def main(
    model: Path,
    data_root: Path,
    output: Path,
    tasks: tuple[str, ...] = ("truthfulqa", "ethics"),
    limit: int | None = None,
    batch_tokens: int = 8192,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Score a language model, without vision, on TruthfulQA and ETHICS.

    Args:
        model: Hugging Face folder, or a finetune run (its export/llama is scored).
        data_root: Folder with truthfulqa/mc_task.json and ethics/<subset>/*_test.csv; for
            truthfulqa_gen with truthfulqa/TruthfulQA.csv.
        output: Folder for results.json, items.jsonl, report.md and scores.csv; truthfulqa_gen
            writes truthfulqa_gen.json and .jsonl.
        tasks: truthfulqa, ethics, single tasks such as truthfulqa_mc1 or ethics_virtue, and
            truthfulqa_gen (written answers: BLEU and ROUGE).
        limit: Score the first N documents of each task only.
        batch_tokens: Tokens in one forward pass; a longer document takes several.
        precision: Of weights and activations.
        device: auto takes a GPU where there is one.
    """
    if GENERATION_TASK in tasks:
        evaluate_written_answers(model, data_root, output, limit, precision, device)
    scored = [task for task in tasks if task != GENERATION_TASK]
    if scored or not tasks:
        evaluate_model(model, scored, data_root, output, limit, batch_tokens, precision, device)
        report = write_report(
            output / "report.md", {}, {model.resolve().name: output}, title="Evaluation"
        )
        print(f"report:  {report}")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except UserError as error:
        sys.exit(f"error: {error}")
