"""LoRA adapters as a folder that PEFT loads on top of the model they were trained on."""

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mmalign.config import LoraConfig
from mmalign.files import write_json
from mmalign.model.decoder import Decoder
from mmalign.model.hf.export import replacing_folder
from mmalign.model.lora import LoraLinear
from mmalign.model.shards import unsharded

PREFIX = "base_model.model."  # of PeftModel around LlamaForCausalLM


def export_adapter(
    decoder: Decoder, folder: str | Path | None, lora: LoraConfig, base: str
) -> None:
    """adapter_config.json and adapter_model.safetensors, in PEFT's names.

    base: folder of the model that the adapters belong to. With train_embeddings the file holds
    embed_tokens and lm_head in full; where they have rows for image tokens that base lacks, resize
    base's embeddings first. All processes gather a sharded decoder layer by layer; with folder None
    a process only takes part in that.
    """
    tensors = dict(_adapters(decoder))
    if lora.train_embeddings:
        tensors |= _embeddings(decoder)
    if folder is None:
        return
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        # both, although they may be tied: PEFT would keep the base's lm_head
        "modules_to_save": ["embed_tokens", "lm_head"] if lora.train_embeddings else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with replacing_folder(Path(folder)) as partial:
        write_json(partial / "adapter_config.json", config)
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})


def _adapters(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    for i, layer in enumerate(decoder.layers):
        with unsharded(layer):
            for module in layer.children():
                if not isinstance(module, LoraLinear):
                    continue
                adapters = zip(module.adapted, module.lora_a, module.lora_b, strict=True)
                for name, a, b in adapters:
                    block = (
                        "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
                    )
                    key = f"{PREFIX}model.layers.{i}.{block}.{name}"
                    yield f"{key}.lora_A.weight", _copy(a)
                    yield f"{key}.lora_B.weight", _copy(b)


def _embeddings(decoder: Decoder) -> dict[str, Tensor]:
    return {
        f"{PREFIX}model.embed_tokens.weight": _copy(decoder.embed_tokens.weight),
        f"{PREFIX}lm_head.weight": _copy(decoder.lm_head.weight),
    }


def _copy(tensor: Tensor) -> Tensor:
    """In its own memory: what a sharded layer has gathered is freed afterwards."""
    return tensor.detach().to("cpu", copy=True).contiguous()
