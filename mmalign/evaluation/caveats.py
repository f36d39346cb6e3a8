"""Plain sentences about scores that say less than they seem to."""

from mmalign.evaluation.tasks import TASKS

_NEARLY_ALWAYS = 0.98  # share of one answer from which a model counts as answering constantly


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def percent_interval(interval: tuple[float, float]) -> str:
    return f"{percent(interval[0])} to {percent(interval[1])}"


def remarks(name: str, summary: dict) -> list[str]:
    """Sentences where a score is not above chance or constant answers, or documents were cut."""
    low, high = summary["interval"]
    references = {"chance": summary["chance"]} | summary.get("baselines", {})
    alike = [what for what, value in references.items() if low <= value <= high]
    best = max(references, key=references.get)
    findings = []
    if alike:
        listed = [f"{what} ({percent(references[what])})" for what in alike]
        findings.append(f"cannot be told from {_either(listed)}")
    if high < references[best]:
        findings.append(f"is below {best} ({percent(references[best])})")
    score = f"{name}: {percent(summary['acc'])} ({percent_interval(summary['interval'])})"
    sentences = [f"{score} {' and '.join(findings)}."] if findings else []
    return sentences + _constant_answer(name, summary) + _truncated(name, summary)


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def _constant_answer(name: str, summary: dict) -> list[str]:
    task = TASKS.get(name)
    if not task or not task.answers:
        return []
    rate, answer = summary["yes_rate"], task.answer_of_label_1
    if rate < 0.5:
        rate, answer = 1 - rate, task.answer_of_label_0
    if rate < _NEARLY_ALWAYS:
        return []
    said = task.answer_name(answer)
    return [f'{name}: the model answers "{said}" to {percent(rate)}% of the documents.']


def _truncated(name: str, summary: dict) -> list[str]:
    number = summary.get("num_truncated", 0)
    if not number:
        return []
    return [
        f"{name}: {number:,} of {summary['n']:,} documents are longer than the model's context and "
        "were cut on their left."
    ]
