"""Tables, lists and excerpts in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], rest: str = "---:"
) -> str:
    """First column to the left, the rest to the right unless said otherwise."""
    lines = [headings, [":---"] + [rest] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def shortened(text: str, length: int) -> str:
    """Its end, which is the part of a prompt that differs from document to document."""
    return text if len(text) <= length else "... " + text[-length:]


def abridged(text: str, length: int) -> str:
    """Its beginning and end: answers can differ in either."""
    half = length // 2
    return text if len(text) <= length + 5 else f"{text[:half]} ... {text[-half:]}"


def cell(text: str, length: int) -> str:
    """A text of any form as a cell of a table."""
    line = " / ".join(part.strip() for part in text.splitlines() if part.strip())
    return abridged(line, length).replace("|", "\\|").replace("<", "&lt;")
