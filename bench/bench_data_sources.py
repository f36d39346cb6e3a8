"""Data as they lie there: pictures a second from archives, and the check of 600,000 samples.

pytest bench/bench_data_sources.py   rates of one core: zip and tar against loose files, and peers
python -m bench.bench_data_sources whole DIR [--samples 600000]
    makes samples.jsonl and images.zip in DIR (about 4 GB), and measures what a researcher does with
    them: the data check with --data.check-images sample, the preview, 50 training steps; prints
    seconds and memory of each. Needs 2 cores, and no network.

The pictures of the large zip are a few thousand different JPEG files under a name for every sample;
it is the number of files that costs.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from bench.bench_data_loading import SAMPLES, one_thread
from bench.comparison import Calls, Comparison, WrongResult, each
from bench.samples import JPEG_SIZE, JpegFiles, draw_image, write_jpeg_files
from bench.shapes import CLIP_VIT_L_14
from mmalign.data.images import load_image
from mmalign.data.pictures import Pictures
from mmalign.toy_world.corpus import corpus_pages

NUM_DIFFERENT, SMALL, QUALITY = 3000, (96, 72), 75  # of the large zip's pictures
LOOSE, ZIP, TAR = "mmalign loose files", "mmalign zip", "mmalign tar"
SEQUENTIAL = "tar read in sequence, as webdataset does, PIL"
TORCH = "torch DataLoader, PIL, loose files"


@dataclass
class Sources(Comparison):
    """Decode, resize and crop the same pictures; ours and torch's in random order."""

    folder: tempfile.TemporaryDirectory = field(init=False, repr=False)  # from `calls` on
    files: JpegFiles = field(init=False, repr=False)

    benchmark, direction, rounds = "data_sources", "load", 5
    variants = (LOOSE, ZIP, TAR, SEQUENTIAL, TORCH)
    case = "{} JPEG files of {}x{}".format(SAMPLES, *JPEG_SIZE)

    def calls(self, variants: Sequence[str]) -> Calls:
        self.folder = tempfile.TemporaryDirectory(prefix="mmalign-sources-")
        root = Path(self.folder.name)
        self.files = write_jpeg_files(root, "pretrain", SAMPLES)
        paths = self.files.paths
        with (
            zipfile.ZipFile(root / "all.zip", "w") as archive,
            tarfile.open(root / "all.tar", "w") as tar,
        ):
            for path in paths:
                archive.write(path, path.name)
                tar.add(path, path.name)
        names = [path.name for path in paths]
        random.Random(0).shuffle(names)
        places = {LOOSE: root, ZIP: root / "all.zip", TAR: root / "all.tar"}
        found = {name: Pictures([str(x)], follow_links=False) for name, x in places.items()}
        compare_sources(found, names)
        calls = {name: _loading(found[name], names) for name in places}
        calls[SEQUENTIAL] = lambda: in_sequence(root / "all.tar")
        calls[TORCH] = lambda: list(DataLoader(_Loose([root / x for x in names]), batch_size=None))
        return Calls({name: one_thread(calls[name]) for name in variants})

    def figures(self, variant: str, seconds: float) -> dict:
        return {"samples_per_second": SAMPLES / seconds, "jpeg_bytes": self.files.mean_bytes}


def _loading(pictures: Pictures, names: list[str]) -> Callable[[], object]:
    preprocessing = CLIP_VIT_L_14.preprocessing
    return lambda: [load_image(pictures.find(name, name), preprocessing) for name in names]


def compare_sources(found: dict[str, Pictures], names: list[str]) -> None:
    """Raises WrongResult where the places do not give the same pixels."""
    preprocessing = CLIP_VIT_L_14.preprocessing
    for name in names[:4]:
        expected = load_image(found[LOOSE].find(name, name), preprocessing)
        for variant, pictures in found.items():
            if not torch.equal(load_image(pictures.find(name, name), preprocessing), expected):
                raise WrongResult(variant, f"the pixels of {name} differ from those of the file")


def in_sequence(path: Path) -> None:
    """webdataset's way: members one after the other, from a stream that cannot seek."""
    with tarfile.open(path, "r|") as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            resize(Image.open(io.BytesIO(file.read())))


def resize(image: Image.Image) -> torch.Tensor:
    """As CLIPImageProcessor, in PIL: (3, image_size, image_size) uint8."""
    image, size = image.convert("RGB"), CLIP_VIT_L_14.image_size
    scale = size / min(image.size)
    width, height = (int(x * scale) for x in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    cropped = resized.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).contiguous()


class _Loose(Dataset):
    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return resize(Image.open(self.paths[index]))


test_data_sources = each([Sources()])


# ---- 600,000 samples ----


def make(folder: Path, num_samples: int) -> None:
    """samples.jsonl and images.zip; nothing where they are there already."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng, words = random.Random(0), " ".join(corpus_pages(40, passages=12, seed=0)).split()
    pictures = []
    for index in range(NUM_DIFFERENT):
        file = io.BytesIO()
        draw_image(*SMALL, index).save(file, "JPEG", quality=QUALITY)
        pictures.append(file.getvalue())
    with (
        zipfile.ZipFile(folder / "images.zip", "w", allowZip64=True) as archive,
        open(folder / "samples.jsonl", "w") as lines,
    ):
        for index in range(num_samples):
            name = f"{index // 1000:05}/{index:09}.jpg"
            archive.writestr(f"images/{name}", pictures[index % NUM_DIFFERENT])
            begin = rng.randrange(len(words) - 60)
            answer = " ".join(words[begin : begin + rng.randrange(8, 50)])
            turns = [("human", "<image>\nWhat is in this picture?"), ("gpt", answer)]
            conversations = [{"from": who, "value": text} for who, text in turns]
            sample = {"id": f"{index:09}", "image": name, "conversations": conversations}
            lines.write(json.dumps(sample) + "\n")
    (folder / "done").touch()


def measured(name: str, command: list[str], log: Path) -> None:
    """Prints the seconds of a command and the most memory of it and its workers together."""
    started, most = time.perf_counter(), 0
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            most = max(most, _memory_of(process.pid))
            time.sleep(0.2)
    seconds = time.perf_counter() - started
    lines = log.read_text().splitlines()
    print(f"{name}: {seconds:.1f} s, {most / 1e9:.2f} GB, all of its output in {log}", flush=True)
    if process.returncode:
        sys.exit("\n".join([f"{name} ended with {process.returncode}:", *lines[-10:]]))
    print(*[line for line in lines if "data wait" in line][-1:], flush=True)


def _memory_of(pid: int) -> int:
    """Bytes of the process and its children: their share of the pages that they share (PSS)."""
    total = 0
    for child in _family(pid):
        try:
            text = Path(f"/proc/{child}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line[:4] == "Pss:")
    return total * 1024


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(x for child in children for x in _family(int(child)))]


def whole(folder: Path, num_samples: int) -> None:
    started = time.perf_counter()
    make(folder, num_samples)
    size = (folder / "images.zip").stat().st_size
    made = time.perf_counter() - started
    print(f"{num_samples:,} samples, images.zip {size / 1e9:.2f} GB, made in {made:.0f} s")
    from mmalign.toy_world import toy_world

    world = toy_world()
    data = ["--data.path", str(folder / "samples.jsonl")]
    data += ["--data.image-root", str(folder / "images.zip"), "--data.check-images", "sample"]
    looks = [*data, "--data.template", "plain", "--model.tokenizer", str(world.decoder)]
    python = [sys.executable]
    measured("check", [*python, "scripts/check_data.py", *looks], folder / "check.log")
    measured("preview", [*python, "scripts/preview_batch.py", *looks], folder / "preview.log")
    run = ["--run-dir", str(folder / f"run-{os.getpid()}"), "--num-steps", "50"]
    train = ["scripts/train.py", "tiny-pretrain", *data, *run, "--data.num-workers", "2"]
    measured("50 steps", [*python, *train], folder / "train.log")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["whole"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=600_000)
    arguments = parser.parse_args()
    whole(arguments.folder, arguments.samples)
