"""What TruthfulQA and ETHICS ask about, to look it up in training text."""

from pathlib import Path

from mmalign.errors import UserError
from mmalign.evaluation.tasks import TASKS, resolve_tasks
from mmalign.evaluation.tasks.multiple_choice import MultipleChoice


def read_questions(data_root: str | Path) -> tuple[dict[str, list[str]], list[str]]:
    """The texts of each task, and a sentence for each whose file cannot be read."""
    texts, problems = {}, []
    for name in resolve_tasks(["truthfulqa_mc1", "ethics"]):  # mc2 asks the same
        task = TASKS[name]
        assert isinstance(task, MultipleChoice)
        try:
            texts[name] = task.questions(Path(data_root))
        except UserError as error:
            problems.append(f"{name} was not looked for: {error}")
    return texts, problems
