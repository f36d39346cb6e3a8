"""A packed batch as a picture: what each row of tokens holds, and which sample it belongs to."""

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mmalign.batch import IGNORE_INDEX, PackedBatch

KINDS = {"prompt": "#d5d8dc", "image patch": "#5b9bd5", "supervised": "#58a55c"}


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
    figure.savefig(path, dpi=150)
