"""A small random LLaMA with the real tokenizer, as a Hugging Face folder."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mmalign.model.decoder import Decoder
from mmalign.model.hf import load_decoder
from mmalign.tokenizer import Tokenizer
from tests.training.conftest import small_world  # noqa: F401  a fixture


def save_llama(folder: Path, tokenizer_model: Path, seed: int, **config) -> Path:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 32000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.15,  # so that log-likelihoods differ by whole units
    }
    LlamaForCausalLM(LlamaConfig(**shape | config)).save_pretrained(folder)
    shutil.copy(tokenizer_model, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def tokenizer_model(shared_data: Path) -> Path:
    return shared_data / "llama_tokenizer" / "tokenizer.model"


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory, tokenizer_model) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), tokenizer_model, seed=0)


@pytest.fixture(scope="session")
def decoder(llama_folder) -> Decoder:
    return load_decoder(llama_folder)


@pytest.fixture(scope="session")
def tokenizer(llama_folder) -> Tokenizer:
    return Tokenizer.from_pretrained(llama_folder)
