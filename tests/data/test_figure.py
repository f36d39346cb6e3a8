import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.batch import IGNORE_INDEX, PackedBatch
from mmalign.data.figure import KINDS, contact_sheet, plot_batch, token_kinds
from mmalign.errors import UserError
from tests.data.conftest import IMAGE_SIZE


def batch() -> PackedBatch:
    """Two samples: question, two patches, answer, answer; and question, answer."""
    targets = [IGNORE_INDEX, IGNORE_INDEX, 8, 9, IGNORE_INDEX, 7, IGNORE_INDEX]
    return PackedBatch(
        input_ids=torch.tensor([5, 3, 3, 8, 9, 6, 7]),
        target_ids=torch.tensor(targets),
        position_ids=torch.tensor([0, 1, 2, 3, 4, 0, 1], dtype=torch.int32),
        cu_seqlens=torch.tensor([0, 5, 7], dtype=torch.int32),
        max_seqlen=5,
        num_loss_tokens=3,
        pixel_values=torch.zeros((1, 3, 2, 2), dtype=torch.uint8),
        image_positions=torch.tensor([1, 2]),
    )


def test_kinds_of_tokens():
    names = [list(KINDS)[kind] for kind in token_kinds(batch())]
    answers = ["supervised", "supervised"]
    assert names == ["prompt", "image patch", "image patch", *answers, "prompt", "supervised"]


def test_a_picture_is_written(tmp_path):
    plot_batch(batch(), tmp_path / "batch.png")
    assert (tmp_path / "batch.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"--figure .*batch.xyz: Format 'xyz' is not supported"):
        plot_batch(batch(), tmp_path / "batch.xyz")


def test_contact_sheet_shows_what_the_model_sees(world, tmp_path):
    dataset = world.dataset()
    shown = [i for i, sample in enumerate(world.samples) if "image" in sample][:8]
    contact_sheet(dataset, shown, tmp_path / "sheet.png")
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (IMAGE_SIZE + 14), 6 * IMAGE_SIZE, 3)
    for number, index in enumerate(shown):
        top, left = number // 6 * (IMAGE_SIZE + 14) + 14, number % 6 * IMAGE_SIZE
        cell = sheet[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        np.testing.assert_array_equal(cell, dataset.load_pixels(index)[0].permute(1, 2, 0))


def test_contact_sheet_leaves_out_what_cannot_be_read(world, tmp_path):
    (world.root / "images" / "1.png").write_bytes(b"no picture")
    contact_sheet(world.dataset(check_images=False), [1, 2], tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (2 * IMAGE_SIZE, IMAGE_SIZE + 14)
