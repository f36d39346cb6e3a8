"""The results of a run under run_dir/export: Hugging Face folders, projector and adapter."""

import logging

from safetensors import SafetensorError

from mmalign.config import TrainConfig
from mmalign.data.chat_template import chat_template
from mmalign.data.templates import find_template
from mmalign.distributed import DistributedContext
from mmalign.errors import UserError
from mmalign.model.hf import export_llama, export_llava, save_projector
from mmalign.model.hf.adapter import export_adapter
from mmalign.model.llava import Llava
from mmalign.model.shards import unsharded
from mmalign.tokenizer import Tokenizer

log = logging.getLogger("mmalign")


def export(
    model: Llava, config: TrainConfig, tokenizer: Tokenizer, ranks: DistributedContext
) -> None:
    """Called by all ranks, which gather a sharded model unit by unit; the main process writes."""
    folder = config.run_dir / "export"
    try:
        with unsharded(model):
            _write(model, config, tokenizer, ranks)
    except (OSError, SafetensorError) as error:  # safetensors' own, of a full disk
        raise UserError(
            f"{folder} could not be written: {error}. All steps are safe in the last checkpoint. "
            "Free some space and rerun the same command to export."
        ) from error
    if ranks.is_main:
        log.info("exported to %s", folder)
    ranks.barrier()


def _write(
    model: Llava, config: TrainConfig, tokenizer: Tokenizer, ranks: DistributedContext
) -> None:
    folder = config.run_dir / "export"
    writes = ranks.is_main
    if not config.data.text_only and writes:
        save_projector(model, folder / "projector.safetensors")
    if config.stage == "finetune" and config.lora.rank:
        adapter = folder / "adapter" if writes else None
        export_adapter(model.decoder, adapter, config.lora, config.model.decoder)
    if config.stage == "finetune":
        template, marks = find_template(config.data.template), config.data.use_im_start_end
        chat = chat_template(template, tokenizer, marks, not config.data.text_only)
        export_llama(model, folder / "llama" if writes else None, tokenizer, chat)
        if not config.data.text_only:
            export_llava(model, folder / "llava" if writes else None, tokenizer, chat)
