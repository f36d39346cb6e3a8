"""Shortcuts against the plain computation: the same loss, gradients and weights, less work."""

from dataclasses import replace

import pytest
import torch

from mmalign.config import ShortcutConfig
from mmalign.model.llava import Llava
from tests.model import tiny

PLAIN = ShortcutConfig(last_layer_rows=False)
STAGES = {
    "pretrain": tiny.stage("pretrain"),
    "finetune": tiny.stage("finetune"),
    "lora": tiny.stage("finetune", rank=4),
    "lora-embeddings": tiny.stage("finetune", rank=4, train_embeddings=True),
}


SHAPES = {"gqa": tiny.GROUPED_QUERY, "head-dim-100": tiny.HEAD_DIM_100}


@pytest.fixture(params=SHAPES)
def make_model(request, tmp_path):
    """Makes the same model any number of times: a stage changes it."""
    theirs = tiny.hf_llava(**SHAPES[request.param])
    return lambda: tiny.ours(theirs, tmp_path)


@pytest.fixture
def model(make_model):
    return make_model()


def text_only(model: Llava) -> Llava:
    return Llava(model.decoder, None, None, tiny.TOKENIZER)


def loss_and_gradients(model, batch, config, shortcuts):
    """Of one micro-batch, with adapters that are not zero."""
    torch.manual_seed(0)
    model.set_stage(replace(config, shortcuts=shortcuts))
    for name, parameter in model.trainable_parameters().items():
        if "lora_b" in name:
            parameter.data.normal_(std=0.1)
    loss = model(batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.trainable_parameters().items()}
    model.zero_grad()
    return loss.detach(), gradients


def assert_same_step(ours, plain):
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-6, atol=0)
    assert ours[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        tiny.assert_same(ours[1][name], gradient, name, ratio=2e-6)


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("images", [True, False], ids=["images", "text-only"])
def test_pruned_rows_change_nothing(make_model, kind, images):
    if not images and kind == "pretrain":
        pytest.skip("stage 1 trains the projector")
    batch = tiny.pack(tiny.mixed_samples() if images else tiny.text_samples())
    ours, plain = (make_model() if images else text_only(make_model()) for _ in range(2))
    plain = loss_and_gradients(plain, batch, STAGES[kind], PLAIN)
    assert_same_step(loss_and_gradients(ours, batch, STAGES[kind], ShortcutConfig()), plain)


def rows_of_products(model, batch) -> dict[str, int]:
    """Rows that each projection of the last layer reads."""
    rows = {}
    layer = model.decoder.layers[-1]
    for name in ("o_proj", "gate_up_proj", "down_proj"):
        getattr(layer, name).register_forward_hook(
            lambda module, inputs, _, name=name: rows.update({name: len(inputs[0])})
        )
    model(batch).backward()
    return rows


def test_last_layer_computes_the_supervised_rows_alone(model):
    model.set_stage(STAGES["finetune"])
    batch = tiny.pack(tiny.mixed_samples())
    counts = rows_of_products(model, batch)
    assert set(counts.values()) == {batch.num_loss_tokens} and len(counts) == 3
    assert 0 < batch.num_loss_tokens < len(batch.input_ids)


@pytest.mark.parametrize("kind", STAGES)
def test_batch_without_a_target_gives_zero_gradients(model, kind):
    batch = tiny.pack([tiny.random_sample(1), tiny.random_sample(1, seed=1)])
    assert batch.num_loss_tokens == 0
    loss, gradients = loss_and_gradients(model, batch, STAGES[kind], ShortcutConfig())
    assert loss == 0
    assert gradients and not any(gradient.any() for gradient in gradients.values())
