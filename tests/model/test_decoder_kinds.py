"""Every kind of decoder against its own class in transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mmalign.evaluation.requests import EncodedRequest
from mmalign.evaluation.scoring import make_plan, run_plan
from mmalign.model.generate import GenerationOptions, Prompt, generate
from mmalign.model.hf import export_llama, load_decoder
from mmalign.model.hf.names import decoder_parts
from mmalign.model.llava import Llava
from mmalign.model.lora import merge_lora
from mmalign.model.recompute import POLICIES
from tests.model.kinds import KINDS, hf_decoder
from tests.model.test_lora import adapted_models
from tests.model.tiny import (
    TOKENIZER,
    Letters,
    assert_same,
    hf_logits,
    hf_loss_sum,
    hidden_states_of,
    loss_of,
    random_sample,
    text_samples,
)

pytestmark = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def models(kind, tmp_path):
    theirs = hf_decoder(kind)
    theirs.save_pretrained(tmp_path)
    return theirs, load_decoder(tmp_path)


def test_logits_equal_transformers(models):
    theirs, decoder = models
    samples = text_samples()
    with torch.no_grad():
        logits = hidden_states_of(decoder, samples) @ decoder.lm_head.weight.T
        expected = torch.cat([hf_logits(theirs, sample) for sample in samples])
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_rotary_frequencies_are_the_same_bits(models):
    theirs, decoder = models
    rotary = theirs.model.rotary_emb
    assert torch.equal(decoder.rotary.inverse_frequencies, rotary.inv_freq)
    assert decoder.rotary.scale == rotary.attention_scaling


@pytest.mark.parametrize("recompute", POLICIES)
def test_loss_and_every_gradient_equal_transformers(models, recompute):
    theirs, decoder = models
    decoder.set_recompute(recompute)
    loss, expected = loss_of(decoder, text_samples()), hf_loss_sum(theirs, text_samples())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    for key, part in decoder_parts(decoder.config).items():
        gradient = decoder.get_parameter(part.parameter).grad[part.rows]
        theirs_gradient = theirs.get_parameter(key).grad
        if key.endswith("k_proj.bias"):  # moves all scores of a query: rotation alone leaves some
            assert_same(gradient, theirs_gradient, key, ratio=1e-4)
        else:
            assert_same(gradient, theirs_gradient, key)


def test_training_losses_equal_transformers(models):
    theirs, decoder = models
    histories = []
    for loss_sum, parameters in (
        (lambda: loss_of(decoder, text_samples()), decoder.parameters()),
        (lambda: hf_loss_sum(theirs, text_samples()), theirs.parameters()),
    ):
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        history = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = loss_sum()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        histories.append(history)
    ours, expected = histories
    assert expected[0] - expected[-1] > 1
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=1e-4, atol=0)


def test_last_layer_rows_are_exact(models):
    _, decoder = models
    sample = random_sample(9, seed=1)
    where = decoder.packed_positions(
        torch.arange(9, dtype=torch.int32), torch.tensor([0, 9], dtype=torch.int32), 9
    )
    rows = torch.tensor([1, 4, 8])
    with torch.no_grad():
        some = decoder(sample.input_ids, where, rows=rows)
        everything = decoder(sample.input_ids, where)
    torch.testing.assert_close(some, everything[rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_export_is_the_same_class_bit_for_bit(models, dtype, tmp_path):
    theirs, _ = models
    decoder = load_decoder(tmp_path, dtype)
    export_llama(decoder, tmp_path / "ours")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=dtype
    )
    assert type(loaded) is type(theirs) and not any(info.values()), info
    expected = dict(theirs.to(dtype).named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected.pop(name)), name
    assert not expected
    ignored = {"_name_or_path", "dtype", "head_dim"}
    ours_config, their_config = loaded.config.to_dict(), theirs.config.to_dict()
    differing = {k for k, v in their_config.items() if ours_config.get(k) != v}
    assert differing <= ignored, {k: (ours_config.get(k), their_config[k]) for k in differing}
    assert load_decoder(tmp_path / "ours", dtype).config == decoder.config


def test_scores_of_the_prefix_tree_equal_transformers(models):
    theirs, decoder = models
    first = random_sample(9, seed=1).input_ids
    texts = [torch.cat((first, random_sample(n, seed=n).input_ids)) for n in (3, 5, 7)]
    requests = [
        EncodedRequest(ids[:-1].int().numpy(), ids[len(first) :].int().numpy(), 0) for ids in texts
    ]
    names = [str(i) for i in range(3)]
    scores = run_plan(decoder, make_plan(requests, [0, 1, 2], names, 8), "cpu", progress=False)
    for ids, score in zip(texts, scores, strict=True):
        with torch.no_grad():
            logprobs = theirs(input_ids=ids[None]).logits[0].log_softmax(-1)
        expected = logprobs[:-1].gather(1, ids[1:, None])[len(first) - 1 :].sum().item()
        assert score.loglikelihood == pytest.approx(expected, abs=1e-4)


def test_generation_equals_transformers(models):
    theirs, decoder = models
    prompts = [random_sample(n, seed=n).input_ids for n in (4, 9)]
    llava = Llava(decoder, None, None, TOKENIZER)
    options = GenerationOptions(max_new_tokens=12)
    found = generate(llava, Letters(), [Prompt(ids.tolist()) for ids in prompts], options)
    for ids, generation in zip(prompts, found, strict=True):
        expected = theirs.generate(
            ids[None], max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=2
        )[0, len(ids) :].tolist()
        expected = expected[: expected.index(2)] if 2 in expected else expected
        assert generation.token_ids == expected


def test_lora_equals_peft_and_merges(kind, tmp_path):
    theirs = hf_decoder(kind)
    theirs.save_pretrained(tmp_path)
    decoder, adapted, pairs = adapted_models(tmp_path, theirs)
    loss, expected = loss_of(decoder, text_samples()), hf_loss_sum(adapted, text_samples())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    for a, b, adapter in pairs:
        assert_same(a.grad, adapter.a.grad)
        assert_same(b.grad, adapter.b.grad)
    export_llama(decoder, tmp_path / "merged")
    merge_lora(decoder)
    again = load_decoder(tmp_path / "merged")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, decoder.get_parameter(name)), name
    torch.testing.assert_close(loss_of(decoder, text_samples()), loss, rtol=1e-5, atol=0)
