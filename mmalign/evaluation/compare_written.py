"""Paired comparison of written answers: the same questions, two models."""

from pathlib import Path

from mmalign.errors import UserError
from mmalign.evaluation.items import read_written_answers
from mmalign.evaluation.paired import compare_scores
from mmalign.evaluation.tasks import GENERATION_TASK
from mmalign.evaluation.tasks.truthfulqa_gen import METRICS

_ASKED = ("prompts", "generation", "data", "score")  # settings that have to agree
_PACKAGES = ("sacrebleu", "rouge-score")  # whose versions have to agree


def compare_written(
    dir_a: str | Path, dir_b: str | Path, config_a: dict, config_b: dict
) -> dict[str, dict]:
    """Rows as those of compare_evaluations, {"truthfulqa_gen_bleu_diff": ..., "..._acc": ...}.

    config_a, config_b: of the folders' truthfulqa_gen.json. Similarities are shares, 0 to 1, as all
    scores of a comparison. Raises UserError where the questions or the way to ask them differ.
    """
    asked_a, asked_b = _asked(config_a), _asked(config_b)
    for key, a in asked_a.items():
        if a != asked_b[key]:
            raise UserError(
                f"{GENERATION_TASK}: {dir_a} and {dir_b} did not ask the same: {key} is {a!r} and "
                f"{asked_b[key]!r}; evaluate both with one version of this program and one file"
            )
    answers_a, answers_b = (read_written_answers(folder) for folder in (dir_a, dir_b))
    if [a["question"] for a in answers_a] != [b["question"] for b in answers_b]:
        raise UserError(
            f"{GENERATION_TASK}: the questions of {dir_a} and {dir_b} differ; evaluate both with "
            "the same --limit"
        )
    rows = {}
    for metric in METRICS:
        for kind, scale in (("diff", 100.0), ("acc", 1.0)):
            score = f"{metric}_{kind}"
            scores = [[x["scores"][score] / scale for x in y] for y in (answers_a, answers_b)]
            rows[f"{GENERATION_TASK}_{score}"], _ = compare_scores(
                *scores, range(len(answers_a)), right_or_wrong=kind == "acc"
            )
    return rows


def _asked(config: dict) -> dict:
    packages = {package: config["versions"].get(package) for package in _PACKAGES}
    return {key: config.get(key) for key in _ASKED} | packages
