"""Caches: their size against transformers' own."""

import torch
from transformers import LlamaForCausalLM

from mmalign.model.config import DecoderConfig
from mmalign.model.positions import KeyValues, cache_bytes
from tests.model.tiny import GROUPED_QUERY, hf_llama, random_sample


def test_cache_bytes_are_those_of_transformers_cache(tmp_path):
    theirs: LlamaForCausalLM = hf_llama(**GROUPED_QUERY)
    theirs.save_pretrained(tmp_path)
    config = DecoderConfig.from_hf(tmp_path)
    cache = theirs(input_ids=random_sample(12).input_ids[None], use_cache=True).past_key_values
    ours = KeyValues(config, 12, like=torch.empty(0))
    for layer in cache.layers:
        held = layer.keys.nbytes + layer.values.nbytes
        assert cache_bytes(config, 12, torch.float32) == held
        assert ours.keys.nbytes + ours.values.nbytes == held
