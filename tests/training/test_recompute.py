"""Recomputation changes what is kept, and neither losses nor gradients."""

import pytest
import torch

from mmalign.errors import UserError
from mmalign.model.recompute import POLICIES, policy_by_layer
from tests.training.activations_kept import (
    decoder_config,
    random_batch,
    saving,
    small_model,
    train_config,
)

CASES = {
    "pretrain": train_config("pretrain"),
    "finetune": train_config(),
    "text-only": train_config(data={"text_only": True}),
    "lora": train_config(rank=4, lora={"dropout": 0.3}),
    "lora-text-only": train_config(
        rank=4, lora={"dropout": 0.3, "train_embeddings": True}, data={"text_only": True}
    ),
}
LENGTHS = (40, 7, 66, 1, 30)


def loss_and_gradients(model, batch):
    model.train()
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(batch)
    loss.backward()
    after = torch.rand(3)  # a policy must not move the random numbers that follow
    return loss.detach(), after, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("num_layers", (None, 2))
@pytest.mark.parametrize("policy", POLICIES[1:])
@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_without(case, policy, num_layers):
    config = CASES[case]
    model = small_model(decoder_config(), config)
    batch = random_batch(LENGTHS, 0 if config.data.text_only else 2)
    expected = loss_and_gradients(model, batch)
    model.decoder.set_recompute(policy, num_layers)
    found = loss_and_gradients(model, batch)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert found[2].keys() == expected[2].keys()
    for name, grad in expected[2].items():
        assert torch.equal(found[2][name], grad), name


@pytest.mark.parametrize("case", CASES)
def test_each_policy_keeps_less_than_the_one_before(case):
    config = CASES[case]
    model = small_model(decoder_config(), config).train()
    batch = random_batch(LENGTHS, 0 if config.data.text_only else 2)
    kept = []
    for policy in POLICIES:
        model.decoder.set_recompute(policy)
        with saving(model, batch) as saved:
            loss = model(batch)
        kept.append(saved.bytes)
        del loss
    none, elementwise, mlp, full = kept
    # frozen products keep no results of RMSNorm and SwiGLU, adapters keep copies with dropout
    assert elementwise < none if case in ("finetune", "text-only") else elementwise == none
    assert elementwise > 1.1 * mlp > 1.2 * full


def test_a_frozen_decoder_keeps_no_inputs_of_its_products():
    """Stage 1 has no weight gradients, so a layer keeps what its own operations need."""
    decoder, batch = decoder_config(), random_batch(LENGTHS, 2)
    model = small_model(decoder, train_config("pretrain"))
    with saving(model, batch) as saved:
        loss = model(batch)
    tokens, rows, layers = sum(LENGTHS), batch.num_loss_tokens, decoder.num_hidden_layers
    shapes = saved.shapes()
    assert shapes.count((tokens, 3 * 128)) == layers  # q, k, v
    assert shapes.count((tokens, 2 * 352)) == layers - 1 and shapes.count((rows, 2 * 352)) == 1
    assert not [shape for shape in shapes if shape[1:] == (352,)]  # the input of down_proj
    # the norms' inputs: the first one's, two of each layer; the attention keeps its result
    assert shapes.count((tokens, 128)) == 1 + 2 * (layers - 1) + layers
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"projector.weight", "projector.bias", "image_token_embeddings"}


def test_an_activation_that_was_overwritten_is_not_used():
    model = small_model(decoder_config(), train_config(recompute="elementwise"))
    loss = model(random_batch(LENGTHS, 1))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


def test_layers_that_recompute():
    assert policy_by_layer("mlp", 2, 3) == ["mlp", "mlp", "none"]
    assert policy_by_layer("full", None, 2) == ["full", "full"]
    with pytest.raises(UserError, match="--recompute-layers 4: this decoder has 3 layers"):
        policy_by_layer("mlp", 4, 3)
