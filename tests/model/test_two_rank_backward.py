"""A micro-batch without images on one rank only: the other must not wait for a gradient."""

import pytest
import torch
from torch import multiprocessing

from tests.model.tiny import TOKENIZER, assert_same, mixed_samples, pack, stage, text_samples
from tests.model.two_rank_backward import backward, tiny_llava


@pytest.mark.parametrize(
    "config",
    [stage("pretrain"), stage("finetune"), stage("finetune", rank=2)],
    ids=["pretrain", "finetune", "lora"],
)
def test_gradients_are_the_mean_of_both_ranks(tmp_path, config):
    batches = [pack(mixed_samples()), pack(text_samples())]
    arguments = (str(tmp_path), TOKENIZER, config, batches)
    multiprocessing.start_processes(backward, arguments, nprocs=2, start_method="spawn")
    gradients = torch.load(tmp_path / "gradients.pt")
    model = tiny_llava(TOKENIZER, config)
    for batch in batches:
        (model(batch) / 2).backward()
    assert gradients.keys() == model.trainable_parameters().keys()
    for name, parameter in model.trainable_parameters().items():
        if parameter.grad.any():
            assert_same(gradients[name], parameter.grad, name)
        else:  # A of an adapter whose B is still zero
            assert not gradients[name].any(), name
