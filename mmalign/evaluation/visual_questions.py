"""Short-answer questions about pictures: what the model sees, against what it can guess.

An answer is right when greedy decoding writes exactly it: every token of the answer and of its end
mark is the most likely one after the gold tokens before it, which one forward tells. The same
questions are put three times: with their picture, without any ("blind": the text alone) and with
the picture of another question ("misled"). A model that learned only how answers are spread does as
well without the picture.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmalign.batch import IGNORE_INDEX, PackedBatch
from mmalign.config import DataConfig, TrainConfig
from mmalign.data.dataset import ConversationDataset
from mmalign.data.packing import pack_samples
from mmalign.data.samples import Sample, read_samples
from mmalign.errors import UserError
from mmalign.evaluation.statistics import wilson_interval
from mmalign.model.hf import load_llava
from mmalign.model.llava import Llava
from mmalign.tokenizer import Tokenizer

Picture = Literal["own", "none", "other"]


@dataclass(frozen=True)
class VisualScore:
    right: np.ndarray  # (num_questions,) bool, in file order

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def n(self) -> int:
        return len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """95%, Wilson."""
        return wilson_interval(self.accuracy, self.n)


def score_visual_questions(
    llava: Llava,
    tokenizer: Tokenizer,
    data: DataConfig,
    picture: Picture = "own",
    batch_tokens: int = 8192,
    progress: bool = True,
) -> VisualScore:
    """Exact-match accuracy of greedy answers to the questions in data.path.

    Every record is one question with its gold answer in LLaVA's format; data.template and
    data.use_im_start_end are those that the model was tuned with. picture: its own, none (the
    question's text alone), or "other": that of a record about half a file away. UserError where a
    question has several turns, or no other picture is there.
    """
    data = replace(data, text_only=picture == "none")
    samples = list(read_samples(data.path, data))
    dataset = ConversationDataset(samples, tokenizer, data, llava.vision_tower.config)
    right = np.zeros(len(samples), dtype=bool)
    encoded = [dataset.encode(index) for index in range(len(samples))]
    for sample in samples:
        if len(sample.conversations) != 2:
            raise UserError(
                f"question {sample.id!r} in {data.path}: expected one question and its answer, "
                f"found {len(sample.conversations)} turns"
            )
    shown = _other_pictures(samples) if picture == "other" else range(len(samples))
    device = llava.decoder.embed_tokens.weight.device
    bar = tqdm(total=len(samples), desc=f"questions, picture: {picture}", disable=not progress)
    with torch.inference_mode(), bar:
        for chosen in _batches([len(sample.input_ids) for sample in encoded], batch_tokens):
            pixels = [dataset.load_pixels(shown[index]) for index in chosen]
            batch = pack_samples([encoded[index] for index in chosen], pixels, llava.image_token_id)
            right[chosen] = _exact(llava, batch.to(device)).cpu().numpy()
            bar.update(len(chosen))
    return VisualScore(right)


def _other_pictures(samples: Sequence[Sample]) -> list[int]:
    """For every record one with another picture, looked for from half a file away."""
    images, n = [sample.image for sample in samples], len(samples)
    if len(set(images)) < 2:
        raise UserError("all questions are about one picture; there is no other to show")
    starts = (index + n // 2 for index in range(n))
    return [
        next(other % n for other in range(start, start + n) if images[other % n] != images[index])
        for index, start in enumerate(starts)
    ]


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    batches, room = [], 0
    for index, length in enumerate(lengths):
        if length > room or not batches:
            batches.append([])
            room = batch_tokens
        batches[-1].append(index)
        room -= length
    return batches


def _exact(llava: Llava, batch: PackedBatch) -> Tensor:
    """(num_samples,) bool: whether every supervised token of a sample is the most likely one."""
    rows = (batch.target_ids != IGNORE_INDEX).nonzero().squeeze(1)
    hidden_states = llava.hidden_states(batch)[rows]  # (num_loss_tokens, hidden_size)
    predicted = (hidden_states @ llava.decoder.lm_head.weight.T).argmax(-1)
    wrong = predicted != batch.target_ids[rows]
    sample_of = torch.bucketize(rows, batch.cu_seqlens[1:].long(), right=True)
    num_wrong = torch.zeros(len(batch.cu_seqlens) - 1, device=rows.device)
    return num_wrong.index_add(0, sample_of, wrong.float()) == 0


# ---- a finetuned run ----


def score_run(config: TrainConfig, path: str | Path, image_root: str | Path) -> dict:
    """Puts the questions in `path` to the model that the finetuning run `config` exported.

    {"tuned", "blind", "misled", "chance", "majority": accuracies, 0 to 1, "n": questions,
    "kinds": the same for each "type" of question}. chance is the mean of 1 / number of "choices" of
    a record; majority gives every kind of question its most frequent answer.
    """
    folder = Path(config.run_dir) / "export" / "llava"
    tokenizer = Tokenizer.from_pretrained(folder)
    llava = load_llava(folder, tokenizer)
    data = replace(
        config.data, path=str(path), image_root=str(image_root), types=(), num_samples=None
    )
    right = {
        name: score_visual_questions(llava, tokenizer, data, picture).right
        for name, picture in (("tuned", "own"), ("blind", "none"), ("misled", "other"))
    }
    records = json.loads(Path(path).read_text(encoding="utf-8"))
    rows_of = defaultdict(list)
    for index, record in enumerate(records):
        rows_of[record.get("type", "")].append(index)
    kinds = {kind: _summary(rows, records, right) for kind, rows in sorted(rows_of.items())}
    summary = _summary(range(len(records)), records, right)
    summary["majority"] = sum(k["majority"] * k["n"] for k in kinds.values()) / len(records)
    return summary | {"kinds": kinds}


def _summary(rows: Sequence[int], records: list[dict], right: dict[str, np.ndarray]) -> dict:
    answers = Counter(records[index]["conversations"][1]["value"] for index in rows)
    return {
        **{name: float(values[list(rows)].mean()) for name, values in right.items()},
        "chance": float(np.mean([1 / len(records[index]["choices"]) for index in rows])),
        "majority": max(answers.values()) / len(rows),
        "n": len(rows),
    }
