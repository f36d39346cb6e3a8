"""From a configuration to the parts of a run: paths, dataset, loader and model."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmalign.config import TrainConfig
from mmalign.data.check import COUNTS, CheckReport, check_samples
from mmalign.data.dataset import ConversationDataset
from mmalign.data.loader import StepLoader
from mmalign.data.mix import has_tables, open_samples
from mmalign.data.samples import Sample, Samples
from mmalign.data.templates import trains_image_tokens
from mmalign.data.workers import choose_workers
from mmalign.distributed import DistributedContext
from mmalign.errors import UserError
from mmalign.files import write_text
from mmalign.flops import Workload, required_flops
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.hf import (
    is_llava,
    load_decoder,
    load_image_newline,
    load_projector,
    load_vision_tower,
)
from mmalign.model.llava import Llava
from mmalign.model.projector import ProjectorShape, make_projector
from mmalign.system import DTYPES
from mmalign.tokenizer import Tokenizer
from mmalign.toy_world import toy_world

log = logging.getLogger("mmalign")
TOY_WORLD = "toy-world"  # as a path: the built-in toy world's; toy-world/NAME: its file NAME
MIN_PREFIX_TOKENS = 8  # below this, joining the prefix costs more than it saves


def resolve(config: TrainConfig) -> TrainConfig:
    """Fills in what a recipe leaves open; raises UserError for paths that the user must give."""
    model, data, evaluation = config.model, config.data, config.evaluation
    if config.stage == "pretrain" and config.lora.rank:
        raise UserError(
            f"--lora.rank is {config.lora.rank}, but stage pretrain trains the projector alone and "
            "has nothing to adapt. Leave it out, or use a finetune recipe"
        )
    if data.text_only:
        if config.stage == "pretrain":
            raise UserError(
                "stage pretrain trains the projector, but --data.text-only removes every image. "
                "Use --data.text-only False, or a finetune recipe"
            )
        model = replace(model, vision_tower="", projector="")
        data = replace(data, image_root="")
    paths = (model.decoder, model.vision_tower, data.path, evaluation.data_root, *data.image_roots)
    if any(path.split("/")[0] == TOY_WORLD for path in paths):
        world = toy_world()
        toy_json = world.pretrain_json if config.stage == "pretrain" else world.finetune_json
        model = replace(
            model,
            decoder=_fill(model.decoder, world.decoder),
            vision_tower=_fill(model.vision_tower, world.vision_tower),
        )
        data = replace(
            data,
            path=_fill(data.path, toy_json),
            image_root=_fill_all(data.image_roots, world.image_root),
        )
        data_root = _fill(evaluation.data_root, world.evaluation)
        evaluation = replace(evaluation, data_root=data_root)
    required = {"--model.decoder": model.decoder, "--data.path": data.path}
    if not data.text_only:
        required["--model.vision-tower"] = model.vision_tower
        if not has_tables(Path(data.path)):
            required["--data.image-root"] = " ".join(data.image_roots)
    missing = [flag for flag, value in required.items() if not value]
    if missing:
        raise UserError(
            f"this recipe needs {', '.join(missing)}. The README says where to get them."
        )
    for flag in ("--model.decoder", "--model.vision-tower"):
        folder = required.get(flag)
        if folder and not Path(folder).is_dir():
            raise UserError(
                f"{flag} {folder} is not a folder. Give that of a Hugging Face checkpoint; a model "
                "of the hub is downloaded with hf download NAME --local-dir FOLDER"
            )
    model = replace(model, decoder=_exported(model.decoder))
    model = replace(model, tokenizer=model.tokenizer or model.decoder)
    return replace(config, model=model, data=data, evaluation=evaluation)


def _fill(value: str, toy_path: Path) -> str:
    first, _, name = value.partition("/")
    if first != TOY_WORLD:
        return value
    return str(toy_path.parent / name if name else toy_path)


def _fill_all(values: tuple[str, ...], toy_path: Path) -> str | tuple[str, ...]:
    filled = tuple(_fill(value, toy_path) for value in values)
    return filled[0] if len(filled) == 1 else filled


def _exported(decoder: str) -> str:
    """The exported model of a run's folder; other folders as they are."""
    exports = (Path(decoder) / "export" / name for name in ("llava", "llama"))
    return next((str(path) for path in exports if path.is_dir()), decoder)


# ---- data ----


def build_dataset(config: TrainConfig, tokenizer: Tokenizer) -> ConversationDataset:
    check_vocabulary(config, tokenizer)
    samples, text_only = open_samples(config.data.path, config.data), config.data.text_only
    vision = None if text_only else VisionConfig.from_hf(config.model.vision_tower)
    return ConversationDataset(samples, tokenizer, config.data, vision)


def check_data(
    config: TrainConfig, dataset: ConversationDataset, ranks: DistributedContext
) -> CheckReport:
    """Of what an epoch consists of.

    The main process checks, and lists skipped samples; the others read what it remembered.
    """
    with ranks.main_first():
        cache = config.run_dir / "data_check.npz"
        report = check_samples(dataset, cache, progress=ranks.is_main)
        if report.skipped and ranks.is_main:
            path = config.run_dir / "skipped_samples.txt"
            log.warning("%d samples skipped (listed in %s)", len(report.skipped), path)
            write_text(path, "".join(f"{error}\n" for error in report.skipped))
        if ranks.is_main:
            _list_truncated(dataset, report, config.run_dir / "truncated_samples.txt")
    decoder = DecoderConfig.from_hf(config.model.decoder)
    _refuse_long_samples(report, decoder)
    if ranks.is_main:
        _warn_of_context(dataset, report, decoder)
    return _of_epoch(report, dataset.samples)


def _of_epoch(report: CheckReport, samples: Sequence[Sample]) -> CheckReport:
    """A mix has samples several times, or not at all."""
    if not isinstance(samples, Samples):
        return report
    rows = samples.epoch(report.kept)
    return replace(report, **{name: getattr(report, name)[rows] for name in ("kept", *COUNTS)})


def _list_truncated(dataset: ConversationDataset, report: CheckReport, path: Path) -> None:
    cut = np.flatnonzero(report.num_cut)
    if len(cut):
        log.warning(
            "%d samples truncated to --data.max-length %d tokens (listed in %s)",
            *(len(cut), dataset.data.max_length, path),
        )
        ids = (dataset.samples[int(report.kept[i])].id for i in cut)
        rows = zip(ids, report.num_cut[cut].tolist(), strict=True)
        write_text(
            path, "".join(f"{name!r}: {number:,} tokens left out\n" for name, number in rows)
        )


def _warn_of_context(
    dataset: ConversationDataset, report: CheckReport, decoder: DecoderConfig
) -> None:
    limit = decoder.max_position_embeddings
    num_long, longest = int((report.lengths > limit).sum()), int(report.lengths.argmax())
    if num_long:
        log.warning(
            "%d of %d samples exceed the decoder's context (max_position_embeddings %d): sample %r "
            "has %d tokens. Lower --data.max-length, unless the decoder is to learn longer texts",
            *(num_long, len(report.kept), limit, dataset.samples[int(report.kept[longest])].id),
            report.lengths[longest],
        )


def _refuse_long_samples(report: CheckReport, decoder: DecoderConfig) -> None:
    limit, longest = decoder.length_limit, int(report.lengths.max())
    if limit is not None and longest > limit:
        raise UserError(
            f"the longest sample has {longest} tokens, but this decoder computes at most {limit}: "
            "its config.json has a sliding window or dynamic RoPE. Give --data.max-length "
            f"{limit}, or another decoder"
        )


def shared_prefix(config: TrainConfig, report: CheckReport) -> list[int]:
    """Token ids of the header whose keys and values are computed once per run; often empty."""
    wanted = config.shortcuts.frozen_prefix and config.stage == "pretrain"
    if not wanted or len(report.prefix) < MIN_PREFIX_TOKENS:
        return []
    return report.prefix.tolist()


def build_loader(
    config: TrainConfig,
    dataset: ConversationDataset,
    report: CheckReport,
    ranks: DistributedContext,
    num_steps: int,
    first_step: int,
    prefix_length: int,
) -> StepLoader:
    """Raises UserError for what does not fit; prefix_length: as in PackedBatch."""
    pictures = bool(report.num_images.any())
    num_workers, why = choose_workers(config.data.num_workers, pictures, ranks)
    if ranks.is_main:
        log.info("worker processes that load data: %d (%s)", num_workers, why)
    return StepLoader(
        dataset,
        report,
        global_batch_size=config.global_batch_size,
        micro_batch_tokens=config.micro_batching.tokens,
        seed=config.seed,
        num_steps=num_steps,
        start_step=first_step,
        num_workers=num_workers,
        rank=ranks.rank,
        world_size=ranks.world_size,
        require_images=config.stage == "pretrain",
        prefix_length=prefix_length,
        cost=sample_cost(config, prefix_length),
    )


def sample_cost(config: TrainConfig, prefix_length: int) -> Callable[[int, int, int], int]:
    """(tokens, targets, tiles) of a sample -> FLOPs of training on it with the shortcuts.

    From configurations alone. prefix_length: as in PackedBatch; it counts among the tokens.
    """
    workload = Workload.from_config(config)

    def cost(num_tokens: int, num_loss_tokens: int, num_tiles: int) -> int:
        sample = [num_tokens], num_loss_tokens, num_tiles
        return required_flops(workload, config.shortcuts, *sample, prefix_length).total

    return cost


# ---- model ----


def build_model(config: TrainConfig, tokenizer: Tokenizer, prefix_ids: list[int]) -> Llava:
    """The model with its pre-trained weights; what the stage trains requires gradients.

    prefix_ids: of tokens before every sample that have no rows (PackedBatch.prefix_length).
    """
    dtype, extra = DTYPES[config.precision], (config.shortcuts, prefix_ids)
    if config.data.text_only:
        decoder = load_decoder(config.model.decoder, dtype)
        model = Llava(decoder, None, None, tokenizer, *extra)
    else:
        decoder = load_decoder(
            config.model.decoder, dtype, num_added_tokens=check_vocabulary(config, tokenizer)
        )
        tower = load_vision_tower(config.model.vision_tower, dtype)
        if config.data.image_aspect_ratio == "pad":
            tower.config = tower.config.padding()  # which the export says
        sizes = tower.config.hidden_size, decoder.config.hidden_size
        projector = make_projector(ProjectorShape(*sizes, config.model.projector_type)).to(dtype)
        model = Llava(decoder, tower, projector, tokenizer, *extra)
        if tower.config.grids:
            folders = config.model.decoder, config.model.vision_tower
            model.image_newline = load_image_newline(folders, decoder)
        if config.model.projector:
            model.load_projector(load_projector(config.model.projector))
        elif not _take_own_projector(model, config) and config.stage == "finetune":
            log.warning("no --model.projector: stage 2 starts with an untrained projector")
    model.set_trainable(config.stage, config.lora, trains_image_tokens(config))
    _, policy, num_layers = config.micro_batching
    model.decoder.set_recompute(policy, num_layers)
    return model


def _take_own_projector(model: Llava, config: TrainConfig) -> bool:
    """Whether the decoder's folder is a whole LLaVA whose projector the model could take."""
    folder = config.model.decoder
    if not is_llava(folder):
        return False
    try:
        model.load_projector(load_projector(folder))
    except UserError as error:
        log.warning("the projector of %s is left out: %s", folder, error)
        return False
    log.info("the projector is that of %s", folder)
    return True


def check_vocabulary(config: TrainConfig, tokenizer: Tokenizer) -> int:
    """Rows of image tokens that the decoder's vocabulary lacks; our exports have them already.

    A padding token without a row gets one, too: LLaVA resizes the model to len(tokenizer).
    Raises UserError for a tokenizer with other tokens that have no row, or that no export can hold.
    """
    vocab_size, missing = DecoderConfig.from_hf(config.model.decoder).vocab_size, 0
    if not config.data.text_only:
        added = tokenizer.num_image_tokens_added(config.data.use_im_start_end)
        missing = max(0, tokenizer.vocab_size + added - vocab_size)
    tokenizer.check_rows(vocab_size, config.model.decoder, missing)
    return missing
