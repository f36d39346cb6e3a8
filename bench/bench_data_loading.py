"""Loading: images per second and core, and samples per second of the loader with its workers.

One process and one thread where it is not the loader: a worker's share of the work.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPImageProcessor

from bench.comparison import Calls, Comparison, WrongResult, each
from bench.documents import tokenizer_model
from bench.samples import JPEG_SIZE, JpegFiles, write_jpeg_files
from bench.shapes import CLIP_VIT_L_14
from mmalign.data.check import check_samples
from mmalign.data.dataset import ConversationDataset
from mmalign.data.images import load_image
from mmalign.data.loader import StepLoader
from mmalign.data.packing import pack_samples

SAMPLES, BATCH_SIZE = 64, 16
LEVELS = 1  # our pixels may differ from CLIPImageProcessor's by so many of 256
WORKERS = 2
EPOCHS = 5  # of the StepLoader in one call: starting the workers takes half a second

IMAGES, PACKED = "mmalign images", "mmalign samples, packed"
LOADER = f"mmalign StepLoader, {WORKERS} workers, {EPOCHS} epochs"
DECODE, PROCESSOR = "PIL decode alone", "transformers CLIPImageProcessor"


@dataclass
class Loading(Comparison):
    """One stage's samples."""

    stage: str
    folder: tempfile.TemporaryDirectory = field(init=False, repr=False)  # from `calls` on
    files: JpegFiles = field(init=False, repr=False)

    benchmark, direction, rounds = "data_loading", "load", 3
    variants = (IMAGES, DECODE, PROCESSOR, PACKED, LOADER)

    @property
    def case(self) -> str:
        width, height = JPEG_SIZE
        return f"{self.stage}, {SAMPLES} samples with JPEG files of {width}x{height}"

    def calls(self, variants: Sequence[str]) -> Calls:
        self.folder = tempfile.TemporaryDirectory(prefix="mmalign-images-")
        self.files = write_jpeg_files(Path(self.folder.name), self.stage, SAMPLES)
        preprocessing, paths = CLIP_VIT_L_14.preprocessing, self.files.paths
        processor = CLIPImageProcessor()
        compare_pixels(paths[0], processor)
        dataset = ConversationDataset.open(self.files.data, tokenizer_model(), CLIP_VIT_L_14)
        calls = {
            IMAGES: lambda: [load_image(path, preprocessing) for path in paths],
            DECODE: lambda: [Image.open(path).convert("RGB") for path in paths],
            PROCESSOR: lambda: [
                processor(Image.open(path).convert("RGB"), return_tensors="pt") for path in paths
            ],
            PACKED: lambda: pack_all(dataset),
            LOADER: self._loader(dataset),
        }
        return Calls({name: one_thread(calls[name]) for name in variants})

    def _loader(self, dataset: ConversationDataset) -> Callable[[], object]:
        report = check_samples(dataset, Path(self.folder.name) / "check.npz", progress=False)
        loader = StepLoader(
            dataset,
            report,
            global_batch_size=BATCH_SIZE,
            micro_batch_tokens=16384,
            seed=0,
            num_steps=EPOCHS * SAMPLES // BATCH_SIZE,
            num_workers=WORKERS,
        )
        return lambda: list(loader)

    def figures(self, variant: str, seconds: float) -> dict:
        rate = SAMPLES * (EPOCHS if variant == LOADER else 1) / seconds
        return {"samples_per_second": rate, "jpeg_bytes": self.files.mean_bytes}


def compare_pixels(path: Path, processor: CLIPImageProcessor) -> None:
    """Raises WrongResult where our pixels are not CLIPImageProcessor's, to one level."""
    image = Image.open(path).convert("RGB")
    theirs = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
    ours = load_image(path, CLIP_VIT_L_14.preprocessing).int()
    worst = (theirs.pixel_values[0].int() - ours).abs().max().item()
    if worst > LEVELS:
        raise WrongResult(IMAGES, f"pixels differ from CLIPImageProcessor's by {worst} levels")


def pack_all(dataset: ConversationDataset) -> None:
    """What a worker does: encode, decode, resize and pack."""
    for begin in range(0, len(dataset), BATCH_SIZE):
        indices = range(begin, min(begin + BATCH_SIZE, len(dataset)))
        encoded = [dataset.encode(i) for i in indices]
        pixels = [dataset.load_pixels(i) for i in indices]
        pack_samples(encoded, pixels, dataset.tokenizer.image_token_id)


def one_thread(call: Callable[[], object]) -> Callable[[], None]:
    """As in a worker process of torch's DataLoader."""

    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            call()
        finally:
            torch.set_num_threads(before)

    return run


test_data_loading = each([Loading("pretrain"), Loading("finetune")])
