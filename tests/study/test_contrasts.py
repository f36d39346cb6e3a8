from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from mmalign.errors import UserError
from mmalign.evaluation.document_scores import MEANS, DocumentScores
from mmalign.study.contrasts import (
    BASE_SEED,
    Answer,
    Contrast,
    Question,
    answer,
    parse_contrast,
    verdict_sentence,
)


def question(contrast: str, *metrics: str, **fields) -> Question:
    return Question("Q", "Is it so?", contrast, metrics or ("truthfulqa_mc2",), **fields)


BOTH = ("published", "base")


class Runs:
    """Scores of runs that share document noise and have seed noise and effects of their own."""

    def __init__(self, num_documents: int = 120, num_seeds: int = 3):
        self.random = np.random.default_rng(0)
        self.num_seeds = num_seeds
        self.documents = {
            metric: self.random.uniform(0.2, 0.6, num_documents)
            for metric in ("truthfulqa_mc1", "truthfulqa_mc2", *MEANS["ethics_mean"])
        }
        self.scores: dict = {}

    def add(
        self, variant: str, effects: dict[str, float], parent: str = "p", seed_sd: float = 0.003
    ) -> "Runs":
        for seed in [BASE_SEED] if variant == "base" else range(self.num_seeds):
            run = {}
            for metric, documents in self.documents.items():
                noise = 0.0 if variant == "base" else seed_sd * self.random.standard_normal()
                answers = 0.05 * self.random.standard_normal(len(documents))
                values = documents + effects.get(metric, 0.0) + noise + answers
                ids = np.arange(len(documents))
                run[metric] = DocumentScores(metric, metric, ids, ids, values)
            self.scores[parent, variant, seed] = run
        return self

    def answer(self, *questions: Question, parents: tuple[str, ...] = ("p",)) -> list[Answer]:
        return answer(questions, self.scores, parents)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("visual - base", Contrast((("visual", 1.0), ("base", -1.0)))),
        ("text-only - v10k", Contrast((("text-only", 1.0), ("v10k", -1.0)))),
        ("a ~ b", Contrast((("a", 1.0), ("b", -1.0)), equivalence=True)),
        (
            "(a - b) on ethics_mean vs truthfulqa_mc2",
            Contrast((("a", 1.0), ("b", -1.0)), metrics=("ethics_mean", "truthfulqa_mc2")),
        ),
        (
            "(a - b) of llama2-7b vs vicuna-7b",
            Contrast((("a", 1.0), ("b", -1.0)), parents=("llama2-7b", "vicuna-7b")),
        ),
    ],
)
def test_contrasts_are_read(text, expected):
    assert parse_contrast(question(text, margin=1.0)) == expected


@pytest.mark.parametrize(
    ("text", "fields", "says"),
    [
        ("visual", {}, "none of the known forms"),
        ("visual > base", {}, "none of the known forms"),
        ("a - a", {}, "with itself"),
        ("a ~ b", {}, "margin"),
        ("(a ~ b) on x vs y", {"margin": 1.0}, "compares differences"),
        ("slope of a b", {"amounts": (1.0,)}, "amounts"),
        ("slope of a b", {"amounts": (1.0, 1.0)}, "amounts"),
        ("slope of a b", {"amounts": (0.0, 1.0)}, "amounts"),
    ],
)
def test_a_contrast_that_says_nothing_is_refused(text, fields, says):
    with pytest.raises(UserError, match=says):
        parse_contrast(question(text, **fields))


def test_verdicts_on_known_effects():
    runs = Runs().add("base", {}).add("up", {"truthfulqa_mc2": 0.1}).add("same", {})
    up, down, none = runs.answer(
        question("up - base"), question("base - up"), question("same - base")
    )
    assert [x.verdict for x in (up, down, none)] == ["supported", "contradicted", "cannot tell"]
    assert up.estimate and up.estimate.value == pytest.approx(0.1, abs=0.02)
    assert up.seeded and up.num_seeds == 3
    assert none.detectable < 0.05


def test_equivalence_needs_evidence_too():
    runs = Runs().add("a", {}).add("b", {}).add("far", {"truthfulqa_mc2": 0.1})
    runs.add("noisy", {}, seed_sd=0.05)
    verdicts = [
        runs.answer(question(f"a ~ {other}", margin=margin))[0].verdict
        for other, margin in (("b", 3.0), ("far", 3.0), ("noisy", 3.0))
    ]
    assert verdicts == ["supported", "contradicted", "cannot tell"]


def test_a_mean_of_tasks_is_the_mean_of_their_differences():
    effects = dict(zip(MEANS["ethics_mean"], (0.3, 0.0, 0.0, 0.0, -0.1), strict=True))
    runs = Runs().add("base", {}).add("tuned", effects)
    (found,) = runs.answer(question("tuned - base", "ethics_mean"))
    assert found.estimate and found.estimate.value == pytest.approx(0.04, abs=0.01)
    difference = [
        np.mean([runs.scores["p", "tuned", seed][m].values.mean() for m in effects])
        - np.mean([runs.scores["p", "base", BASE_SEED][m].values.mean() for m in effects])
        for seed in range(3)
    ]
    assert found.estimate.by_seed == pytest.approx(difference)


def test_difference_of_differences_over_metrics_and_parents():
    runs = Runs()
    for parent, effect in (("strong", 0.05), ("weak", 0.2)):
        runs.add("base", {}, parent).add("visual", {"truthfulqa_mc2": effect}, parent)
    tasks, parents = runs.answer(
        question("(visual - base) on truthfulqa_mc2 vs ethics_mean"),
        question("(visual - base) of weak vs strong"),
        parents=("weak",),
    )
    assert tasks.estimate and tasks.estimate.value == pytest.approx(0.2, abs=0.02)
    assert parents.estimate and parents.estimate.value == pytest.approx(0.15, abs=0.02)
    assert tasks.verdict == parents.verdict == "supported"


def test_tasks_that_ask_the_same_questions_are_paired():
    runs = Runs().add("base", {}).add("tuned", {})
    for run in runs.scores.values():  # mc1 = mc2 by document: their difference is exactly 0
        run["truthfulqa_mc1"] = DocumentScores(
            "truthfulqa_mc1", "truthfulqa_mc1", *_fields(run["truthfulqa_mc2"])
        )
    (found,) = runs.answer(question("(tuned - base) on truthfulqa_mc1 vs truthfulqa_mc2"))
    assert found.estimate and found.estimate.standard_error == 0.0


def _fields(scores: DocumentScores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return scores.doc_ids, scores.clusters, scores.values


def test_slope_is_that_of_the_least_squares_line():
    amounts = (10.0, 20.0, 40.0, 160.0)
    runs = Runs()
    for amount in amounts:
        runs.add(f"v{amount:g}k", {"truthfulqa_mc2": 0.03 * np.log2(amount)})
    names = " ".join(f"v{amount:g}k" for amount in amounts)
    (found,) = runs.answer(question(f"slope of {names}", amounts=amounts))
    means = [
        np.mean([runs.scores["p", f"v{x:g}k", s]["truthfulqa_mc2"].values.mean() for s in range(3)])
        for x in amounts
    ]
    expected = stats.linregress(np.log2(amounts), means)
    assert found.estimate and found.estimate.value == pytest.approx(expected.slope)
    assert found.verdict == "supported"


def test_holm_runs_over_the_tests_of_a_family():
    runs = Runs().add("base", {}).add("a", {"truthfulqa_mc2": 0.02}).add("b", {})
    primary = question("a - base", "truthfulqa_mc2", "truthfulqa_mc1")
    other = question("b - base", family="controls")
    one, two, three = runs.answer(primary, other)
    assert one.p_holm == pytest.approx(min(1.0, 2 * one.p)) and two.p_holm >= two.p
    assert three.p_holm == three.p


def test_missing_runs_leave_a_gap_and_unequal_seeds_are_not_paired():
    runs = Runs().add("base", {}).add("a", {})
    missing = runs.answer(question("a - b"))[0]
    assert missing.verdict == "not run" and "not run" in verdict_sentence(
        missing.question, [missing]
    )
    runs.num_seeds = 2
    runs.add("b", {})
    assert runs.answer(question("a - b"))[0].num_seeds == 2


def test_documents_of_one_cluster_bear_no_interval():
    runs = Runs().add("base", {}).add("a", {})
    runs.scores = {
        key: {name: replace(x, clusters=np.zeros_like(x.clusters)) for name, x in run.items()}
        for key, run in runs.scores.items()
    }
    [test] = runs.answer(question("a - base"))
    assert test.estimate is None and "too few documents" in verdict_sentence(test.question, [test])


def test_models_that_are_not_trained_have_no_seed():
    """Two of them are compared once; one of them counts for every seed of a trained variant."""
    runs = Runs().add("base", {}).add("a", {}).add("b", {"truthfulqa_mc2": 0.1})
    runs.scores["p", "published", BASE_SEED] = runs.scores["p", "b", 0]
    alone, trained = runs.answer(question("published - base"), question("a ~ published", margin=1))
    assert alone.num_seeds == 1 and not alone.seeded and alone.verdict == "supported"
    means = [runs.scores["p", x, BASE_SEED]["truthfulqa_mc2"].values.mean() for x in BOTH]
    assert alone.estimate.value == pytest.approx(means[0] - means[1])
    assert trained.num_seeds == 3 and trained.verdict == "contradicted"


def test_one_seed_speaks_for_its_checkpoints_only():
    runs = Runs(num_seeds=1).add("base", {}).add("a", {"truthfulqa_mc2": 0.1})
    (found,) = runs.answer(question("a - base"))
    sentence = verdict_sentence(found.question, [found])
    assert not found.seeded and "one seed: these checkpoints only" in sentence
    assert "supported" in sentence and "points" in sentence


def test_other_documents_are_refused():
    runs = Runs().add("base", {}).add("a", {})
    run = runs.scores["p", "a", 1]
    ids, clusters, values = _fields(run["truthfulqa_mc2"])
    run["truthfulqa_mc2"] = DocumentScores(
        "truthfulqa_mc2", "truthfulqa_mc2", ids[1:], clusters[1:], values[1:]
    )
    with pytest.raises(UserError, match="p a: truthfulqa_mc2 has 119 documents"):
        runs.answer(question("a - base"))
