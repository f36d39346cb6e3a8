"""report.md: what the runs did and how base and tuned models score, with figures."""

import json
from pathlib import Path

from mmalign.errors import UserError
from mmalign.evaluation import report_parts as parts
from mmalign.evaluation.compare import compare_evaluations
from mmalign.evaluation.plots import plot_scores, plot_training


def write_report(
    path: str | Path,
    stages: dict[str, Path],
    evaluations: dict[str, Path],
    visual: dict | None = None,
    title: str = "Visual instruction tuning and alignment",
) -> Path:
    """Writes the Markdown file `path` and its figures beside it; returns `path`.

    stages: name -> run folder (config.json, metrics.jsonl); evaluations: name -> output folder of
    evaluate_model, the base model first: the others are compared with it. visual: accuracies on
    held-out visual questions, {"tuned", "blind", "chance": 0 to 1, "n": questions}; where there,
    also "misled" (another picture), "majority", and "kinds" (the same for each kind of question).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = {name: read_run(Path(folder)) for name, folder in stages.items()}
    results = {name: _read_json(Path(out) / "results.json") for name, out in evaluations.items()}
    base, *others = evaluations or [""]
    comparisons = {
        name: compare_evaluations(evaluations[base], evaluations[name]) for name in others
    }
    sections = [f"# {title}", *parts.summary(base, comparisons, visual)]
    if results:
        plot_scores(results, path.parent / "scores.png")
        sections += parts.scores(results, "scores.png")
        sections += parts.differences(base, comparisons)
    if visual:
        sections += parts.visual_questions(visual)
    if runs:
        plot_training(
            {name: run["metrics"] for name, run in runs.items()}, path.parent / "training.png"
        )
        sections += parts.training(runs, "training.png")
    sections += parts.settings(stages, runs, results)
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def read_run(folder: Path) -> dict:
    """{"config": config.json, "metrics": the complete lines of metrics.jsonl} of a run."""
    config = _read_json(folder / "config.json")
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} is not a run: metrics.jsonl is missing")
    lines = path.read_text().split("\n")
    metrics = [json.loads(line) for line in lines[:-1]]  # a killed run can tear the last line only
    if not metrics:
        raise UserError(f"{path} holds no step yet; the report needs a run that has trained")
    return {"config": config, "metrics": metrics}


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"the report needs {path}, which does not exist") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
