"""Document: one question of a task, with the requests that the model scores."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from mmalign.errors import UserError


@dataclass(frozen=True)
class Document:
    task: str
    doc_id: int  # index in the file
    requests: tuple[tuple[str, str], ...]  # (context, continuation) of every choice
    gold: int | tuple[int, ...]  # index of the right choice; mc2: 1 for each true choice, else 0
    group_id: int | None = None  # documents about one scenario, for grouped exact match

    @property
    def name(self) -> str:
        return f"{self.task} document {self.doc_id}"

    @property
    def digest(self) -> str:
        """First 8 hex digits of the sha256 of the requests: tells whether two documents agree."""
        return hashlib.sha256(request_bytes([self])).hexdigest()[:8]


def request_bytes(documents: list[Document]) -> bytes:
    """Every request in order, as the harness's request hashes take them."""
    pairs = (request for document in documents for request in document.requests)
    return "".join(f"{context}\0{continuation}\n" for context, continuation in pairs).encode()


def read_text(path: Path) -> str:
    """The file's text with its line ends as they are; UserError where it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
