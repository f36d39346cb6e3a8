import torch

from mmalign.batch import IGNORE_INDEX, PackedBatch
from mmalign.data.figure import KINDS, plot_batch, token_kinds


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
