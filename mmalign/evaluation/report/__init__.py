"""report.md: what the runs did and how the models score, with figures and CSV files beside it."""

import json
from collections.abc import Sequence
from pathlib import Path

from mmalign.errors import UserError
from mmalign.evaluation.compare import compare_evaluations
from mmalign.evaluation.items import read_items, read_results
from mmalign.evaluation.report import runs as report_runs
from mmalign.evaluation.report import sections as parts
from mmalign.evaluation.report.csv_export import write_differences, write_scores
from mmalign.evaluation.report.method import method
from mmalign.evaluation.report.plots import plot_curves, plot_scores, plot_training
from mmalign.evaluation.report.written import written_answers


def write_report(
    path: str | Path,
    stages: dict[str, Path],
    evaluations: dict[str, Path],
    visual: dict | None = None,
    title: str = "Visual instruction tuning and alignment",
    comparisons: dict[str, dict] | None = None,
) -> Path:
    """Writes the Markdown file `path`, its figures and CSV files beside it; returns `path`.

    stages: name -> run folder (config.json, metrics.jsonl); evaluations: name -> output folder of
    evaluate_model, the base model first: the others are compared with it. visual: accuracies on
    held-out visual questions, {"tuned", "blind", "chance": 0 to 1, "n": questions}; where there,
    also "misled" (another picture), "majority", and "kinds" (the same for each kind of question).
    comparisons: what compare_with_base gives for the evaluations, where it is known already.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = {name: read_run(Path(folder)) for name, folder in stages.items()}
    results = {name: read_results(out) for name, out in evaluations.items()}
    base = next(iter(evaluations), "")
    if comparisons is None:
        comparisons = compare_with_base(evaluations)
    sections = [f"# {title}", *parts.summary(base, comparisons, visual)]
    if results:
        sections += _scores(path.parent, base, results, comparisons)
        sections += written_answers(evaluations, results)
    if visual:
        sections += parts.visual_questions(visual)
    if runs:
        sections += _training(path.parent, stages, runs)
    if results:
        sections += method(results, _examples(evaluations))
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _training(folder: Path, stages: dict[str, Path], runs: dict[str, dict]) -> list[str]:
    metrics = {name: run["metrics"] for name, run in runs.items()}
    plot_training(metrics, folder / "training.png")
    sections = report_runs.training(runs, "training.png")
    for name, run in runs.items():
        if curve := report_runs.read_curve(Path(stages[name])):
            figure = f"scores_during_{name}.png"
            plot_curves(curve, folder / figure)
            sections += report_runs.score_curve(name, run, curve, figure)
    return sections + report_runs.settings(stages, runs)


def compare_with_base(evaluations: dict[str, Path]) -> dict[str, dict]:
    """name -> comparison with the first evaluation, of every other one."""
    base, *others = evaluations.items() if evaluations else [("", Path())]
    return {name: compare_evaluations(base[1], folder) for name, folder in others}


def name_evaluations(folders: Sequence[Path]) -> dict[str, Path]:
    """Short names of evaluation outputs: the last part of their paths that tells them apart."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError("one evaluation was given twice; give different folders")
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, folders, strict=True))


def _scores(
    folder: Path, base: str, results: dict[str, dict], comparisons: dict[str, dict]
) -> list[str]:
    plot_scores(results, folder / "scores.png")
    write_scores(folder / "scores.csv", results)
    sections = parts.scores(results, "scores.png")
    sections += parts.differences(base, comparisons)
    if comparisons:
        write_differences(folder / "differences.csv", base, comparisons)
        sections += parts.flipped(base, comparisons, write_flipped(folder, comparisons))
    return sections


def write_flipped(folder: Path, comparisons: dict[str, dict]) -> dict[str, str]:
    """flipped.jsonl, or one file a model where there are several; name -> file name."""
    files = {}
    for number, (name, comparison) in enumerate(comparisons.items(), start=1):
        files[name] = "flipped.jsonl" if len(comparisons) == 1 else f"flipped_{number}.jsonl"
        lines = (json.dumps(document) + "\n" for document in comparison["flipped"])
        (folder / files[name]).write_text("".join(lines), encoding="utf-8")
    return files


def _examples(evaluations: dict[str, Path]) -> dict[str, list[dict]]:
    items = {}
    for folder in evaluations.values():
        items = read_items(folder) | items
    return items


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
