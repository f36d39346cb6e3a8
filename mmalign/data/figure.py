"""Figures of the data: a packed batch, lengths, and pictures as the model sees them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw

from mmalign.batch import IGNORE_INDEX, PackedBatch
from mmalign.data.dataset import ConversationDataset
from mmalign.data.lengths import bin_edges
from mmalign.errors import UserError
from mmalign.model.tiles import Tiles

KINDS = {"prompt": "#d5d8dc", "image patch": "#5b9bd5", "supervised": "#58a55c"}

_COLUMNS, _LABEL_HEIGHT = 6, 14  # of the contact sheet; pixels


def token_kinds(batch: PackedBatch) -> np.ndarray:
    """(total_tokens,) index into KINDS; a token is supervised if the one before predicts it."""
    kinds = np.zeros(len(batch.input_ids), np.int64)
    kinds[batch.image_positions.numpy()] = 1
    kinds[1:][batch.target_ids.numpy()[:-1] != IGNORE_INDEX] = 2
    return kinds


def plot_batch(batch: PackedBatch, path: Path) -> None:
    """Writes the picture: one cell per token, position_ids below, a line at every cu_seqlens."""
    figure = Figure(figsize=(10, 2.4), layout="constrained")
    cells, positions = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    total = len(batch.input_ids)
    cells.imshow(
        token_kinds(batch)[None],
        aspect="auto",
        cmap=ListedColormap(list(KINDS.values())),
        vmin=0,
        vmax=len(KINDS) - 1,
        extent=(0, total, 0, 1),
        interpolation="nearest",
    )
    cells.set_yticks([0.5], ["tokens"])
    positions.step(np.arange(total), batch.position_ids.numpy(), where="post", color="#555555")
    positions.set_ylabel("position_ids")
    positions.set_xlabel("cu_seqlens")
    bounds = batch.cu_seqlens.tolist()
    positions.set_xticks(bounds)
    for axes in (cells, positions):
        for bound in bounds[1:-1]:
            axes.axvline(bound, color="black", linewidth=1)
    cells.legend(
        handles=[Patch(color=color, label=kind) for kind, color in KINDS.items()],
        ncols=len(KINDS),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
    )
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:  # the ending is that of no format
        raise UserError(f"--figure {path}: {error}") from error


def plot_lengths(lengths: Mapping[str, np.ndarray], path: Path) -> None:
    """Histograms of tokens per sample over bins that double, one upon the other."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    edges = bin_edges(list(lengths.values()))
    for name, values in lengths.items():
        axes.hist(values, edges, histtype="stepfilled", alpha=0.5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(edges, [f"{edge:,}" for edge in edges], fontsize=8)
    axes.set_xlabel("tokens per sample")
    axes.set_ylabel("samples")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(lengths), frameon=False)
    figure.savefig(path, dpi=150)


def contact_sheet(dataset: ConversationDataset, indices: Sequence[int], path: Path) -> None:
    """Writes the first picture of each sample, resized and cropped for the model, under its id."""
    assert dataset.vision is not None
    side = dataset.vision.image_size
    height, num_rows = side + _LABEL_HEIGHT, -(-len(indices) // _COLUMNS)
    sheet = Image.new("RGB", (side * min(_COLUMNS, len(indices)), height * num_rows), "white")
    draw = ImageDraw.Draw(sheet)
    for number, index in enumerate(indices):
        left, top = number % _COLUMNS * side, number // _COLUMNS * height
        label = dataset.samples[index].id.encode("ascii", "replace").decode()  # Pillow's font
        while draw.textlength(label) > side:
            label = label[:-1]
        draw.text((left, top), label, fill="black")
        try:
            pixels = dataset.load_pixels(index)
        except UserError:  # --data.check-images False keeps samples whose pictures are broken
            draw.text((left, top + side // 2), "cannot be read", fill="red")
            continue
        assert pixels is not None
        shown = pixels.pixels if isinstance(pixels, Tiles) else pixels  # the whole comes first
        picture = Image.fromarray(shown[0].permute(1, 2, 0).numpy())
        sheet.paste(picture, (left, top + _LABEL_HEIGHT))
    sheet.save(path)
