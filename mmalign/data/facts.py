"""What check_data.py says of a data file, as one JSON object."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmalign.data.check import NUM_LISTED, CheckReport
from mmalign.data.dataset import ConversationDataset
from mmalign.data.lengths import summary
from mmalign.data.mix import Mix
from mmalign.data.samples import Samples
from mmalign.data.survey import Survey
from mmalign.errors import LongSampleError, readable

Questions = Mapping[str, Sequence[str]]  # by task
_QUESTION_CHARACTERS = 100


def facts_of(
    dataset: ConversationDataset,
    report: CheckReport,
    survey: Survey,
    questions: Questions,
    not_looked_for: Sequence[str] = (),
) -> dict[str, Any]:
    """questions: by task, those of the survey's index in their order.

    not_looked_for: why others are missing, in sentences.
    """
    tokens, supervised = report.lengths, report.num_loss_tokens
    samples, skips_long = dataset.samples, dataset.data.on_long_sample == "skip"
    is_long = [skips_long and isinstance(x, LongSampleError) for x in report.skipped]
    cut = np.flatnonzero(report.num_cut)
    return {
        "file": dataset.data.path,
        "container": samples.container if isinstance(samples, Samples) else "",
        "mix": samples.summary(report.kept) if isinstance(samples, Mix) else [],
        "samples": len(dataset),
        "usable": len(report.kept),
        "forms": dict(samples.forms) if isinstance(samples, Samples) else {},
        "types": {kind or "none": count for kind, count in survey.types.most_common()},
        "questions_per_sample": _counts(survey.samples[:, 2]),
        "pictures_per_sample": _counts(report.num_images),
        "different_pictures": survey.num_different_pictures,
        "tokens": summary(tokens),
        "supervised_tokens": summary(supervised),
        "supervised_share": int(supervised.sum(dtype=np.int64)) / int(tokens.sum(dtype=np.int64)),
        "unusable": [
            {"id": x.sample_id, "problem": x.problem, "remedy": x.remedy}
            for x, long in zip(report.skipped, is_long, strict=True)
            if not long
        ],
        "left_out_as_too_long": [
            {"id": x.sample_id, "problem": x.problem}
            for x, long in zip(report.skipped, is_long, strict=True)
            if long
        ],
        "truncated": [
            {"id": samples[int(report.kept[i])].id, "tokens_cut": int(report.num_cut[i])}
            for i in cut
        ],
        "duplicates": _duplicates(dataset, survey),
        "overlap": _overlap(dataset, survey, questions),
        "not_looked_for": list(not_looked_for),
    }


def _counts(values: np.ndarray) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values.tolist()).items())}


def _duplicates(dataset: ConversationDataset, survey: Survey) -> dict[str, Any]:
    samples, pictures = survey.repeated_samples(), survey.repeated_pictures()
    names = [[dataset.samples[i].images[place] for i, place in x[:NUM_LISTED]] for x in pictures]
    ids = [[dataset.samples[i].id for i in group[:NUM_LISTED]] for group in samples[:NUM_LISTED]]
    return {
        "samples": sum(len(group) - 1 for group in samples),
        "first_samples": ids,
        "pictures": sum(len(group) - 1 for group in pictures),
        "first_pictures": names[:NUM_LISTED],
        "pictures_not_compared": survey.num_unread_pictures,
    }


def _overlap(dataset: ConversationDataset, survey: Survey, questions: Questions) -> dict[str, Any]:
    """By task, how many questions are found to which part in the sample that has most of each."""
    if survey.questions is None:
        return {}
    samples, found_in, found = survey.overlap.T
    num_runs = survey.questions.num_runs
    share = found / num_runs[found_in]
    best = np.zeros(len(num_runs))
    np.maximum.at(best, found_in, share)
    tasks, begin = {}, 0
    for task, texts in questions.items():
        part = slice(begin, begin := begin + len(texts))
        tasks[task] = {
            "questions": len(texts),
            "too_short": int((num_runs[part] == 0).sum()),
            "whole": int((best[part] == 1).sum()),
            "half": int((best[part] >= 0.5).sum()),
            "any": int((best[part] > 0).sum()),
        }
    names = [(task, text) for task, texts in questions.items() for text in texts]
    first = []
    for question in np.lexsort((-num_runs, -best))[:NUM_LISTED].tolist():
        if best[question] < 0.5:
            break
        where = samples[(found_in == question) & (share == best[question])]
        task, text = names[question]
        first.append(
            {
                "task": task,
                "question": readable(text, _QUESTION_CHARACTERS),
                "share": float(best[question]),
                "samples": [dataset.samples[i].id for i in where[:NUM_LISTED].tolist()],
                "num_samples": len(where),
            }
        )
    return {"tasks": tasks, "first": first}
