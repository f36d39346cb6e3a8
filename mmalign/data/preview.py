"""The training data as the model sees it: supervised text, image spans, packing map."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from mmalign.batch import IGNORE_INDEX, PackedBatch
from mmalign.config import DataConfig
from mmalign.data.check import check_samples
from mmalign.data.dataset import ConversationDataset
from mmalign.data.figure import plot_batch
from mmalign.data.mix import SUFFIX, Mix, read_mix
from mmalign.data.packing import micro_batches, pack_samples
from mmalign.data.samples import Samples, read_samples
from mmalign.errors import SampleError, UserError
from mmalign.model.config import CLIP_VIT_L_14, VisionConfig
from mmalign.tokenizer import Tokenizer

_STYLES = {"supervised": "bold green", "image": "cyan", "special": "dim", "text": ""}


@dataclass(frozen=True)
class PreviewModel:
    tokenizer: str
    """Folder or file with tokenizer.model or tokenizer.json."""
    vision_tower: str = ""
    """Hugging Face folder of the vision tower; empty: CLIP ViT-L/14 at 224 px, 256 patches."""


def open_dataset(data: DataConfig, model: PreviewModel) -> tuple[ConversationDataset, str]:
    """The dataset, and lines that say how its file is written and what its images become."""
    if not data.path:  # as a path, that is the working directory
        raise UserError("no data file (--data.path)")
    if data.text_only:
        dataset = _open(data, model.tokenizer, None)
        return dataset, f"{_described(dataset)}\nimages: none (text only)"
    folder = model.vision_tower
    vision = VisionConfig.from_hf(folder) if folder else CLIP_VIT_L_14
    size = f"{vision.image_size} px, {vision.num_patches} patches"
    line = f"images: {folder or 'CLIP ViT-L/14'} {size}"
    line += "" if folder else " (--model.vision-tower for another)"
    dataset = _open(data, model.tokenizer, vision)
    return dataset, f"{_described(dataset)}\n{line}"


def _open(data: DataConfig, tokenizer: str, vision: VisionConfig | None) -> ConversationDataset:
    """Of a mix, data.num_samples are the first of each file."""
    path = Path(data.path)
    if path.suffix != SUFFIX or data.num_samples is None:
        return ConversationDataset.open(data, tokenizer, vision)
    parts = [replace(part, num_samples=None) for part in read_mix(path)]
    samples = Mix(parts, [read_samples(part.path, data) for part in parts], "")
    return ConversationDataset(samples, Tokenizer.from_pretrained(tokenizer), data, vision)


def _described(dataset: ConversationDataset) -> str:
    samples = dataset.samples
    assert isinstance(samples, Samples)
    forms = ", ".join(f"{count:,} in {name} form" for name, count in samples.forms.items())
    return f"data: {samples.container}; {forms}"


def write_json(dataset: ConversationDataset) -> None:
    """Print one object per sample: {"id", "input_ids", "labels"}, labels unshifted, image expanded.

    Image files are not opened and need not exist, unless the tower is LLaVA 1.6's.
    """
    for index in range(len(dataset)):
        try:
            sample = dataset.encode(index)
        except SampleError as error:
            if dataset.data.on_bad_sample == "error":
                raise
            print(f"skipped: {error}", file=sys.stderr)
            continue
        ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
        print(json.dumps({"id": sample.id, "input_ids": ids, "labels": labels}))


def show(
    dataset: ConversationDataset,
    micro_batch_tokens: int,
    console: Console,
    figure: Path | None = None,
) -> None:
    """Print the samples as one optimizer step: the tokens of each, then the packing map.

    figure: where to draw the first micro-batch as a PNG.
    """
    report = check_samples(dataset, progress=False)
    for error in report.skipped:
        console.print(f"skipped: {error}", style="red", markup=False, highlight=False)
    marks = "bold green" if _has_colour(console) else "between [[ and ]]"
    legend = f"supervised: {marks}; <image x N>: the N patches of an image"
    console.print(legend, markup=False, highlight=False)
    table = _packing_table(micro_batch_tokens)
    boundaries = []
    [batches] = micro_batches(report.lengths.tolist(), micro_batch_tokens, world_size=1)
    for number, members in enumerate(batches):
        indices = report.kept[members].tolist()
        encoded = [dataset.encode(i) for i in indices]
        pixels = [dataset.load_pixels(i) for i in indices]
        num_images = sum(len(sample.images) for sample in encoded)
        batch = pack_samples(encoded, pixels, dataset.tokenizer.image_token_id)
        for row, sample in enumerate(encoded):
            console.print(Rule(Text(f"sample {sample.id}"), align="left"))
            for image in sample.images or ("no image",):
                console.print(str(image), style="dim", markup=False, highlight=False)
            _show_tokens(row, batch, dataset.tokenizer, console)
        if figure and number == 0:
            plot_batch(batch, figure)
        _add_row(table, number, batch, num_images, micro_batch_tokens)
        boundaries.append(f"{number}: {' '.join(map(str, batch.cu_seqlens.tolist()))}")
    console.print(table)
    console.print("cu_seqlens", *boundaries, sep="\n", highlight=False)


def _show_tokens(row: int, batch: PackedBatch, tokenizer: Tokenizer, console: Console) -> None:
    begin, end = batch.cu_seqlens[row : row + 2].tolist()
    input_ids = batch.input_ids[begin:end]
    supervised = torch.zeros_like(input_ids, dtype=torch.bool)
    supervised[1:] = batch.target_ids[begin : end - 1] != IGNORE_INDEX  # targets are shifted
    text = Text()
    for piece, kind in pieces(input_ids.tolist(), supervised.tolist(), tokenizer):
        if kind == "supervised" and not _has_colour(console):
            piece = f"[[{piece}]]"
        text.append(piece, style=_STYLES[kind])
    console.print(text, highlight=False)
    share = f"{int(supervised.sum())} of {end - begin} tokens supervised"
    console.print(share, style="dim", highlight=False)


def pieces(
    input_ids: list[int], supervised: list[bool], tokenizer: Tokenizer
) -> Iterator[tuple[str, str]]:
    """(text, kind) of every run of one kind: supervised, image, special or text.

    A supervised end-of-sequence token belongs to the supervised run before it.
    """
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    special |= {tokenizer.im_start_id, tokenizer.im_end_id}

    def kind(item: tuple[int, bool]) -> str:
        token_id, is_supervised = item
        if is_supervised:
            return "supervised"
        if token_id == tokenizer.image_token_id:
            return "image"
        return "special" if token_id in special else "text"

    stretch = []  # ids since the last special token: decoding a blank depends on them
    for name, run in groupby(zip(input_ids, supervised, strict=True), key=kind):
        ids = [token_id for token_id, _ in run]
        if name == "image":
            yield f"<image x {len(ids)}>", name
            stretch = []
            continue
        text = ""
        for is_special, part in groupby(ids, key=special.__contains__):
            part = list(part)
            if is_special:
                text += "".join(tokenizer.token(token_id) for token_id in part)
                stretch = []
            else:
                text += tokenizer.decode(stretch + part)[len(tokenizer.decode(stretch)) :]
                stretch += part
        yield text, name


def _has_colour(console: Console) -> bool:
    return console.is_terminal and not console.no_color


def _packing_table(micro_batch_tokens: int) -> Table:
    table = Table(title=f"packing map, at most {micro_batch_tokens} tokens per micro-batch")
    for column in ("", "samples", "images", "tokens", "full", "supervised", "share", "padded"):
        table.add_column(column, justify="right")
    table.caption = "padded: tokens of the same batch padded to its longest sample"
    return table


def _add_row(
    table: Table, number: int, batch: PackedBatch, num_images: int, micro_batch_tokens: int
) -> None:
    num_tokens, num_samples = len(batch.input_ids), len(batch.cu_seqlens) - 1
    table.add_row(
        str(number),
        str(num_samples),
        str(num_images),
        str(num_tokens),
        f"{num_tokens / micro_batch_tokens:.0%}",
        str(batch.num_loss_tokens),
        f"{batch.num_loss_tokens / num_tokens:.0%}",
        str(num_samples * batch.max_seqlen),
    )
