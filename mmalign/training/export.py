"""What a finished run leaves: Hugging Face folders and the projector, under run_dir/export."""

import logging

from mmalign.config import TrainConfig
from mmalign.distributed import Ranks
from mmalign.errors import UserError
from mmalign.model.hf import export_llama, export_llava, save_projector
from mmalign.model.hf.adapter import export_adapter
from mmalign.model.llava import Llava
from mmalign.model.shards import unsharded
from mmalign.tokenizer import Tokenizer

log = logging.getLogger("mmalign")


def export(model: Llava, config: TrainConfig, tokenizer: Tokenizer, ranks: Ranks) -> None:
    """The main process writes. Of a sharded model one unit at a time is gathered, by all."""
    folder = config.run_dir / "export"
    try:
        with unsharded(model):
            _write(model, config, tokenizer, ranks)
    except OSError as error:
        raise UserError(
            f"{folder} could not be written: {error}. All steps are safe in the last checkpoint; "
            "free some space and give the same command again."
        ) from error
    if ranks.is_main:
        log.info("exported to %s", folder)
    ranks.barrier()


def _write(model: Llava, config: TrainConfig, tokenizer: Tokenizer, ranks: Ranks) -> None:
    folder = config.run_dir / "export"
    writes = ranks.is_main
    if not config.data.text_only and writes:
        save_projector(model, folder / "projector.safetensors")
    if config.stage == "finetune" and config.lora.rank:
        adapter = folder / "adapter" if writes else None
        export_adapter(model.decoder, adapter, config.lora, config.model.decoder)
    if config.stage == "finetune":
        export_llama(model, folder / "llama" if writes else None, tokenizer)
        if not config.data.text_only:
            export_llava(model, folder / "llava" if writes else None, tokenizer)
