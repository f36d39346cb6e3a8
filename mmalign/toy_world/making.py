"""Makes all files of a toy world from seeds."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from mmalign.command import progress_bar
from mmalign.data.samples import Turn
from mmalign.data.segments import SpecialIds
from mmalign.data.templates import TEMPLATES
from mmalign.files import write_text
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.hf.export import export_llama, export_vision_tower
from mmalign.toy_world.corpus import corpus_pages, write_evaluation
from mmalign.toy_world.models import train_decoder, train_tokenizer, train_vision_tower
from mmalign.toy_world.scenes import make_scenes, save_jpeg
from mmalign.toy_world.texts import finetune_records, heldout_records, pretrain_records
from mmalign.toy_world.variants import variants
from mmalign.toy_world.vision import vision_records, write_vision_evaluation
from mmalign.toy_world.world import Size, ToyWorld

SEED = 0


def make(world: ToyWorld, size: Size) -> None:
    """Writes every file under world.root, an empty folder."""
    scenes = make_scenes("train", size.scenes, SEED)
    heldout = make_scenes("heldout", size.heldout_scenes, SEED, held_out=True)
    world.image_root.mkdir()
    for scene in progress_bar(scenes + heldout, desc="toy world: images", leave=False):
        save_jpeg(scene, world.image_root)
    instructions = finetune_records(scenes, SEED)
    tuned_on = instructions + vision_records(scenes, SEED)
    _write_json(world.root / "scenes.json", [asdict(scene) for scene in scenes + heldout])
    _write_json(world.pretrain_json, pretrain_records(scenes, SEED))
    _write_json(world.finetune_json, tuned_on)
    for name, records in variants(tuned_on, scenes, SEED).items():
        _write_json(world.root / f"{name}.json", records)
    _write_json(world.heldout_json, heldout_records(heldout, SEED))
    write_evaluation(world.evaluation, SEED, size.documents)
    write_vision_evaluation(world.evaluation, heldout[::2], SEED)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # floating-point sums depend on it
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
    """The fixed text of template v1, repeated so that the BPE learns its words."""
    turns = [Turn("human", "?"), Turn("gpt", ".")]
    special = SpecialIds(bos=1, eos=2, im_start=3, im_end=4, use_im_start_end=False)
    return [text for text, _ in TEMPLATES["v1"].render(turns, special) if isinstance(text, str)]


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
    write_text(path, json.dumps(records, indent=1) + "\n")
