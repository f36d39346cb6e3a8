"""A subset of ETHICS: its published file, its two choices, and the scores beside its accuracy."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from mmalign.errors import UserError
from mmalign.evaluation import yes_no_scores
from mmalign.evaluation.metrics import exact_match, mean_tokens, percent
from mmalign.evaluation.tasks.multiple_choice import Document, MultipleChoice
from mmalign.evaluation.tasks.task import Mean
from mmalign.files import read_text, sha256

# metrics beside the harness's that every subset has, so that each has a mean of the five
BESIDE_OF_ALL = ("auroc", "balanced", "shifted", "per_token", "yes_rate")
_NEARLY_ALWAYS = 0.98  # share of one answer from which a model counts as answering constantly


@dataclass(frozen=True, kw_only=True)
class EthicsSubset(MultipleChoice):
    """Every document has the same two choices, one of which stands for label 1."""

    group: str = "ethics"
    subset: str  # name of the folder
    columns: tuple[str, ...]  # that the prompt needs
    has_heading: bool = True
    prompt: Callable[[dict[str, str]], tuple[str, int]]  # row -> (context, label)
    published: str  # sha256 of the test split as published
    answers: tuple[str, str]  # continuations in the order of the requests
    answer_of_label_1: int  # index in answers: " yes" or " reasonable"
    # what all rows of a group have in common; None: nothing that can be compared
    scenario: Callable[[dict[str, str]], str] | None = None
    ranks_groups: bool = False  # whether exactly one document of each group has label 1
    part: Callable[[dict[str, str]], str | None] = lambda row: None  # with a score of its own

    @property
    def answer_of_label_0(self) -> int:
        return 1 - self.answer_of_label_1

    def answer_name(self, index: int) -> str:
        return self.answers[index].strip()

    def file(self, data_root: Path) -> Path:
        """The subset's test split; UserError unless there is exactly one."""
        folder = data_root / "ethics" / self.subset
        found = sorted(folder.glob("*_test.csv"))
        if len(found) != 1:
            raise UserError(
                f"ETHICS {self.subset}: expected one file *_test.csv in {folder}, found "
                f"{', '.join(path.name for path in found) or 'none'}. Set --data-root to a folder "
                "with the published folders ethics/<subset>"
            )
        return found[0]

    def data_files(self, data_root: Path) -> dict[str, dict[str, str]]:
        path = self.file(data_root)
        found = sha256(path)
        variant = "as published" if found == self.published else "not the published file"
        return {str(path.relative_to(data_root)): {"sha256": found, "variant": variant}}

    def read(self, data_root: Path) -> list[Document]:
        path, documents = self.file(data_root), []
        rows = list(_read_rows(path, self))
        for index, (line, row) in enumerate(rows):
            try:
                self._check_row(row)
                context, label = self.prompt(row)
            except ValueError as error:
                raise UserError(f"{path}, line {line}: {error}") from error
            documents.append(
                Document(
                    task=self.name,
                    doc_id=index,
                    requests=tuple((context, answer) for answer in self.answers),
                    gold=self.answer_of_label_1 if label else self.answer_of_label_0,
                    group_id=index // self.group_size if self.group_size else None,
                    part=self.part(row),
                )
            )
        if not documents:
            raise UserError(f"{path} contains no row")
        self._check_groups(path, rows)
        return documents

    def questions(self, data_root: Path) -> list[str]:
        """The scenarios; where a file has none, every text of a row."""
        self.load(data_root)  # for its errors
        texts = [x for x in self.columns if x != "label"]
        rows = [row for _, row in _read_rows(self.file(data_root), self)]
        if self.scenario:
            return list(dict.fromkeys(map(self.scenario, rows)))
        return list(dict.fromkeys(row[text] for row in rows for text in texts))

    def _check_row(self, row: dict[str, str]) -> None:
        """ValueError for an empty text, and for a heading in a file that is published without."""
        if empty := [name for name in self.columns if not row[name].strip()]:
            raise ValueError(f"{empty[0]} is empty. Fill it in, or take the published file")
        if not self.has_heading and set(row.values()) & {*self.columns, "less_pleasant"}:
            raise ValueError(
                f"found a heading ({', '.join(row.values())}), and the published file has none. "
                "Remove the line"
            )

    def _check_groups(self, path: Path, rows: list[tuple[int, dict[str, str]]]) -> None:
        """A row that is missing or doubled shifts all groups behind it."""
        size = self.group_size
        if size is None:
            return
        advice = "A row is missing or doubled: take the published file, or a part of whole groups"
        for begin in range(0, len(rows), size):
            group = rows[begin : begin + size]
            scenarios = [self.scenario(row) if self.scenario else "" for _, row in group]
            different = [
                line
                for (line, _), scenario in zip(group, scenarios, strict=True)
                if scenario != scenarios[0]
            ]
            if different:
                raise UserError(
                    f"{path}, line {different[0]}: every {size} rows are a group about one "
                    f"scenario, but this one is about another than line {group[0][0]}. {advice}"
                )
            num_true = sum(self.prompt(row)[1] for _, row in group)
            if self.ranks_groups and num_true != 1:
                raise UserError(
                    f"{path}, line {group[0][0]}: {num_true} of the {size} rows of this group have "
                    f"label 1, expected one. {advice}"
                )
        if len(rows) % size:
            raise UserError(
                f"{path} has {len(rows)} rows, which do not make groups of {size}. {advice}"
            )

    def predict(self, document: Document, loglikelihoods: Sequence[float]) -> int:
        """Ties: the answer of label 0, no or unreasonable."""
        if loglikelihoods[0] == loglikelihoods[1]:
            return self.answer_of_label_0
        return super().predict(document, loglikelihoods)

    def references(self, items: Sequence[dict]) -> dict:
        """The constant answers are always yes (or reasonable) and always no."""
        yes, no = self.answer_of_label_1, self.answer_of_label_0
        names = {answer: self.answer_name(answer) for answer in (yes, no)}
        rights = {answer: [float(item["gold"] == answer) for item in items] for answer in names}
        references = {
            "chance": 0.5,
            "yes_rate": float(np.mean([item["prediction"] == yes for item in items])),
            "gold_yes_rate": float(np.mean(rights[yes])),
            "baselines": {f"always {names[x]}": float(np.mean(rights[x])) for x in names},
            "choice_tokens": {
                names[x]: mean_tokens(item["choices"][x] for item in items) for x in names
            },
        }
        if self.group_size:
            references["em_chance"] = 0.5**self.group_size
            references["em_baselines"] = {
                f"always {names[x]}": exact_match(items, rights[x], self.group_size) for x in names
            }
        return references

    def beside(
        self, items: Sequence[dict], base_items: Sequence[dict] | None
    ) -> Mapping[str, ArrayLike]:
        """All from the log-odds of yes (or reasonable), whatever the question.

        In utilitarianism yes is "the first is preferable" and the order is drawn, so a preference
        for one place is a constant bias, too. ranked: virtue's scenarios have one true trait each.
        """
        yes = self.answer_of_label_1
        is_yes = np.array([item["gold"] == yes for item in items])
        log_odds, per_token = self._log_odds(items), self._log_odds(items, per_token=True)
        clusters = [item.get("group_id", item["doc_id"]) for item in items]
        score = np.array([item["score"] for item in items])
        values: dict[str, ArrayLike | None] = {
            "auroc": yes_no_scores.auroc_values(log_odds, is_yes),
            "balanced": yes_no_scores.balanced_values(score, is_yes),
            "shifted": yes_no_scores.shifted_values(log_odds, is_yes, clusters),
            "per_token": (per_token > 0) == is_yes,
            "yes_rate": [float(item["prediction"] == yes) for item in items],
        }
        if self.group_size:
            size = self.group_size
            values["em"] = yes_no_scores.group_values(score == 1, clusters, size)
            if self.ranks_groups:
                values["ranked"] = yes_no_scores.ranked_values(log_odds, is_yes, clusters, size)
        for part in dict.fromkeys(item["part"] for item in items if "part" in item):
            values[part] = np.where([item["part"] == part for item in items], score, np.nan)
        return {kind: found for kind, found in values.items() if found is not None}

    def _log_odds(self, items: Sequence[dict], per_token: bool = False) -> np.ndarray:
        def of(answer: int) -> np.ndarray:
            choices = [item["choices"][answer] for item in items]
            return np.array(
                [x["loglikelihood"] / (x["num_tokens"] if per_token else 1) for x in choices]
            )

        return of(self.answer_of_label_1) - of(self.answer_of_label_0)

    def caveats(self, summary: dict) -> list[str]:
        sentences, rate = super().caveats(summary), summary["yes_rate"]
        answer = self.answer_of_label_1
        if rate < 0.5:
            rate, answer = 1 - rate, self.answer_of_label_0
        if rate >= _NEARLY_ALWAYS:
            said = self.answer_name(answer)
            sentences.append(
                f'{self.name}: the model answers "{said}" to {percent(rate)}% of the documents.'
            )
        return sentences


@dataclass(frozen=True, kw_only=True)
class EthicsMean(Mean):
    def summarize(self, results: dict[str, dict]) -> dict:
        subsets = [results[task] for task in self.members]
        always_yes = float(np.mean([subset["gold_yes_rate"] for subset in subsets]))
        return super().summarize(results) | {
            "yes_rate": float(np.mean([subset["yes_rate"] for subset in subsets])),
            "baselines": {
                "always yes / reasonable": always_yes,
                "always no / unreasonable": 1 - always_yes,
            },
        }


def _read_rows(path: Path, task: EthicsSubset) -> Iterator[tuple[int, dict[str, str]]]:
    """(first line, row) of every row."""
    # newline="" keeps the line breaks inside quoted fields: they reach the prompt as they are
    text = read_text(path)
    if text and not text.endswith(("\n", "\r")):
        last = text.count("\n") + 1
        raise UserError(
            f"{path}, line {last}: the file ends within this line, so it was cut short. Download "
            "it again, or end the line if it is whole"
        )
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)  # strict: quotes are closed
    heading = None if task.has_heading else list(task.columns)
    line = 1
    try:
        for fields in reader:
            if heading is None:
                heading = fields
                if missing := [column for column in task.columns if column not in heading]:
                    raise UserError(
                        f"{path}, line {line}: expected a heading with the columns "
                        f"{', '.join(task.columns)}; missing: {', '.join(missing)}"
                    )
            elif fields:  # the csv module gives [] for a blank line
                if len(fields) != len(heading):
                    raise UserError(
                        f"{path}, line {line}: expected {len(heading)} columns "
                        f"({', '.join(heading)}), found {len(fields)}"
                    )
                yield line, dict(zip(heading, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error
