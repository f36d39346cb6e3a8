"""Questions of a study: what they compare, and the answer that its scores give.

    visual - base                                      a difference; claimed to be positive
    visual ~ text-only                                 at most `margin` points apart
    (conversation - reasoning) on ethics_mean vs truthfulqa_mc2    a difference of differences
    (visual - base) of llama2-7b vs vicuna-7b                      the same between two parents
    slope of v10k v20k v40k v80k                       points per doubling of `amounts`

Each is a weighted sum of scores whose weights add up to 0, estimated by statistics.estimate.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mmalign.errors import UserError
from mmalign.evaluation.document_scores import MEANS, DocumentScores
from mmalign.evaluation.statistics import holm
from mmalign.study.statistics import ALPHA, Estimate, Part, estimate

BASE = "base"  # the variant that is the parent itself, without a seed
BASE_SEED = -1  # of models that are scored as they are: base, and published ones
Verdict = Literal["supported", "contradicted", "cannot tell", "not run", "too few documents"]
RunKey = tuple[str, str, int]  # (parent, variant, seed)
Scores = Mapping[RunKey, Mapping[str, DocumentScores]]

_NAME = r"[\w.\-]+?"
_DIFFERENCE = re.compile(rf"({_NAME})\s+([-~])\s+({_NAME})")
_INTERACTION = re.compile(r"\((.+)\)\s+(on|of)\s+(\S+)\s+vs\s+(\S+)")
_SLOPE = re.compile(r"slope\s+of\s+(.+)")


@dataclass(frozen=True)
class Question:
    name: str
    asks: str
    contrast: str
    metrics: tuple[str, ...] = ()
    margin: float = 0.0  # points; of a contrast with ~
    amounts: tuple[float, ...] = ()  # of a slope
    family: str = "primary"  # Holm's correction runs over the tests of one family


@dataclass(frozen=True)
class Contrast:
    """Weights by variant, and what they are compared over."""

    variants: tuple[tuple[str, float], ...]
    equivalence: bool = False
    metrics: tuple[str, str] | None = None  # first minus second, instead of the question's
    parents: tuple[str, str] | None = None  # first minus second, instead of each by itself


@dataclass(frozen=True)
class Answer:
    """One test: a question about one parent and one metric. Scores are shares, 0 to 1."""

    question: Question
    contrast: Contrast
    parent: str
    metric: str
    verdict: Verdict
    estimate: Estimate | None = None
    num_seeds: int = 0
    seeded: bool = False  # whether seed noise is part of the error: a claim about the recipe
    p: float = 1.0
    p_holm: float = 1.0
    detectable: float = 0.0  # smallest difference that this test could have seen


def parse_contrast(question: Question) -> Contrast:
    """Raises UserError that shows the forms."""
    text = question.contrast.strip()
    if match := _INTERACTION.fullmatch(text):
        inside, kind, first, second = match.groups()
        contrast = parse_contrast(replace(question, contrast=inside))
        if contrast.equivalence or contrast.metrics or contrast.parents:
            raise _unknown(question, "an interaction compares differences")
        pair = (first, second)
        return replace(contrast, metrics=pair) if kind == "on" else replace(contrast, parents=pair)
    if match := _SLOPE.fullmatch(text):
        return Contrast(_slope_weights(question, match[1].split()))
    if match := _DIFFERENCE.fullmatch(text):
        first, sign, second = match.groups()
        if first == second:
            raise _unknown(question, "it compares a variant with itself")
        if sign == "~" and not question.margin > 0:
            raise _unknown(question, "~ needs margin = POINTS, above 0")
        return Contrast(((first, 1.0), (second, -1.0)), equivalence=sign == "~")
    raise _unknown(question, "it has none of the known forms")


def _unknown(question: Question, what: str) -> UserError:
    return UserError(
        f"question {question.name}: contrast {question.contrast!r}: {what}. Expected 'A - B', "
        "'A ~ B' with margin, '(A - B) on METRIC vs METRIC', '(A - B) of PARENT vs PARENT', or "
        "'slope of A B C' with amounts"
    )


def _slope_weights(question: Question, variants: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Weights of the least-squares slope over log2(amount): points per doubling."""
    amounts = question.amounts
    if len(amounts) != len(variants) or len(set(amounts)) < 2 or min(amounts) <= 0:
        raise _unknown(
            question, f"{len(variants)} variants need as many amounts above 0, came {amounts}"
        )
    x = np.log2(amounts)
    x -= x.mean()
    weights = x / (x @ x)
    return tuple(zip(variants, weights.tolist(), strict=True))


def answer(questions: Sequence[Question], scores: Scores, parents: Sequence[str]) -> list[Answer]:
    """Every test of every question, in order; p_holm within each family."""
    answers = [test for question in questions for test in _tests(question, scores, parents)]
    for family in dict.fromkeys(test.question.family for test in answers):
        run = [i for i, x in enumerate(answers) if x.question.family == family and x.estimate]
        corrected = holm([answers[i].p for i in run])
        for i, p_holm in zip(run, corrected, strict=True):
            answers[i] = _judge(answers[i], p_holm, len(run))
    return answers


def _tests(question: Question, scores: Scores, parents: Sequence[str]) -> list[Answer]:
    contrast = parse_contrast(question)
    if contrast.metrics:
        metrics = [(" vs ".join(contrast.metrics), _signed(contrast.metrics))]
    else:
        metrics = [(metric, {metric: 1.0}) for metric in question.metrics]
    if contrast.parents:
        groups = [(" vs ".join(contrast.parents), _signed(contrast.parents))]
    else:
        groups = [(parent, {parent: 1.0}) for parent in parents]
    return [
        _test(question, contrast, (parent, over_parents), (metric, over_metrics), scores)
        for parent, over_parents in groups
        for metric, over_metrics in metrics
    ]


def _signed(pair: tuple[str, str]) -> dict[str, float]:
    return {pair[0]: 1.0, pair[1]: -1.0}


def _test(
    question: Question,
    contrast: Contrast,
    parents: tuple[str, dict[str, float]],
    metrics: tuple[str, dict[str, float]],
    scores: Scores,
) -> Answer:
    not_run = Answer(question, contrast, parents[0], metrics[0], "not run")
    cells = [
        (parent, variant, metric, weight * over_parents * over_metrics)
        for variant, weight in contrast.variants
        for parent, over_parents in parents[1].items()
        for metric, over_metrics in _without_means(metrics[1])
    ]
    seeds = _shared_seeds(scores, {(parent, variant) for parent, variant, _, _ in cells})
    keys = [(p, v, metric, seed) for p, v, metric, _ in cells for seed in seeds]
    if not keys or any(
        metric not in scores.get(_run(scores, p, v, seed), ()) for p, v, metric, seed in keys
    ):
        return not_run
    parts = _parts(cells, seeds, scores)
    if any(len(np.unique(part.clusters)) < 2 for part in parts):
        return replace(not_run, verdict="too few documents")
    found = estimate(parts)
    p = found.p_equivalence(question.margin / 100) if contrast.equivalence else found.p_difference()
    seeded = found.seed_error is not None
    return replace(not_run, estimate=found, num_seeds=len(seeds), seeded=seeded, p=p)


def _without_means(metrics: Mapping[str, float]) -> Iterable[tuple[str, float]]:
    for metric, weight in metrics.items():
        members = MEANS.get(metric, (metric,))
        yield from ((member, weight / len(members)) for member in members)


def _run(scores: Scores, parent: str, variant: str, seed: int) -> RunKey:
    unseeded = (parent, variant, BASE_SEED)
    return unseeded if unseeded in scores else (parent, variant, seed)


def _shared_seeds(scores: Scores, runs: set[tuple[str, str]]) -> list[int]:
    """Seeds that all of these variants have; one that is not trained counts for every seed."""
    of_run = [{s for p, v, s in scores if (p, v) == run} for run in runs]
    seeded = [seeds for seeds in of_run if seeds != {BASE_SEED}]
    return sorted(set.intersection(*seeded)) if seeded else [BASE_SEED]


def _parts(
    cells: Sequence[tuple[str, str, str, float]], seeds: Sequence[int], scores: Scores
) -> list[Part]:
    """One part for each set of documents; scores of the same documents are paired one by one."""
    totals: dict[tuple[str, bytes], Part] = {}
    documents: dict[str, DocumentScores] = {}  # by metric
    for parent, variant, metric, weight in cells:
        rows = [scores[_run(scores, parent, variant, seed)][metric] for seed in seeds]
        first = documents.setdefault(metric, rows[0])
        for row in rows:
            _require_same_documents(first, row, f"{parent} {variant}")
        values = weight * np.stack([row.values for row in rows])  # (num_seeds, num_documents)
        key = (_questions(first.task), first.doc_ids.tobytes())
        if key in totals:
            values = values + totals[key].values
        totals[key] = Part(values, first.clusters)
    return list(totals.values())


def _questions(task: str) -> str:
    """Tasks that ask the same questions have the same documents."""
    return "truthfulqa" if task.startswith("truthfulqa") else task


def _require_same_documents(a: DocumentScores, b: DocumentScores, run: str) -> None:
    if not np.array_equal(a.doc_ids, b.doc_ids):
        raise UserError(
            f"{run}: {b.metric} has {len(b.doc_ids)} documents, not the same {len(a.doc_ids)} as "
            "another run; evaluate all runs of a study on the same files"
        )


def _judge(test: Answer, p_holm: float, num_tests: int) -> Answer:
    found, verdict = test.estimate, "cannot tell"
    assert found is not None
    if p_holm < ALPHA:
        positive = test.contrast.equivalence or found.value > 0
        verdict = "supported" if positive else "contradicted"
    elif test.contrast.equivalence and (
        found.p_beyond(test.question.margin / 100) < ALPHA / num_tests
    ):
        verdict = "contradicted"
    detectable = found.smallest_detectable(ALPHA / num_tests)
    return replace(test, p_holm=p_holm, verdict=verdict, detectable=detectable)


# ---- in words ----


def verdict_sentence(question: Question, answers: Sequence[Answer]) -> str:
    """The question, the verdict on each of its tests, and the numbers that decide it."""
    mine = [test for test in answers if test.question == question]
    return f"**{question.name}** {question.asks} " + "; ".join(map(words, mine)) + "."


def words(test: Answer) -> str:
    """The verdict of one test, and the numbers that decide it."""
    where = f"{test.metric} of {test.parent}"
    if test.estimate is None:
        return f"{where}: {test.verdict}"
    low, high = (100 * bound for bound in test.estimate.interval())
    margin = f" within {test.question.margin:g} points" if test.contrast.equivalence else ""
    seeds = f"{test.num_seeds} seeds" if test.seeded else "one seed: these checkpoints only"
    return (
        f"**{test.verdict}**{margin}: {100 * test.estimate.value:+.1f} points on {where} "
        f"({low:+.1f} to {high:+.1f}, p {_p(test.p_holm)}, {seeds}; "
        f"the smallest effect that could have been seen: {100 * test.detectable:.1f})"
    )


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
