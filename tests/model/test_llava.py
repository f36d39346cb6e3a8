"""The whole model against LlavaForConditionalGeneration, and what each stage trains."""

from types import SimpleNamespace

import pytest
import torch

from mmalign.errors import UserError
from mmalign.model.hf.names import decoder_parts
from mmalign.model.llava import Llava
from mmalign.model.projector import projector_tensors
from tests.model.tiny import (
    GROUPED_QUERY,
    HEAD_DIM_100,
    TIED,
    TOKENIZER,
    assert_same,
    hf_llava,
    hf_logits,
    hf_loss_sum,
    hf_parameter,
    mixed_samples,
    ours,
    pack,
    set_trainable,
    stage,
    text_samples,
)

STAGES = {
    "pretrain-plain": stage("pretrain", template="plain"),
    "pretrain-im-start-end": stage("pretrain"),
    "finetune": stage("finetune"),
    "lora": stage("finetune", rank=4),
    "lora-embeddings": stage("finetune", rank=4, train_embeddings=True),
}


@pytest.fixture(params=[GROUPED_QUERY, HEAD_DIM_100, TIED], ids=["gqa", "head-dim-100", "tied"])
def models(request, tmp_path):
    theirs = hf_llava(**request.param)
    return theirs, ours(theirs, tmp_path)


@pytest.fixture
def untied_models(tmp_path):
    theirs = hf_llava(**GROUPED_QUERY)
    return theirs, ours(theirs, tmp_path)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_logits_equal_transformers(models):
    theirs, model = models
    samples = mixed_samples()
    with torch.no_grad():
        logits = model.hidden_states(pack(samples)) @ model.decoder.lm_head.weight.T
        expected = torch.cat([hf_logits(theirs, sample) for sample in samples])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_finetune_gradients_equal_transformers(models):
    theirs, model = models
    set_trainable(model, stage("finetune"))
    samples = mixed_samples()
    loss, expected = model(pack(samples)), hf_loss_sum(theirs, samples)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    for key, part in decoder_parts(model.decoder.config).items():
        gradient = model.decoder.get_parameter(part.parameter).grad[part.rows]
        assert_same(gradient, hf_parameter(theirs, key).grad, key)
    linear = theirs.model.multi_modal_projector.linear_1
    assert_same(model.projector.weight.grad, linear.weight.grad)
    assert_same(model.projector.bias.grad, linear.bias.grad)
    assert all(p.grad is None for p in model.vision_tower.parameters())


@pytest.mark.parametrize("config", STAGES.values(), ids=STAGES.keys())
def test_packed_equals_one_sample_at_a_time(untied_models, config):
    _, model = untied_models
    torch.manual_seed(0)
    set_trainable(model, config)
    samples = mixed_samples()
    loss = model(pack(samples))
    loss.backward()
    packed = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    losses = [model(pack([sample])) for sample in samples]
    for one in losses:
        one.backward()
    torch.testing.assert_close(loss, torch.stack(losses).sum(), rtol=1e-5, atol=0)
    assert packed.keys() == model.trainable_parameters().keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        assert_same(packed[name], gradient, name)


def test_pretrain_trains_the_projector_alone(untied_models):
    theirs, model = untied_models
    set_trainable(model, STAGES["pretrain-plain"])
    assert set(model.trainable_parameters()) == {"projector.weight", "projector.bias"}
    samples = mixed_samples()
    model(pack(samples)).backward()
    assert set(gradients(model)) == {"projector.weight", "projector.bias"}
    hf_loss_sum(theirs, samples).backward()
    expected = theirs.model.multi_modal_projector.linear_1.weight.grad
    assert_same(model.projector.weight.grad, expected)


def test_pretrain_with_im_start_end_trains_their_two_rows(untied_models):
    theirs, model = untied_models
    samples = mixed_samples()
    before = model(pack(samples)).detach()
    set_trainable(model, STAGES["pretrain-im-start-end"])
    trained = {"projector.weight", "projector.bias", "image_token_embeddings"}
    assert set(model.trainable_parameters()) == trained
    loss = model(pack(samples))
    assert torch.equal(loss.detach(), before)
    loss.backward()
    assert set(gradients(model)) == trained
    hf_loss_sum(theirs, samples).backward()
    expected = theirs.get_input_embeddings().weight.grad[[101, 102]]
    assert expected.abs().max() > 0
    assert_same(model.image_token_embeddings.grad, expected)


def test_the_next_stage_takes_the_two_trained_rows_over(untied_models):
    _, model = untied_models
    set_trainable(model, STAGES["pretrain-im-start-end"])
    model.image_token_embeddings.data.normal_()
    rows = model.image_token_embeddings.detach().clone()
    samples = mixed_samples()
    loss = model(pack(samples)).detach()
    set_trainable(model, stage("finetune"))
    assert model.image_token_embeddings is None
    assert torch.equal(model.decoder.embed_tokens.weight[[101, 102]], rows)
    assert torch.equal(model(pack(samples)).detach(), loss)


@pytest.mark.parametrize("config", STAGES.values(), ids=STAGES.keys())
def test_batch_without_images_still_gives_every_gradient(untied_models, config, monkeypatch):
    """A rank whose micro-batch has no image must not leave the others waiting for a gradient."""
    theirs, model = untied_models
    set_trainable(model, config)

    def must_not_run(pixel_values):
        raise AssertionError("the tower ran without an image")

    monkeypatch.setattr(model.vision_tower, "forward", must_not_run)
    loss = model(pack(text_samples()))
    with torch.no_grad():
        expected = hf_loss_sum(theirs, text_samples())
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    loss.backward()
    assert gradients(model).keys() == model.trainable_parameters().keys()
    assert not model.projector.weight.grad.any() and not model.projector.bias.grad.any()


@pytest.mark.parametrize("config", STAGES.values(), ids=STAGES.keys())
@pytest.mark.parametrize("samples", [mixed_samples(), text_samples()], ids=["images", "text"])
def test_bf16_runs_in_every_stage(untied_models, config, samples):
    _, model = untied_models
    exact = model(pack(samples)).detach()
    model = model.to(torch.bfloat16)
    set_trainable(model, config)
    loss = model(pack(samples))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), exact, rtol=0.02, atol=0)
    loss.backward()
    assert {g.dtype for g in gradients(model).values()} == {torch.bfloat16}
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_lora_trains_the_adapters_and_on_request_the_embeddings(untied_models):
    _, model = untied_models
    set_trainable(model, STAGES["lora"])
    names = set(model.trainable_parameters())
    assert all("lora_" in name or name.startswith("projector.") for name in names)
    assert len(names) == 2 + 2 * 7 * 2  # projector; A and B of seven adapters in two layers
    set_trainable(model, STAGES["lora-embeddings"])
    added = set(model.trainable_parameters()) - names
    assert added == {"decoder.embed_tokens.weight", "decoder.lm_head.weight"}


def test_text_only_model_is_the_decoder(untied_models):
    theirs, model = untied_models
    model = Llava(model.decoder, None, None, TOKENIZER)
    set_trainable(model, stage("finetune"))
    loss, expected = model(pack(text_samples())), hf_loss_sum(theirs, text_samples())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    assert gradients(model).keys() == model.trainable_parameters().keys()
    with pytest.raises(UserError, match="trains the projector"):
        set_trainable(model, stage("pretrain"))


def test_projector_of_another_size_is_refused(untied_models):
    _, model = untied_models
    state = {"weight": torch.zeros(128, 32), "bias": torch.zeros(128)}
    with pytest.raises(UserError, match=r"weight: expected shape \(128, 48\).*found \(128, 32\)"):
        model.load_projector(state)
    rows = {"image_token_embeddings": torch.ones(2, 64)}
    with pytest.raises(UserError, match=r"expected shape \(2, 128\).*found \(2, 64\)"):
        model.load_projector(projector_tensors(model.projector) | rows)


def test_image_tokens_beyond_the_vocabulary_are_refused(untied_models):
    _, model = untied_models
    with pytest.raises(UserError, match=r"ids \(103,\), but .* vocabulary has 103 tokens"):
        tokenizer = SimpleNamespace(image_token_id=103, im_start_id=104, im_end_id=105)
        Llava(model.decoder, model.vision_tower, model.projector, tokenizer)
    model.im_start_end_ids = (103, 104)
    with pytest.raises(UserError, match=r"ids \(103, 104\)"):
        set_trainable(model, STAGES["pretrain-im-start-end"])
    state = {"weight": model.projector.weight, "bias": model.projector.bias}
    with pytest.raises(UserError, match=r"ids \(103, 104\)"):
        model.load_projector(state | {"image_token_embeddings": torch.zeros(2, 128)})


def test_tied_decoder_cannot_train_two_rows(tmp_path):
    model = ours(hf_llava(**TIED), tmp_path)
    with pytest.raises(UserError, match="ties lm_head"):
        set_trainable(model, STAGES["pretrain-im-start-end"])
