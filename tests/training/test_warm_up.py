"""The warm-up compiles what a real step launches: here the step runs in Triton's interpreter."""

from pathlib import Path

import pytest
import torch

from mmalign.config import EvaluationConfig
from mmalign.model.llava import prefix_key_values
from mmalign.tokenizer import Tokenizer
from mmalign.training.build import MIN_PREFIX_TOKENS, resolve
from mmalign.training.warm_up import RunWithoutData
from tests.compile_keys import launched, listed, zero
from tests.training.helpers import small_config, small_loop

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    """A group of ETHICS, in the small world's words."""
    root = tmp_path_factory.mktemp("data")
    file = root / "ethics" / "justice" / "justice_test.csv"
    file.parent.mkdir(parents=True)
    file.write_text("label,scenario\n1,it is red\n0,it is a square\n1,it is small\n0,no it is\n")
    return root


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_kernel_of_a_run_is_compiled(stage, small_world, data_root, tmp_path):
    config = small_config(
        small_world, tmp_path, stage, num_steps=2, global_batch_size=1, precision="bf16",
        evaluation=EvaluationConfig(stage == "finetune", str(data_root), ("ethics_justice",), 4),
    )  # fmt: skip
    loop = small_loop(config)
    model, (_, step) = zero(loop.trainer.model), loop.loader  # the second sample has an image
    with launched() as keys:
        if loop.evaluation:
            loop.evaluation.after(0, model)
        else:  # the shortest header of other data
            prefix_key_values(model.decoder, range(MIN_PREFIX_TOKENS))
        loop.trainer.train_step(step)
    program = RunWithoutData.of_run(resolve(config), Tokenizer.from_pretrained(small_world.decoder))
    assert len(keys) > 30 and keys - set(listed(program)) == set()
