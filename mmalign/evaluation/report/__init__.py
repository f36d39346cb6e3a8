"""report.md: what the runs did and how the models score, with figures and CSV files beside it.

sections.py writes the text, beside.py that of metrics beside the tasks' own, tables.py the tables
(also the terminal's and the CSV files), plots.py the figures.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmalign.errors import UserError
from mmalign.evaluation.compare import compare_evaluations
from mmalign.evaluation.items import Items, read_items, read_results
from mmalign.evaluation.report import beside, sections
from mmalign.evaluation.report.plots import plot_curves, plot_scores, plot_training
from mmalign.evaluation.report.tables import write_differences, write_scores
from mmalign.evaluation.tasks import score_rows
from mmalign.evaluation.tasks.task import is_number
from mmalign.files import read_json, read_steps, write_json_lines, write_text


def write_report(
    path: str | Path,
    stages: Mapping[str, Path],
    evaluations: Mapping[str, Path],
    title: str = "Visual instruction tuning and alignment",
    comparisons: Mapping[str, dict] | None = None,
) -> Path:
    """Writes the Markdown file `path`, its figures and CSV files beside it; returns `path`.

    stages: name -> run folder (config.json, metrics.jsonl); evaluations: name -> output folder of
    evaluate_model, the base model first: the others are compared with it.
    comparisons: what compare_with_base returns for the evaluations, where already known.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = {name: read_run(Path(folder)) for name, folder in stages.items()}
    results = {name: read_results(out) for name, out in evaluations.items()}
    examples = _examples(evaluations)
    base = next(iter(evaluations), "")
    if comparisons is None:
        comparisons = compare_with_base(evaluations)
    blocks = [f"# {title}", *sections.summary(base, comparisons)]
    if results:
        blocks += _scores(path.parent, base, results, comparisons)
    if runs:
        blocks += _training(path.parent, stages, runs)
    if results:
        blocks += sections.method(results, examples)
    write_text(path, "\n\n".join(blocks) + "\n")
    return path


def _scores(
    folder: Path, base: str, results: dict[str, dict], comparisons: Mapping[str, dict]
) -> list[str]:
    plot_scores(results, folder / "scores.png")
    write_scores(folder / "scores.csv", results)
    blocks = sections.scores(results, "scores.png")
    blocks += sections.differences(base, comparisons)
    blocks += beside.beside(base, results, comparisons)
    beside.write_beside(folder / "beside.csv", results)
    if comparisons:
        write_differences(folder / "differences.csv", base, comparisons)
        blocks += sections.flipped(base, comparisons, write_flipped(folder, comparisons))
    return blocks


def _training(folder: Path, stages: Mapping[str, Path], runs: dict[str, dict]) -> list[str]:
    metrics = {name: run["metrics"] for name, run in runs.items()}
    plot_training(metrics, folder / "training.png")
    blocks = sections.training(runs, "training.png")
    for name, run in runs.items():
        if curve := read_curve(Path(stages[name])):
            figure = f"scores_during_{name}.png"
            plot_curves(curve, folder / figure)
            blocks += sections.score_curve(name, run, curve, figure)
    return blocks + sections.settings(stages, runs)


def compare_with_base(evaluations: Mapping[str, Path]) -> dict[str, dict]:
    """name -> comparison with the first evaluation, for every other one."""
    base, *others = evaluations.items() if evaluations else [("", Path())]
    return {name: compare_evaluations(base[1], folder) for name, folder in others}


def name_evaluations(folders: Sequence[Path]) -> dict[str, Path]:
    """Short names of evaluation outputs: the last parts of their paths that differ."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError("one evaluation was given twice; name different folders")
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, folders, strict=True))


def write_flipped(folder: Path, comparisons: Mapping[str, dict]) -> dict[str, str]:
    """flipped.jsonl, or one file per model where there are several; name -> file name."""
    files = {}
    for number, (name, comparison) in enumerate(comparisons.items(), start=1):
        files[name] = "flipped.jsonl" if len(comparisons) == 1 else f"flipped_{number}.jsonl"
        write_json_lines(folder / files[name], comparison["flipped"])
    return files


def _examples(evaluations: Mapping[str, Path]) -> Items:
    items: Items = {}
    for folder in evaluations.values():
        items = read_items(folder) | items
    return items


def read_run(folder: Path) -> dict:
    """{"config": config.json, "metrics": the complete lines of metrics.jsonl} of a run."""
    config = read_json(folder / "config.json", "The report needs a run folder.")
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} is not a run: metrics.jsonl is missing. Name a run folder")
    metrics, damaged = read_steps(path)
    if damaged:
        raise UserError(f"{damaged[0]}. Remove this line and rerun the same command")
    if not metrics:
        raise UserError(f"{path} contains no step yet; train for at least one step first")
    for record in metrics:
        numbers = [record.get(key) for key in ("tokens", "samples", "tokens_per_second")]
        if not all(is_number(number, 0, float("inf")) for number in numbers):
            raise UserError(f"{path}: the line of step {record['step']} is damaged. Remove it")
    return {"config": config, "metrics": metrics}


def read_curve(folder: Path) -> dict[int, dict]:
    """Step -> results.json of the run's evaluations on its fixed documents; {} without any."""
    found = {}
    for path in (folder / "evaluation").glob("step_*"):
        # a killed run can leave a folder without it
        if path.name[5:].isdecimal() and (path / "results.json").exists():
            read_items(path)  # of which the scores are
            found[int(path.name[5:])] = read_results(path)
    curve = dict(sorted(found.items()))
    documents = {(x["config"]["limit"], *score_rows(x)) for x in curve.values()}
    if len(documents) > 1:
        raise UserError(
            f"{folder / 'evaluation'}: the steps were scored on different documents. Remove the "
            "step folders that do not belong to this run"
        )
    return curve
