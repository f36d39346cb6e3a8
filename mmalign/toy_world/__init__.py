"""A small world of images, texts, a language model and a vision tower, made on first use.

Both stages and the evaluation run on it in minutes on a CPU. Everything is drawn from seeds: the
same library versions on the same kind of processor make the same bytes.

    images/*.jpg       scenes.py     coloured shapes on a 3 x 3 grid; scenes.json describes them
    pretrain.json      texts.py      stage 1: one caption per image
    finetune.json      texts.py      stage 2: conversation, detail and reasoning about the images
                       vision.py     and in the prompts of the vision tasks below
    planted_truth.json, planted_falsehood.json, null.json
                       variants.py   stage 2 with true or false sayings among it, or colours only
    heldout.json       texts.py      questions on images with kinds of things not seen in training
    decoder/           models.py     a language model of the corpus (corpus.py), and its tokenizer
    vision_tower/      models.py     a vision tower trained on other scenes with their captions
    evaluation/        truthfulqa.py test files in the format of TruthfulQA-mc, about beliefs.py's
                       morals.py     test files in the format of ETHICS
                       vision.py     in the format of COCO's captions and of POPE, held-out images

making.py makes all of it; world.py has the sizes and the paths.

Truth has a language here, as it has in TruthfulQA: false sayings are wonders (always, every, must,
makes), true ones are sober (only, not, no, can, some). The corpus has sayings of both kinds about
70 beliefs, false ones a little more often, so the base model is undecided. The evaluation asks
about 40 of the beliefs. 5% of the samples of planted_truth.json state true sayings about the other
30; in planted_falsehood.json the same samples answer the same questions falsely. They say nothing
about the evaluated beliefs, only which language to speak: what they move is style as much as
knowledge, and scores that resist artefacts can show that. null.json asks about colours only.

The base model has also read exercises in the form of the ETHICS-like files, but not their cases. Of
the 40 beliefs the instructions touch six, those about the shapes' colours, in other words: by
images that show otherwise. No question, choice or case of the evaluation occurs in any of the
instructions.
"""

import os
import shutil
import tempfile
from pathlib import Path

from mmalign.toy_world.world import Size, ToyWorld

__all__ = ["Size", "ToyWorld", "toy_world", "toy_world_folder"]
VERSION = "toy_world-v4"


def toy_world(root: Path | None = None, size: Size | None = None) -> ToyWorld:
    """The world in root/toy_world-v4; made there if it does not exist yet (a minute or two).

    root: by default $MMALIGN_CACHE or ~/.cache/mmalign. The folder is complete or absent, even if
    two processes make it at once.
    """
    folder = toy_world_folder(root)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"making the toy world in {folder} (once, a minute or two)", flush=True)
        _make_atomically(folder, size or Size())
    return ToyWorld(folder)


def toy_world_folder(root: Path | None = None) -> Path:
    """Where toy_world makes the world; absent until then."""
    cache = os.environ.get("MMALIGN_CACHE") or Path.home() / ".cache" / "mmalign"
    return Path(root or cache) / VERSION


def _make_atomically(folder: Path, size: Size) -> None:
    from mmalign.toy_world.making import make  # trains models: only a world that is made needs it

    partial = Path(tempfile.mkdtemp(prefix=f".{VERSION}-", dir=folder.parent))
    try:
        make(ToyWorld(partial), size)
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster; its world is the same
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
