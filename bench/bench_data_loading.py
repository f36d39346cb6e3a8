"""Loading: pictures per second and core, and whether the loader keeps up with training.

One process, one thread: a worker's share of the work. The rates that one GPU asks for are the
targets of the training step (76 samples/s in stage 1, 28 in stage 2, LLaMA2-7B).
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPImageProcessor

from bench.comparison import Calls, Figures, WrongResult, each_row
from bench.examination import tokenizer_model
from bench.picture_files import HEIGHT, WIDTH, PictureFiles, write_files
from bench.shapes import CLIP_VIT_L_14
from mmalign.data.check import check_samples
from mmalign.data.dataset import ConversationDataset
from mmalign.data.images import load_image
from mmalign.data.loader import StepLoader
from mmalign.data.packing import pack_samples

SAMPLES = 64
TARGETS = {"pretrain": 76, "finetune": 28}  # samples per second of one GPU
LEVELS = 1  # our pixels may differ from CLIPImageProcessor's by so many of 256
WORKERS = 2
EPOCHS = 5  # of the StepLoader in one call: starting the workers takes half a second

PICTURES, SAMPLES_PACKED, LOADER = (
    "mmalign pictures",
    "mmalign samples, packed",
    f"mmalign StepLoader, {WORKERS} workers, {EPOCHS} times all",
)
DECODE, PROCESSOR = "PIL decode alone", "transformers CLIPImageProcessor"


@dataclass
class Loading:
    """One stage's samples."""

    stage: str
    folder: tempfile.TemporaryDirectory | None = None
    files: PictureFiles | None = field(default=None)

    part, benchmark, direction = "train", "data_loading", "load"
    variants = (PICTURES, DECODE, PROCESSOR, SAMPLES_PACKED, LOADER)

    @property
    def case(self) -> str:
        return f"{self.stage}, {SAMPLES} samples with JPEG files of {WIDTH}x{HEIGHT}"

    def missing(self, variant: str, device: torch.device) -> str | None:
        return None

    def limits(self) -> Mapping[str, float | int]:
        return {"budget_seconds": 0, "min_rounds": 3, "max_rounds": 3, "warm_up_rounds": 1}

    def calls(self, variants: Sequence[str], device: torch.device) -> Calls:
        self.folder = tempfile.TemporaryDirectory(prefix="mmalign-pictures-")
        self.files = write_files(Path(self.folder.name), self.stage, SAMPLES)
        vision, paths = CLIP_VIT_L_14, self.files.paths
        processor = CLIPImageProcessor()
        compare_pixels(paths[0], processor)
        dataset = ConversationDataset.open(self.files.data, tokenizer_model(), vision)
        calls = {
            PICTURES: lambda: [load_image(path, vision.preprocessing) for path in paths],
            DECODE: lambda: [Image.open(path).convert("RGB") for path in paths],
            PROCESSOR: lambda: [
                processor(Image.open(path).convert("RGB"), return_tensors="pt") for path in paths
            ],
            SAMPLES_PACKED: lambda: packed(dataset),
            LOADER: self._loader(dataset),
        }
        return Calls({name: one_thread(calls[name]) for name in variants})

    def _loader(self, dataset: ConversationDataset) -> Callable[[], object]:
        dataset = ConversationDataset(
            dataset.samples,
            dataset.tokenizer,
            replace(dataset.data, num_workers=WORKERS),
            dataset.vision,
        )
        report = check_samples(dataset, Path(self.folder.name) / "check.npz", progress=False)
        loader = StepLoader(
            dataset,
            report,
            global_batch_size=16,
            micro_batch_tokens=16384,
            seed=0,
            num_steps=EPOCHS * SAMPLES // 16,
        )
        return lambda: list(loader)

    def figures(self, variant: str, seconds: float, ceilings: Mapping) -> Figures:
        rate = SAMPLES * (EPOCHS if variant == LOADER else 1) / seconds
        extra = {
            "samples_per_second": rate,
            "target_samples_per_second": TARGETS[self.stage],
            "jpeg_bytes": self.files.mean_bytes,
        }
        if variant == LOADER:  # with the start of its workers
            keeps_up = "yes" if rate >= TARGETS[self.stage] else "no"
            extra |= {"workers": WORKERS, "keeps_up": keeps_up}
        if variant == SAMPLES_PACKED:
            extra["cores_for_target"] = TARGETS[self.stage] / rate
        return Figures(extra=extra)


def compare_pixels(path: Path, processor: CLIPImageProcessor) -> None:
    """Raises WrongResult where our pixels are not CLIPImageProcessor's, to one level."""
    picture = Image.open(path).convert("RGB")
    theirs = processor(picture, do_rescale=False, do_normalize=False, return_tensors="pt")
    ours = load_image(path, CLIP_VIT_L_14.preprocessing).int()
    worst = (theirs.pixel_values[0].int() - ours).abs().max().item()
    if worst > LEVELS:
        raise WrongResult(PICTURES, f"pixels differ from CLIPImageProcessor's by {worst} levels")


def packed(dataset: ConversationDataset, batch_size: int = 16) -> None:
    """What a worker does: encode, decode, resize and pack."""
    for begin in range(0, len(dataset), batch_size):
        indices = range(begin, min(begin + batch_size, len(dataset)))
        encoded = [dataset.encode(i) for i in indices]
        pixels = [dataset.load_pixels(i) for i in indices]
        pack_samples(encoded, pixels, dataset.tokenizer.image_token_id)


def one_thread(call: Callable[[], object]) -> Callable[[], None]:
    """As in a worker process of torch's DataLoader."""

    def run() -> None:
        with _threads(1):
            call()

    return run


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@each_row([Loading("pretrain"), Loading("finetune")])
def test_data_loading(row, compare):
    compare(row)
