"""The packed decoder against transformers' LlamaForCausalLM, one sample at a time."""

import pytest
import torch
from mmalign_kernels import target_logprobs

from mmalign.errors import UserError
from mmalign.model.decoder import Decoder
from mmalign.model.hf import load_decoder
from mmalign.model.hf.names import decoder_parts
from mmalign.model.layers import init_weights
from tests.model.kinds import hf_decoder
from tests.model.tiny import (
    GROUPED_QUERY,
    SHAPES,
    assert_same,
    hf_llama,
    hf_logits,
    hf_loss_sum,
    hf_parameter,
    hidden_states_of,
    loss_of,
    random_sample,
    text_samples,
)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def models(request, tmp_path):
    theirs = hf_llama(**request.param)
    theirs.save_pretrained(tmp_path)
    return theirs, load_decoder(tmp_path)


def test_logits_equal_transformers(models):
    theirs, decoder = models
    samples = text_samples()
    with torch.no_grad():
        logits = hidden_states_of(decoder, samples) @ decoder.lm_head.weight.T
        expected = torch.cat([hf_logits(theirs, sample) for sample in samples])
    assert expected.std() > 0.5  # not a model that says nothing
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_loss_and_every_gradient_equal_transformers(models):
    theirs, decoder = models
    samples = text_samples()
    loss, expected = loss_of(decoder, samples), hf_loss_sum(theirs, samples)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    for key, part in decoder_parts(decoder.config).items():
        gradient = decoder.get_parameter(part.parameter).grad[part.rows]
        assert_same(gradient, hf_parameter(theirs, key).grad, key)


def test_packed_equals_one_sample_at_a_time(models):
    _, decoder = models
    samples = text_samples()
    loss_of(decoder, samples).backward()
    packed = {name: p.grad.clone() for name, p in decoder.named_parameters()}
    decoder.zero_grad()
    for sample in samples:
        loss_of(decoder, [sample]).backward()
    for name, parameter in decoder.named_parameters():
        assert_same(packed[name], parameter.grad, name)


def test_samples_do_not_see_each_other(models):
    _, decoder = models
    first, _, last = text_samples()
    with torch.no_grad():
        forward, swapped = (
            hidden_states_of(decoder, [first, last]),
            hidden_states_of(decoder, [last, first]),
        )
    n = len(first.input_ids)
    torch.testing.assert_close(forward[:n], swapped[-n:], rtol=1e-5, atol=1e-5)


def test_target_logprobs_of_the_hidden_states(models):
    theirs, decoder = models
    sample = text_samples()[0]
    targets = sample.input_ids[1:]
    with torch.no_grad():
        logprobs = target_logprobs(
            hidden_states_of(decoder, [sample])[:-1], decoder.lm_head.weight, targets
        )
        expected = hf_logits(theirs, sample)[:-1].log_softmax(-1)
    expected = expected.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-4)


def test_bf16_is_as_close_to_fp32_as_transformers_bf16(tmp_path):
    theirs = hf_llama(**GROUPED_QUERY)
    theirs.save_pretrained(tmp_path)
    samples = text_samples()
    decoder = load_decoder(tmp_path, torch.bfloat16)
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        exact = torch.cat([hf_logits(theirs, sample) for sample in samples])
        hidden_states = hidden_states_of(decoder, samples)
        logits = hidden_states @ decoder.lm_head.weight.T
        theirs.to(torch.bfloat16)
        peer = torch.cat([hf_logits(theirs, sample) for sample in samples])
    assert hidden_states.dtype == torch.bfloat16
    error, peer_error = (logits - exact).norm(), (peer - exact).norm()
    assert error < 2 * peer_error


def test_rotary_tables_stay_exact_and_grow(tmp_path):
    hf_llama(**GROUPED_QUERY).save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path)
    cos, sin = decoder.rotary.up_to(16)
    assert cos.shape == (16, 32)
    decoder = decoder.to(torch.bfloat16)
    assert decoder.rotary.cos.dtype == torch.float32
    assert torch.equal(decoder.rotary.cos, cos)
    grown_cos, grown_sin = decoder.rotary.up_to(40)
    assert len(grown_cos) >= 40
    assert torch.equal(grown_cos[:16], cos) and torch.equal(grown_sin[:16], sin)
    assert not any("rotary" in name for name in decoder.state_dict())


@pytest.mark.parametrize("kind", ("mistral-window", "llama-dynamic"))
def test_sequences_that_would_be_computed_otherwise_are_refused(tmp_path, kind):
    hf_decoder(kind).save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path)
    hidden_states_of(decoder, [random_sample(64)])
    with pytest.raises(UserError, match="has 65 tokens, but this decoder computes at most 64"):
        hidden_states_of(decoder, [random_sample(65)])


def test_tables_grown_while_scoring_serve_training(tmp_path):
    hf_llama(**GROUPED_QUERY).save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path)
    with torch.inference_mode():
        hidden_states_of(decoder, text_samples())
    assert len(decoder.rotary.cos) > 16 and not decoder.rotary.cos.is_inference()


def test_init_weights_depends_on_the_seed_alone(tmp_path):
    hf_llama(**GROUPED_QUERY).save_pretrained(tmp_path)
    config = load_decoder(tmp_path).config
    first, second, other = Decoder(config), Decoder(config), Decoder(config)
    for decoder, seed in ((first, 1), (second, 1), (other, 2)):
        init_weights(decoder, seed)
        torch.rand(1)  # the global generator plays no part
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert (first.norm.weight == 1).all()
