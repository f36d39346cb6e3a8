"""The warm-up compiles what scores and answers launch: here these run in Triton's interpreter."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from mmalign.chat import Conversation
from mmalign.evaluation.scoring import score_requests
from mmalign.evaluation.warm_up import EvaluationWithoutData
from mmalign.model.generate import GenerationOptions, Prompt, generate
from mmalign.model.hf import load_llava
from mmalign.tokenizer import Tokenizer
from tests.compile_keys import launched, listed, name_of, zero
from tests.model.hf.test_tiles import published as published  # a fixture
from tests.test_chat import run as run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
REQUESTS = [("it is red " * 12, "it"), ("it is red " * 12, "no"), ("what is it", "the circle")]


def check(keys: set[str], expected: dict[str, int], folder: Path, **asked: bool) -> None:
    """expected: how often some kernels are compiled; asked: of EvaluationWithoutData.of_folder."""
    asked = dict.fromkeys(("scores", "answers", "pictures"), False) | asked
    program = EvaluationWithoutData.of_folder(folder, torch.bfloat16, **asked)
    assert expected.items() <= Counter(map(name_of, keys)).items()
    assert keys - set(listed(program)) == set()


def test_text(small_world):
    tokenizer = Tokenizer.from_pretrained(small_world.decoder)
    llava = zero(load_llava(small_world.decoder, tokenizer, torch.bfloat16))
    with launched() as scored:  # a batch of long segments, and one of what is left
        score_requests(llava.decoder, tokenizer, REQUESTS, batch_tokens=40, progress=False)
    expected = {"_prefix_attention_kernel": 2, "_target_logprobs_kernel": 1}
    check(scored, expected, small_world.decoder, scores=True)
    prompts = [Prompt(tokenizer.encode(context)) for context, _ in REQUESTS[1:]]
    with launched() as answered:
        generate(llava, tokenizer, prompts, GenerationOptions(max_new_tokens=2, temperature=1.0))
    expected = {"_prefix_attention_kernel": 2, "_rms_norm_fwd_kernel": 2}
    check(answered, expected, small_world.decoder, answers=True)


def ask_about_a_picture(folder: Path, picture: Path) -> set[str]:
    conversation = Conversation(folder, [picture], template="v1", precision="bf16")
    zero(conversation.llava)
    with launched() as keys:
        conversation.ask("What is it?", GenerationOptions(max_new_tokens=2), lambda text: None)
    return keys


PICTURE = {"_project_kernel": 1, "_attention_fwd_kernel": 1, "_quick_gelu_kernel": 1}


def test_a_picture(run):
    keys = ask_about_a_picture(run.folder, run.picture)
    check(keys, PICTURE, run.folder / "export" / "llava", answers=True, pictures=True)


@pytest.mark.parametrize("published", ["llama-3"], indirect=True)
def test_tiles(published):
    keys = ask_about_a_picture(published.folder, published.pictures / "line.png")
    check(keys, PICTURE, published.folder, answers=True, pictures=True)
