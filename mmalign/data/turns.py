"""What the turns of a sample must be like before they are written by a template."""

from collections.abc import Sequence

from mmalign.config import DataConfig
from mmalign.data.samples import Sample, Turn
from mmalign.data.segments import IMAGE
from mmalign.data.templates import Template
from mmalign.errors import SampleError


def checked_turns(sample: Sample, data: DataConfig, template: Template) -> list[Turn]:
    """The turns as the template takes them; with data.text_only without `<image>`.

    Raises SampleError.
    """
    turns = list(sample.conversations)
    problem = speaker_problem(turns) or _image_problem(sample, data.text_only)
    if not problem and turns[0].speaker == "system" and not template.writes_system:
        raise SampleError(
            sample.id,
            f"it has a system prompt, which template {data.template} does not write",
            "Remove it, or choose another --data.template, such as v1 or chat",
        )
    if not problem and template.single_turn and len(turns) != 2:
        problem = (
            f"template {data.template} takes one question and one answer, got {len(turns)} turns"
        )
    if problem:
        raise SampleError(sample.id, problem, "Fix the sample or remove it from the file")
    if data.text_only:
        turns = [_without_image(turn) if IMAGE in turn.text else turn for turn in turns]
    for turn in turns[1::2] if template.drops_question else turns:
        if not turn.text.strip():
            what = "nothing to train on: an answer" if turn.speaker == "gpt" else "a question"
            raise SampleError(
                sample.id, f"{what} is empty", "Fill it in or remove the sample from the file"
            )
    return turns


def speaker_problem(turns: Sequence[Turn]) -> str | None:
    """Speakers must alternate, human first, after a system turn or none.

    (The reference drops a leading answer silently.)
    """
    has_system = bool(turns) and turns[0].speaker == "system"
    turns, expected = turns[has_system:], ("human", "gpt")
    for i, turn in enumerate(turns):
        if turn.speaker != expected[i % 2]:
            where = f"turn {i + 1 + has_system} is from {turn.speaker!r}"
            return f"{where}, expected {expected[i % 2]!r}"
    if not turns:
        return "nothing to train on: no turns"
    if len(turns) % 2:
        return f"nothing to train on after its last turn ({len(turns)}), a question without answer"
    return None


def _image_problem(sample: Sample, text_only: bool) -> str | None:
    for turn in sample.conversations:
        if IMAGE in turn.text and turn.speaker != "human":
            where = "an answer" if turn.speaker == "gpt" else "the system prompt"
            return f"{IMAGE} is in {where}; it belongs in a question"
    if text_only:
        return None
    if sample.other_image:
        return f"its field {sample.other_image!r} holds a picture; only 'image' is read"
    count = sum(turn.text.count(IMAGE) for turn in sample.conversations)
    if count == len(sample.images):
        return None
    found = f"{count} {IMAGE} in its questions"
    if not sample.images:
        return f"{found}, but the sample has no image"
    if len(sample.images) == 1:
        return f"{found}, expected 1 for its image {sample.images[0]!r}"
    return f"{found}, expected {len(sample.images)}, one for each of its images"


def _without_image(turn: Turn) -> Turn:
    return Turn(turn.speaker, turn.text.replace(IMAGE, "").strip())
