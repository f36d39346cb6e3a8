import pytest

from tests.model.tiny import GROUPED_QUERY, hf_llama


@pytest.fixture
def folder(tmp_path):
    """A LlamaForCausalLM folder as transformers 5 writes it."""
    hf_llama(**GROUPED_QUERY).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"
