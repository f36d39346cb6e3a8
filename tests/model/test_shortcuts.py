"""Shortcuts against the plain computation: the same loss, gradients and weights, less work."""

import pytest
import torch

from mmalign.config import ShortcutConfig
from mmalign.model.llava import Llava
from tests.model import tiny

PLAIN = ShortcutConfig(last_layer_rows=False, frozen_prefix=False)
STAGES = {
    "pretrain": tiny.stage("pretrain"),
    "finetune": tiny.stage("finetune"),
    "lora": tiny.stage("finetune", rank=4),
    "lora-embeddings": tiny.stage("finetune", rank=4, train_embeddings=True),
}
SHAPES = {"gqa": tiny.GROUPED_QUERY, "head-dim-100": tiny.HEAD_DIM_100}


@pytest.fixture(params=SHAPES)
def make_model(request, tmp_path):
    """Makes the same model any number of times: set_trainable changes it."""
    theirs = tiny.hf_llava(**SHAPES[request.param])
    return lambda: tiny.ours(theirs, tmp_path, prefix_ids=tiny.HEADER.tolist())


@pytest.fixture
def model(make_model):
    return make_model()


def text_only(model: Llava) -> Llava:
    return Llava(model.decoder, None, None, tiny.TOKENIZER)


def loss_and_gradients(model, batch, config, shortcuts):
    """Of one micro-batch, with adapters that are not zero."""
    torch.manual_seed(0)
    model.shortcuts = shortcuts
    tiny.set_trainable(model, config)
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
def test_rows_without_a_target_change_nothing(make_model, kind, images):
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
    tiny.set_trainable(model, STAGES["finetune"])
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


@pytest.mark.parametrize("template", ["plain", "v1"], ids=["projector", "im-start-end"])
def test_frozen_prefix_changes_nothing(make_model, template):
    config = tiny.stage("pretrain", template)
    samples = tiny.following(tiny.mixed_samples())
    plain = loss_and_gradients(make_model(), tiny.pack(samples), config, PLAIN)
    batch = tiny.without_prefix(samples)
    assert_same_step(loss_and_gradients(make_model(), batch, config, ShortcutConfig()), plain)


def test_frozen_prefix_is_computed_once(model):
    tiny.set_trainable(model, STAGES["pretrain"])
    tokens = []
    model.decoder.layers[0].register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0]))
    batch = tiny.without_prefix(tiny.following(tiny.mixed_samples()))
    for _ in range(3):
        model(batch).backward()
    assert [len(x) for x in tokens] == [len(tiny.HEADER), *[len(batch.input_ids)] * 3]
    assert not tokens[0].requires_grad and tokens[1].requires_grad
    model.to(torch.bfloat16)  # of another precision: computed again
    model(batch)
    assert len(tokens[4]) == len(tiny.HEADER) and tokens[4].dtype == torch.bfloat16


def test_frozen_prefix_changes_with_the_decoder(make_model):
    """A stage that starts with other weights must not meet the old keys and values."""
    batch = tiny.without_prefix(tiny.following(tiny.mixed_samples()))
    fresh, used = make_model(), make_model()
    tiny.set_trainable(used, STAGES["pretrain"])
    used(batch)
    for model in (fresh, used):
        model.decoder.layers[0].qkv_proj.weight.data.mul_(0.5)
        tiny.set_trainable(model, STAGES["pretrain"])
    assert torch.equal(used(batch), fresh(batch))


def test_tower_sees_the_images_of_the_batch_alone(model, monkeypatch):
    """Samples without an image cost no work of it; a batch without any does not call it at all."""
    tiny.set_trainable(model, STAGES["finetune"])
    seen, forward = [], model.vision_tower.forward
    monkeypatch.setattr(model.vision_tower, "forward", lambda x: seen.append(len(x)) or forward(x))
    model(tiny.pack(tiny.mixed_samples()))
    model(tiny.pack(tiny.text_samples()))
    assert seen == [4]
