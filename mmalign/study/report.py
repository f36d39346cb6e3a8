"""report.md of a study: verdicts first, then tables and figures, and where they come from."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mmalign.evaluation.metrics import percent
from mmalign.evaluation.report.tables import bullets
from mmalign.evaluation.visual_questions import guessing
from mmalign.files import markdown_table, write_text
from mmalign.ownership import owned
from mmalign.study import figures
from mmalign.study.checkpoint_noise import LAST, Noise, checkpoint_noise
from mmalign.study.contrasts import (
    BASE,
    BASE_SEED,
    Answer,
    Question,
    answer,
    verdict_sentence,
    words,
)
from mmalign.study.gains import TRUTHFULNESS, category_gains, style_correlations, yes_rates
from mmalign.study.identity import Orders
from mmalign.study.plan import Variant
from mmalign.study.provenance import provenance
from mmalign.study.scores import VISUAL, collect, write_parquet
from mmalign.study.sight import sight
from mmalign.study.tables import (
    GAP,
    Scores,
    contrast_table,
    gain,
    mean_score,
    metrics_beside,
    own_metrics,
    score_table,
    write_tables,
)

FILES = ("report.md", "documents.parquet", "*.csv", "*.png")


def write_study(orders: Orders) -> str:
    """Writes documents.parquet, the CSV files, the figures and report.md from what is done.

    Returns the verdicts, and where the report is, for the terminal.
    """
    study = orders.study
    folder = study.output
    with owned(folder, "study.output", wait=True):  # another shell on this study may be here, too
        scores = collect(orders)
        answers = _planned(orders, answer(study.questions, scores, list(study.parents)))
        write_parquet(folder / "documents.parquet", scores)
        noise = checkpoint_noise(orders)
        write_tables(folder, orders, scores, answers, noise)
        blocks = [
            *_verdicts(orders, answers),
            *_score_sections(orders, scores),
            *sight(folder, orders, scores),
            *_visual(orders, scores),
            *_forgetting(orders, scores),
            *_contrasts(folder, answers, scores, noise),
            *_by_seed(orders, scores),
            *_figures(folder, orders, scores),
            *provenance(orders),
        ]
        write_text(folder / "report.md", "\n\n".join(blocks) + "\n")
    verdicts = [_verdict(question, answers) for question in study.questions]
    return "\n".join([*verdicts, f"report: {folder / 'report.md'}"]).replace("**", "")


def _planned(orders: Orders, answers: Sequence[Answer]) -> list[Answer]:
    """Without tests of parents that do not have the variants."""
    runs = {(run.parent, run.variant) for run in orders.study.runs}
    return [
        test
        for test in answers
        if all(
            (parent, variant) in runs
            for variant, _ in test.contrast.variants
            for parent in test.contrast.parents or (test.parent,)
        )
    ]


def _verdict(question: Question, answers: Sequence[Answer]) -> str:
    """A sentence; with several tests how they ended, and a line for each."""
    asked = [test for test in answers if test.question == question]
    mine = [test for test in asked if test.estimate]
    about = f"**{question.name}** {question.asks}"
    if not mine:
        why = dict.fromkeys(test.verdict for test in asked) or ["not run"]
        return f"{about} **{', '.join(why)}**."
    if len(mine) == 1:
        return verdict_sentence(question, mine)
    counts = Counter(f"**{test.verdict}**" for test in mine)
    ended = ", ".join(f"{x} in {number} of {len(mine)}" for x, number in counts.items())
    return "\n".join([f"{about} {ended}:", *(f"  - {words(test)}" for test in mine)])


def _verdicts(orders: Orders, answers: Sequence[Answer]) -> Iterator[str]:
    study = orders.study
    states = Counter(orders.state(run) for run in study.runs)
    yield f"# {study.settings.name}"
    if study.questions:
        yield bullets(_verdict(question, answers) for question in study.questions)
    if states["done"] < len(study.runs):
        listed = ", ".join(f"{number} {state}" for state, number in states.items())
        yield f"**Unfinished**: of {len(study.runs)} runs {listed}. Gaps are `{GAP}`."
        failed = [run for run in study.runs if orders.state(run) == "failed"]
        if failed:
            yield bullets(f"failed: {x.name}: {orders[x].outcome()['reason']}" for x in failed)


# ---- scores ----


def _sections(variants: Mapping[str, Variant]) -> dict[str, list[Variant]]:
    """The paper's rows, variants of some parents or a part of the data, and controls."""
    found: dict[str, list[Variant]] = defaultdict(list)
    for variant in variants.values():
        partial = variant.samples or variant.supervised_tokens or variant.parents
        kind = "Controls" if variant.control else "Ablations" if partial else "Scores"
        found[kind].append(variant)
    order = ("Scores", "Ablations", "Controls")
    return {kind: found[kind] for kind in order if found[kind]}


def _score_sections(orders: Orders, scores: Scores) -> Iterator[str]:
    metrics, beside = own_metrics(scores), metrics_beside(scores)
    for kind, variants in _sections(orders.study.variants).items():
        if metrics:
            yield f"## {kind}"
            yield score_table(orders, scores, variants, metrics)
    if metrics:
        yield (
            "Percent, mean over seeds. In brackets: points above the base with half of the 95% "
            "interval, bold where it excludes 0. The last rows read no question."
        )
    if beside:
        yield "## Scores that resist artefacts"
        yield score_table(orders, scores, list(orders.study.variants.values()), beside)
        yield (
            "A gain that is one of truthfulness stays here; one of answer length, sharpness or a "
            "preference for yes disappears. `scores.csv` has each subset of ETHICS by itself."
        )


def _visual(orders: Orders, scores: Scores) -> Iterator[str]:
    asked = orders.evaluation.visual_questions
    shown = [key[:2] for key, run in scores.items() if VISUAL in run]
    if not asked or not shown:
        return
    yield "## Questions about pictures"
    names = (VISUAL, f"{VISUAL}_another", f"{VISUAL}_none")
    rows = []
    for parent, variant in dict.fromkeys(shown):
        found = [mean_score(scores, parent, variant, name) for name in names]
        rows.append([parent, variant, *(GAP if x is None else percent(x) for x in found)])
    guessed = [percent(x) for x in guessing(asked).values()]
    rows.append(["*chance / most frequent answer*", "", " / ".join(guessed), "", ""])
    yield markdown_table(["parent", "variant", "own picture", "another", "none"], rows)


def _forgetting(orders: Orders, scores: Scores) -> Iterator[str]:
    """Changes against the base; = where they are within a point (two one-sided tests)."""
    tasks = {name.partition(":")[0] for name in orders.study.settings.forgetting}
    metrics = list(
        dict.fromkeys(x.metric for run in scores.values() for x in run.values() if x.task in tasks)
    )
    if not metrics:
        return
    rows = []
    for parent in orders.study.parents:
        base = [mean_score(scores, parent, BASE, metric) for metric in metrics]
        rows.append([parent, BASE, *(GAP if x is None else percent(x) for x in base)])
        for variant in orders.study.variants:
            found = [gain(scores, parent, variant, metric) for metric in metrics]
            rows.append(["", variant, *map(_change, found)])
    yield "## Forgetting"
    yield markdown_table(["parent", "variant", *metrics], rows)
    yield "Points against the base. **=**: equivalent, within 1 point (two one-sided tests)."


def _change(test: Answer) -> str:
    if test.estimate is None:
        return GAP
    mark = " **=**" if test.estimate.p_equivalence(0.01) < 0.05 else ""
    return f"{100 * test.estimate.value:+.1f}{mark}"


def _contrasts(
    folder: Path, answers: Sequence[Answer], scores: Scores, noise: Noise
) -> Iterator[str]:
    if not answers:
        return
    yield "## Contrasts"
    yield contrast_table(answers, noise)
    if any(test.estimate for test in answers):
        figures.plot_contrasts(answers, folder / "contrasts.png")
        yield "![Every contrast with its interval](contrasts.png)"
    if figures.plot_amounts(answers, scores, folder / "amounts.png"):
        yield "![Score against the amount of data](amounts.png)"
    yield (
        "Errors add up noise of seeds and of documents (whole clusters); with one seed the claim "
        "is about these checkpoints only. Holm's correction runs within each family. *detectable*: "
        "the smallest difference that 80% of such studies would find."
    )
    if noise:
        yield (
            f"*checkpoints*: how far the difference moves between the last {LAST} evaluations "
            "during training (a standard deviation, on the documents that training scored); a "
            "difference of its size depends on where training ended."
        )


def _by_seed(orders: Orders, scores: Scores) -> Iterator[str]:
    """How often the verdict is the same where one seed is all that is known."""
    seeds, questions = orders.study.settings.seeds, orders.study.questions
    if len(seeds) < 2 or not questions:
        return
    counts: dict[tuple[str, str, str], Counter] = defaultdict(Counter)
    for seed in seeds:
        alone = {key: run for key, run in scores.items() if key[2] in (seed, BASE_SEED)}
        for test in _planned(orders, answer(questions, alone, list(orders.study.parents))):
            counts[test.question.name, test.parent, test.metric][test.verdict] += 1
    verdicts = ("supported", "contradicted", "cannot tell")
    yield "## Seed by seed"
    yield markdown_table(
        ["question", "parent", "metric", *verdicts],
        [[*test, *(found[x] for x in verdicts)] for test, found in counts.items()],
    )
    yield "Verdicts of as many studies with one seed each, which see no noise of seeds."


def _figures(folder: Path, orders: Orders, scores: Scores) -> Iterator[str]:
    if gains := category_gains(orders, scores):
        figures.plot_categories(gains, TRUTHFULNESS, folder / "categories.png")
        yield "## Where gains come from"
        yield "![Gain by category of TruthfulQA](categories.png)"
    if found := style_correlations(orders):
        figures.plot_styles(found, folder / "style.png")
        yield "![Gain in TruthfulQA against its correlation with style](style.png)"
    if points := yes_rates(scores):
        figures.plot_yes_rates(points, folder / "yes_rates.png")
        yield "![Gain in ETHICS against the change of the share of yes](yes_rates.png)"
