"""answers.jsonl: what a model has said so far, so that an interrupted evaluation continues."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmalign.errors import UserError
from mmalign.evaluation.tasks.vision_task import VisualAnswer, VisualDocument
from mmalign.files import read_json_lines
from mmalign.model.generate import Generation


class AnswerLog:
    """Answers of the evaluation that the first line names; a log of another one is replaced."""

    def __init__(self, path: Path, about: dict):
        self.path, self.about = path, about
        self.answers: dict[tuple[str, int], VisualAnswer] = {}
        rows = read_json_lines(path) if path.is_file() else []
        self.belongs = bool(rows) and rows[0] == self.about
        self.other = {} if self.belongs or len(rows) < 2 else rows[0]  # whose answers are here
        for row in rows[1:] if self.belongs else []:
            generation = Generation(row["token_ids"], row["text"], row["reason"])
            self.answers[row["task"], row["doc_id"]] = VisualAnswer(generation, row["log_odds"])

    def require_own(self) -> None:
        """UserError where the file holds answers of another evaluation."""
        keys = self.other and self.other | self.about
        if changed := [key for key in keys if self.other.get(key) != self.about.get(key)]:
            raise UserError(
                f"{self.path} holds the answers of an evaluation that has not finished, with "
                f"another {', '.join(changed)}. Finish that one, name another --output, or replace "
                "them with --overwrite"
            )

    @contextmanager
    def open(self) -> Iterator[None]:
        if not self.belongs:
            self.path.write_text(json.dumps(self.about) + "\n")
        else:
            self._cut_half_line()
        with open(self.path, "a") as self._file:
            yield

    def _cut_half_line(self) -> None:
        content = self.path.read_bytes()
        os.truncate(self.path, content.rfind(b"\n") + 1)

    def add(
        self, task: str, documents: Sequence[VisualDocument], answers: Sequence[VisualAnswer]
    ) -> None:
        for document, answer in zip(documents, answers, strict=True):
            self.answers[task, document.doc_id] = answer
            row = {"task": task, "doc_id": document.doc_id, "log_odds": answer.log_odds}
            row |= {key: getattr(answer.generation, key) for key in ("token_ids", "text", "reason")}
            self._file.write(json.dumps(row) + "\n")
        self._file.flush()
