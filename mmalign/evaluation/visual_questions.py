"""Short-answer questions about images: what the model sees, against what it can guess.

An answer is right if greedy decoding gives exactly it: every token of the answer and of its end
mark is the argmax after the gold tokens before it, which one forward pass shows. Each question is
asked three times: with its image, without any ("blind": the text alone), and with the image of
another question ("mismatched", a control). A model that has only learned how answers are
distributed does as well without the image.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mmalign.batch import IGNORE_INDEX, PackedBatch
from mmalign.command import progress_bar
from mmalign.config import DataConfig, TrainConfig
from mmalign.data.dataset import ConversationDataset
from mmalign.data.packing import pack_samples
from mmalign.data.samples import Sample, read_samples
from mmalign.errors import UserError
from mmalign.evaluation.statistics import wilson_interval
from mmalign.files import read_text
from mmalign.model.hf import load_llava
from mmalign.model.llava import Llava
from mmalign.system import choose_device
from mmalign.tokenizer import Tokenizer

ShownImage = Literal["own", "none", "mismatched"]


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
    image: ShownImage = "own",
    batch_tokens: int = 8192,
    progress: bool = True,
) -> VisualScore:
    """Exact-match accuracy of greedy answers to the questions in data.path.

    Every record is one question with its gold answer in LLaVA's format; data.template and
    data.use_im_start_end are those that the model was finetuned with. image: the question's own,
    none (its text alone), or mismatched (that of a record about half a file away). Raises UserError
    where a question has several turns, or no other image exists.
    """
    assert llava.vision_tower is not None, "questions about images need a vision tower"
    data = replace(data, text_only=image == "none")
    samples = list(read_samples(data.path, data))
    dataset = ConversationDataset(samples, tokenizer, data, llava.vision_tower.config)
    right = np.zeros(len(samples), dtype=bool)
    encoded = [dataset.encode(index) for index in range(len(samples))]
    for sample in samples:
        if len(sample.conversations) != 2:
            raise UserError(
                f"question {sample.id!r} in {data.path}: expected one question and its answer, "
                f"found {len(sample.conversations)} turns. Fix the record or remove it"
            )
    shown = _mismatched_images(samples) if image == "mismatched" else range(len(samples))
    device = llava.decoder.embed_tokens.weight.device
    bar = progress_bar(total=len(samples), desc=f"questions, image: {image}", disable=not progress)
    with torch.inference_mode(), bar:
        for chosen in _batches([len(sample.input_ids) for sample in encoded], batch_tokens):
            pixels = [dataset.load_pixels(shown[index]) for index in chosen]
            batch = pack_samples([encoded[index] for index in chosen], pixels, llava.image_token_id)
            right[chosen] = _exact(llava, batch.to(device)).cpu().numpy()
            bar.update(len(chosen))
    return VisualScore(right)


def _mismatched_images(samples: Sequence[Sample]) -> list[int]:
    """For every record one with another image, or as many, searched from half a file away."""
    images, n = [sample.images for sample in samples], len(samples)
    if len(set(images)) < 2:
        raise UserError(
            "all questions are about one image: add questions about another one, which is shown "
            "instead as a control"
        )
    chosen = []
    for index, own in enumerate(images):
        others = ((index + n // 2 + i) % n for i in range(n))
        fitting = (i for i in others if images[i] != own and len(images[i]) == len(own))
        found = next(fitting, index if not own else None)
        if found is None:
            raise UserError(
                f"question {samples[index].id!r}: no other one has {len(own)} images, which would "
                "be shown instead as a control. Remove it, or add others"
            )
        chosen.append(found)
    return chosen


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    batches, num_free = [], 0
    for index, length in enumerate(lengths):
        if length > num_free or not batches:
            batches.append([])
            num_free = batch_tokens
        batches[-1].append(index)
        num_free -= length
    return batches


def _exact(llava: Llava, batch: PackedBatch) -> Tensor:
    """(num_samples,) bool: whether every supervised token of a sample is the argmax."""
    rows = (batch.target_ids != IGNORE_INDEX).nonzero().squeeze(1)
    hidden_states = llava.hidden_states(batch)[rows]  # (num_loss_tokens, hidden_size)
    predicted = (hidden_states @ llava.decoder.lm_head.weight.T).argmax(-1)
    wrong = predicted != batch.target_ids[rows]
    sample_of = torch.bucketize(rows, batch.cu_seqlens[1:].long(), right=True)
    num_wrong = torch.zeros(len(batch.cu_seqlens) - 1, device=rows.device)
    return num_wrong.index_add(0, sample_of, wrong.float()) == 0


# ---- a finetuned run ----


def right_answers(
    config: TrainConfig, path: str | Path, image_root: str | Path
) -> dict[ShownImage, np.ndarray]:
    """(num_questions,) bool for every shown image, of the questions in `path`.

    The model is what the finetuning run `config` exported.
    """
    folder = Path(config.run_dir) / "export" / "llava"
    tokenizer = Tokenizer.from_pretrained(folder)
    llava = load_llava(folder, tokenizer).to(choose_device(config.device))
    data = replace(
        config.data, path=str(path), image_root=str(image_root), types=(), num_samples=None
    )
    return {
        image: score_visual_questions(llava, tokenizer, data, image).right
        for image in get_args(ShownImage)
    }


def guessing(path: str | Path) -> dict[str, float]:
    """What answers without a model reach on the questions in `path`, 0 to 1.

    chance: the mean of 1 / number of "choices"; majority: the most frequent answer of every "type".
    """
    records, rows_of = json.loads(read_text(path)), defaultdict(list)
    for record in records:
        rows_of[record.get("type", "")].append(record["conversations"][1]["value"])
    most = sum(max(Counter(answers).values()) for answers in rows_of.values())
    chance = np.mean([1 / len(record["choices"]) for record in records])
    return {"chance": float(chance), "majority": most / len(records)}
