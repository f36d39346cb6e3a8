"""The toy world: pictures, texts, a language model and a vision tower, made at first use.

On it both stages and the evaluation run in minutes on a CPU. Everything is drawn from seeds: the
same versions of the libraries on the same kind of processor make the same bytes.

    images/*.jpg         scenes of coloured shapes (toy_scenes); scenes.json describes them
    pretrain.json        stage 1: a caption each
    finetune.json        stage 2: conversation, detail and reasoning about them (toy_texts)
    heldout.json         questions on pictures with kinds of things that no training picture shows
    decoder/             a language model that read the corpus (toy_corpus), with its tokenizer
    vision_tower/        a vision tower that saw other scenes of this world with captions
    evaluation/          examination files in the forms of TruthfulQA-mc and ETHICS

What the parts share: the base model read the beliefs and the sort of exercises that the examination
asks for (65 of 100 beliefs in their false form), not its ETHICS-like cases. Of the examination's
40 beliefs the instructions touch six, those about the shapes' colours, in other words: by pictures
that show otherwise. No question, choice or case of the examination occurs in the instructions.
"""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mmalign.data.templates import TEMPLATES, SpecialIds, Turn
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.hf.export import export_llama, export_vision_tower
from mmalign.toy_world.corpus import corpus_pages, write_evaluation
from mmalign.toy_world.models import train_decoder, train_tokenizer, train_vision_tower
from mmalign.toy_world.scenes import make_scenes, save_jpeg
from mmalign.toy_world.texts import finetune_records, heldout_records, pretrain_records

VERSION = "toy_world-v1"
SEED = 0
NUM_THREADS = 2  # sums are split over threads, so their number is part of what is made


@dataclass(frozen=True)
class Size:
    """How much of everything; the default is the world that the recipes use."""

    scenes: int = 3000
    heldout_scenes: int = 200
    tower_scenes: int = 6000
    tower_steps: int = 450
    pages: int = 2800
    decoder_steps: int = 700
    documents: int = 300  # in each ETHICS-like file


@dataclass(frozen=True)
class ToyWorld:
    root: Path

    @property
    def image_root(self) -> Path:
        return self.root / "images"

    @property
    def pretrain_json(self) -> Path:
        return self.root / "pretrain.json"

    @property
    def finetune_json(self) -> Path:
        return self.root / "finetune.json"

    @property
    def heldout_json(self) -> Path:
        return self.root / "heldout.json"

    @property
    def decoder(self) -> Path:
        return self.root / "decoder"

    @property
    def vision_tower(self) -> Path:
        return self.root / "vision_tower"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"


def toy_world(root: Path | None = None, size: Size | None = None) -> ToyWorld:
    """The world in root/toy_world-v1, made there if it is not there yet (about a minute).

    root: by default $MMALIGN_CACHE or ~/.cache/mmalign. The folder is complete or absent, also when
    two processes make it at once.
    """
    cache = os.environ.get("MMALIGN_CACHE") or Path.home() / ".cache" / "mmalign"
    folder = Path(root or cache) / VERSION
    if folder.is_dir():
        return ToyWorld(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"making the toy world in {folder} (once, about a minute)", flush=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{VERSION}-", dir=folder.parent))
    try:
        _make(ToyWorld(partial), size or Size())
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster; its world is the same
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ToyWorld(folder)


def _make(world: ToyWorld, size: Size) -> None:
    scenes = make_scenes("train", size.scenes, SEED)
    heldout = make_scenes("heldout", size.heldout_scenes, SEED, held_out=True)
    world.image_root.mkdir()
    for scene in tqdm(scenes + heldout, desc="toy world: pictures", leave=False):
        save_jpeg(scene, world.image_root)
    instructions = finetune_records(scenes, SEED)
    _write_json(world.root / "scenes.json", [asdict(scene) for scene in scenes + heldout])
    _write_json(world.pretrain_json, pretrain_records(scenes, SEED))
    _write_json(world.finetune_json, instructions)
    _write_json(world.heldout_json, heldout_records(heldout, SEED))
    write_evaluation(world.evaluation, SEED, size.documents)
    threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    try:
        _make_decoder(world, size, instructions)
        _make_vision_tower(world, size)
    finally:
        torch.set_num_threads(threads)


def _make_decoder(world: ToyWorld, size: Size, instructions: list[dict]) -> None:
    pages = corpus_pages(size.pages, passages=12, seed=SEED)
    texts = [line for page in pages[:600] for line in page.split("\n")]
    texts += [turn["value"] for record in instructions[:600] for turn in record["conversations"]]
    texts += 400 * _prompt_words()
    path = world.root / "tokenizer.model"
    tokenizer = train_tokenizer(texts, vocab_size=900, path=path)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
    )
    decoder = train_decoder(pages, tokenizer, config, size.decoder_steps, SEED)
    export_llama(decoder, world.decoder, tokenizer)
    path.unlink()


def _prompt_words() -> list[str]:
    """What template v1 writes around questions and answers, so that it is not spelt in letters."""
    turns = [Turn("human", "?"), Turn("gpt", ".")]
    special = SpecialIds(bos=1, eos=2, im_start=3, im_end=4, use_im_start_end=False)
    return [text for text, _ in TEMPLATES["v1"](turns, special) if isinstance(text, str)]


def _make_vision_tower(world: ToyWorld, size: Size) -> None:
    config = VisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=72,
        patch_size=24,
    )
    scenes = make_scenes("seen", size.tower_scenes, SEED, rare=True)
    tower = train_vision_tower(scenes, config, size.tower_steps, SEED)
    export_vision_tower(tower, world.vision_tower)


def _write_json(path: Path, records: list[dict]) -> None:
    path.write_text(json.dumps(records, indent=1) + "\n")
