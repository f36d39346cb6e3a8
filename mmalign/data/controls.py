"""Controls: transforms of a data file that each remove one thing which could explain a result.

A control takes the records of a LLaVA file as they are in JSON and a seed, and gives other records;
the same records and seed give the same result on every machine. What must not change stays: ids,
order, and every field that the control does not name.
"""

import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from mmalign.batch import IGNORE_INDEX
from mmalign.config import DataConfig
from mmalign.data.captions import image_key, read_captions
from mmalign.data.dataset import ConversationDataset
from mmalign.data.forms import FormError, as_llava
from mmalign.data.lengths import draw_lengths, kolmogorov_smirnov, wasserstein
from mmalign.data.mix import SUFFIX
from mmalign.data.samples import Sample, id_of, parse_sample, speaker_problem, type_of
from mmalign.data.sources import open_source
from mmalign.data.templates import IMAGE
from mmalign.errors import SampleError, UserError
from mmalign.tokenizer import Tokenizer

Records = Sequence[dict]
CountTokens = Callable[[Sample], int]  # supervised tokens of a sample
MOST_WORDS = 10  # of an answer that short-answers keeps: a word, a phrase or a short sentence
BLANK = "blank.png"
_FIX = "Fix the sample or remove it from the file"


@dataclass(frozen=True)
class Source:
    """What a control may need besides the seed."""

    records: Records
    samples: list[Sample]  # the same, parsed
    random: np.random.RandomState  # its streams never change, unlike default_rng's
    second: Any  # records or captions
    count_tokens: CountTokens | None


@dataclass(frozen=True)
class Controlled:
    records: list[dict]
    about: dict[str, Any]  # for the manifest: what was changed, left out, or achieved


@dataclass(frozen=True)
class Control:
    definition: str
    transform: Callable[[Source], Controlled]
    # what the second file holds: read_records or read_captions reads it
    second: Literal["records", "captions"] | None = None
    # of the run that trains on the result, in the names of the command line
    settings: Mapping[str, Any] = field(default_factory=dict)
    # name -> content of files beside the result, whose folder is then the image root
    files: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)

    def __call__(
        self, rows: Records, seed: int, second: Any = None, count_tokens: CountTokens | None = None
    ) -> Controlled:
        """second: what read_second gives; count_tokens: for length-matched.

        Raises SampleError for a record that does not follow the format or that the control cannot
        take, UserError where a second file is missing, not needed, or nothing is left.
        """
        if (second is None) != (self.second is None):
            needs = f"a second file with {self.second}" if self.second else "no second file"
            raise UserError(f"this control needs {needs} (control-data): {self.definition}")
        source = Source(
            rows, parse_samples(rows), np.random.RandomState(seed), second, count_tokens
        )
        return self.transform(source)

    def read_second(self, path: str | Path) -> Any:
        return read_captions(path) if self.second == "captions" else read_records(path)


def read_records(path: str | Path) -> list[dict]:
    """The objects of a data file in LLaVA's form; Alpaca's become conversations of one turn."""
    if Path(path).suffix == SUFFIX:
        raise UserError(f"{path} is a mix: controls and parts of the data take a single data file")
    return [_as_conversation(record) for _, record in open_source(Path(path)).rows]


def _as_conversation(record: dict) -> dict:
    if not {"instruction", "output"} <= record.keys() or "conversations" in record:
        try:
            return as_llava(record)
        except FormError:  # parse_samples names the sample
            return record
    parts = (record["instruction"], record.get("input"))
    question = "\n".join(str(part) for part in parts if part)
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": record["output"]}]
    return {"conversations": turns} | ({"id": record["id"]} if "id" in record else {})


def parse_samples(rows: Records) -> list[Sample]:
    return [parse_sample(row, id_of(row) or f"#{i}") for i, row in enumerate(rows)]


# ---- pictures ----


def _shuffle_images(source: Source) -> Controlled:
    images = [image for sample in source.samples for image in sample.images]
    _, labels = np.unique(images, return_inverse=True)
    given = [images[i] for i in deranged(labels, source.random)]
    rest = iter(given)
    rows = [
        _with_images(row, [next(rest) for _ in sample.images])
        for row, sample in zip(source.records, source.samples, strict=True)
    ]
    unchanged = sum(old == new for old, new in zip(images, given, strict=True))
    return Controlled(rows, {"images": len(images), "unchanged": unchanged})


def _with_images(row: dict, images: list[str]) -> dict:
    """Other images in the form, a path or a list of them, that the record has."""
    if not images:
        return row
    return row | {"image": images if isinstance(row["image"], list) else images[0]}


def deranged(labels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """A random permutation that gives no place its own label, where one exists.

    labels: (num_places,). Places that got their own label swap with random others; such a partner
    exists unless more than half of all places share the label.
    """
    given = random.permutation(len(labels))
    for i in np.flatnonzero(labels[given] == labels):
        if labels[given[i]] == labels[i]:  # no earlier swap has changed it
            partners = np.flatnonzero((labels != labels[i]) & (labels[given] != labels[i]))
            if len(partners):
                j = partners[random.randint(len(partners))]
                given[i], given[j] = given[j], given[i]
    return given


def _blank_image(source: Source) -> Controlled:
    rows = [
        _with_images(row, [BLANK] * len(sample.images))
        for row, sample in zip(source.records, source.samples, strict=True)
    ]
    return Controlled(rows, {"images": sum(len(sample.images) for sample in source.samples)})


def blank_png() -> bytes:
    """CLIP's mean colour: after normalisation all channels are nearly 0."""
    file = io.BytesIO()
    Image.new("RGB", (336, 336), (123, 117, 104)).save(file, "PNG")
    return file.getvalue()


def _caption_for_image(source: Source) -> Controlled:
    captions: dict[str, str] = source.second
    missing = [
        sample.id
        for sample in source.samples
        if any(image_key(image) not in captions for image in sample.images)
    ]
    if missing:
        more = f" and {len(missing) - 10:,} more" if missing[10:] else ""
        raise UserError(
            f"the captions lack the images of {len(missing):,} of {len(source.samples):,} samples: "
            f"{', '.join(missing[:10])}{more}. Take captions of the same images, or remove these "
            "samples"
        )
    rows = []
    for row, sample in zip(source.records, source.samples, strict=True):
        if sample.images:
            texts = iter([captions[image_key(image)] for image in sample.images])
            count = sum(turn.text.count(IMAGE) for turn in sample.conversations)
            if count != len(sample.images):
                problem = f"{len(sample.images)} images, but {count} {IMAGE} for their captions"
                raise SampleError(sample.id, problem, _FIX)
            turns = [
                turn | {"value": _with_captions(turn["value"], texts)}
                for turn in row["conversations"]
            ]
            row = {key: x for key, x in row.items() if key != "image"} | {"conversations": turns}
        rows.append(row)
    return Controlled(rows, {"captioned": sum(len(x.images) > 0 for x in source.samples)})


def _with_captions(text: str, captions: Iterator[str]) -> str:
    first, *rest = text.split(IMAGE)
    return first + "".join(next(captions) + part for part in rest)


# ---- answers ----


def _permute_answers(source: Source) -> Controlled:
    groups = defaultdict(list)  # (type, position of the answer) -> its samples
    for i, sample in enumerate(source.samples):
        _require_pairs(sample)
        for turn in range(1, len(sample.conversations), 2):
            groups[type_of(source.records[i]), turn].append(i)
    turns = [[dict(turn) for turn in row["conversations"]] for row in source.records]
    alone = 0
    for (_, turn), members in groups.items():
        given = deranged(np.arange(len(members)), source.random)
        for i, j in zip(members, given, strict=True):
            turns[i][turn]["value"] = source.records[members[j]]["conversations"][turn]["value"]
        alone += len(members) == 1
    about = {"answers": sum(map(len, groups.values())), "unchanged": alone}
    return Controlled(_with_turns(source.records, turns), about)


def _with_turns(rows: Records, turns: Sequence[list[dict]]) -> list[dict]:
    return [row | {"conversations": x} for row, x in zip(rows, turns, strict=True)]


def _plain_text(source: Source) -> Controlled:
    """One answer per sample, for template plain, which takes a single turn."""
    turns = []
    for sample in source.samples:
        _require_pairs(sample)
        answers = [turn.text for turn in sample.conversations[1::2]]
        turns.append([_turn("human", ""), _turn("gpt", "\n".join(answers))])
    rows = [{k: x for k, x in row.items() if k != "image"} for row in source.records]
    return Controlled(_with_turns(rows, turns), {"samples": len(rows)})


def _turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def _short_answers(source: Source) -> Controlled:
    rows, num_turns, num_kept = [], 0, 0
    for row, sample in zip(source.records, source.samples, strict=True):
        turns = row["conversations"]
        _require_pairs(sample)
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        kept = [pair for pair in pairs if len(pair[1]["value"].split()) <= MOST_WORDS]
        num_turns, num_kept = num_turns + len(pairs), num_kept + len(kept)
        if kept:
            num_shown = sum(question["value"].count(IMAGE) for question, _ in kept)
            if num_shown < len(sample.images):  # one was shown in a turn that is left out
                kept = _images_first(kept, len(sample.images))
            rows.append(row | {"conversations": [turn for pair in kept for turn in pair]})
    if not rows:
        raise UserError(
            f"none of the {num_turns:,} answers has at most {MOST_WORDS} words, so short-answers "
            "leaves nothing. Take a file with short answers"
        )
    about = {"turns": num_turns, "turns_kept": num_kept, "samples_kept": len(rows)}
    return Controlled(rows, about | {"most_words": MOST_WORDS})


def _images_first(pairs: list[tuple[dict, dict]], num_images: int) -> list[tuple[dict, dict]]:
    """All images before the first question, where their order stays."""
    questions = [question["value"].replace(IMAGE, "").strip() for question, _ in pairs]
    questions[0] = f"{IMAGE}\n" * num_images + questions[0]
    return [
        (question | {"value": text}, answer)
        for (question, answer), text in zip(pairs, questions, strict=True)
    ]


def _require_pairs(sample: Sample) -> None:
    problem = speaker_problem(sample.conversations)
    if not problem and sample.conversations[0].speaker == "system":
        problem = "it has a system prompt, which this control would not keep in its place"
    if problem:
        raise SampleError(sample.id, problem, _FIX)


# ---- lengths ----


def _length_matched(source: Source) -> Controlled:
    if source.count_tokens is None:
        raise ValueError("length-matched needs count_tokens")
    count, candidates = source.count_tokens, parse_samples(source.second)
    for sample in candidates:
        if sample.images:
            raise SampleError(sample.id, "has an image; length-matched draws text alone", _FIX)
    wanted = np.array([count(sample) for sample in source.samples])
    lengths = np.array([_count_or_0(count, sample) for sample in candidates])
    usable = np.flatnonzero(lengths)
    if not len(usable):
        raise UserError("the second file has no sample that could be trained on")
    drawn = usable[draw_lengths(wanted, lengths[usable], source.random)]
    found = lengths[drawn]
    about = {
        "supervised_tokens": [int(wanted.sum()), int(found.sum())],
        "wasserstein": wasserstein(wanted, found),
        "kolmogorov_smirnov": kolmogorov_smirnov(wanted, found),
        "unusable": len(candidates) - len(usable),  # of the second file, as Alpaca's empty answers
        "most_often_drawn": max(Counter(drawn.tolist()).values()),
    }
    return Controlled([source.second[i] for i in drawn], about)


def _count_or_0(count: CountTokens, sample: Sample) -> int:
    try:
        return count(sample)
    except SampleError:
        return 0


def supervised_tokens(data: DataConfig, tokenizer: Tokenizer) -> CountTokens:
    """Counts what a sample trains on in this template; the image has no part in it."""
    text = replace(data, text_only=True)

    def count(sample: Sample) -> int:
        dataset = ConversationDataset([sample], tokenizer, text, None)
        return int(np.count_nonzero(dataset.encode(0).labels[1:] != IGNORE_INDEX))

    return count


CONTROLS: dict[str, Control] = {
    "shuffle-images": Control("every sample has another sample's picture", _shuffle_images),
    "blank-image": Control(
        "every picture is one of CLIP's mean colour", _blank_image, files={BLANK: blank_png}
    ),
    "caption-for-image": Control(
        "the picture's captions, and boxes where there are any, stand in its place as text",
        _caption_for_image,
        second="captions",
        settings={"data.text-only": True},
    ),
    "permute-answers": Control(
        "every answer is another sample's of the same type and turn", _permute_answers
    ),
    "length-matched": Control(
        "text-only instructions of a second file with the same supervised tokens per sample",
        _length_matched,
        second="records",
        settings={"data.text-only": True},
    ),
    "plain-text": Control(
        "the answers as plain text, without picture, questions and conversation template",
        _plain_text,
        settings={"data.text-only": True, "data.template": "plain"},
    ),
    "short-answers": Control(
        f"only turns whose answer has at most {MOST_WORDS} words", _short_answers
    ),
}
