"""Generation against transformers' generate: tokens, stop strings, images."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from mmalign.errors import UserError
from mmalign.model import generation_cache
from mmalign.model.decoder import Decoder
from mmalign.model.generate import GenerationOptions, Prompt, generate
from tests.model.tiny import (
    END,
    SHAPES,
    TOKENIZER,
    Letters,
    hf_llava,
    hf_pixels,
    mixed_samples,
    ours,
    random_sample,
)


class Case:
    def __init__(self, folder, **shape):
        self.hf = hf_llava(**shape)
        self.llava = ours(self.hf, folder)

    def theirs(self, sample, max_new_tokens: int) -> list[int]:
        """transformers alone on the sample, up to the end-of-text token."""
        images = {"pixel_values": hf_pixels(sample.pixels)} if len(sample.pixels) else {}
        ids = self.hf.generate(
            input_ids=sample.input_ids[None],
            attention_mask=torch.ones_like(sample.input_ids)[None],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=0,
            **images,
        )[0, len(sample.input_ids) :].tolist()
        return ids[: ids.index(END)] if END in ids else ids

    def ours(self, samples, **options) -> list[list[int]]:
        found = run(self.llava, samples, **options)
        return [generation.token_ids for generation in found]


def prompt_of(sample) -> Prompt:
    return Prompt(sample.input_ids.tolist(), sample.pixels if len(sample.pixels) else None)


def run(llava, samples, cache_tokens=16384, on_text=lambda index, text: None, **options):
    prompts = [prompt_of(sample) for sample in samples]
    options = GenerationOptions(**{"max_new_tokens": 20, **options})
    return generate(llava, Letters(), prompts, options, cache_tokens, on_text)


@pytest.fixture(scope="module", params=SHAPES)
def any_case(request, tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("llava"), **SHAPES[request.param])


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("llava"), **SHAPES["grouped-query"])


@pytest.mark.parametrize("cache_tokens", [16384, 60])
def test_greedy_tokens_of_mixed_prompts(any_case, cache_tokens):
    samples = mixed_samples()
    expected = [any_case.theirs(sample, 20) for sample in samples]
    assert any_case.ours(samples, cache_tokens=cache_tokens) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_greedy_tokens_on_a_gpu(any_case):
    samples = mixed_samples()
    expected = [any_case.theirs(sample, 8) for sample in samples]
    found = run(deepcopy(any_case.llava).cuda(), samples, max_new_tokens=8)
    assert [generation.token_ids for generation in found] == expected


@pytest.mark.parametrize("prompt_pass", [8192, 30])
def test_shared_prefix_is_computed_once(case, monkeypatch, prompt_pass):
    monkeypatch.setattr(generation_cache, "_PROMPT_PASS", prompt_pass)
    seen = []
    forward = Decoder.forward

    def counting(decoder, input_ids, *rest):
        seen.append(len(input_ids))
        return forward(decoder, input_ids, *rest)

    monkeypatch.setattr(Decoder, "forward", counting)
    first = random_sample(70, seed=5)
    prefix = first.input_ids[:66]
    samples = [first] + [
        replace(x, input_ids=torch.cat([prefix, x.input_ids]))
        for x in (random_sample(length, seed=length) for length in (3, 12, 1))
    ]
    expected = [case.theirs(sample, 6) for sample in samples]
    assert case.ours(samples, max_new_tokens=6) == expected
    num_tokens = 66 + 4 + 3 + 12 + 1  # then, in every step, one of each that still runs
    assert sum(seen) == num_tokens + sum(min(len(ids), 5) for ids in expected)


def test_equal_tokens_behind_different_images(case):
    samples = [
        replace(random_sample(9, 1, seed=1), pixels=random_sample(1, 1, seed=i).pixels)
        for i in range(3)
    ]
    expected = [case.theirs(sample, 8) for sample in samples]
    assert len(set(map(tuple, expected))) > 1
    assert case.ours(samples, max_new_tokens=8) == expected


def questions_about_pictures(num_pictures: int, num_questions: int) -> list:
    """Samples: a prefix, a picture, and questions of different length; interleaved."""
    prefix = random_sample(6, seed=99).input_ids
    samples = []
    for question in range(num_questions):
        for picture in range(num_pictures):
            image = random_sample(1, 1, seed=picture)
            tail = random_sample(1 + (question * 5 + picture) % 7, seed=100 * picture + question)
            ids = torch.cat([prefix, image.input_ids, tail.input_ids])
            samples.append(replace(image, input_ids=ids))
    return samples


def shared_prompts(samples, num_pictures: int) -> list[Prompt]:
    """One tensor for each picture."""
    return [
        Prompt(x.input_ids.tolist(), samples[i % num_pictures].pixels)
        for i, x in enumerate(samples)
    ]


@pytest.mark.parametrize("cache_tokens", [16384, 200])
def test_questions_share_their_picture(case, monkeypatch, cache_tokens):
    """200 questions about 40 pictures equal transformers', one question at a time."""
    samples = questions_about_pictures(40, 5)
    tower, images = case.llava.vision_tower.forward, []
    monkeypatch.setattr(
        case.llava.vision_tower,
        "forward",
        lambda pixels: images.append(len(pixels)) or tower(pixels),
    )
    options = GenerationOptions(max_new_tokens=5)
    found = generate(case.llava, Letters(), shared_prompts(samples, 40), options, cache_tokens)
    assert [x.token_ids for x in found] == [case.theirs(sample, 5) for sample in samples]
    assert sum(images) == 40 if cache_tokens > 1000 else sum(images) < 80


def test_rows_of_a_picture_are_computed_once(case, monkeypatch):
    seen, forward = [], Decoder.forward

    def counting(decoder, input_ids, *rest):
        seen.append(len(input_ids))
        return forward(decoder, input_ids, *rest)

    monkeypatch.setattr(Decoder, "forward", counting)
    samples = questions_about_pictures(3, 4)
    prompts = shared_prompts(samples, 3)
    generate(case.llava, Letters(), prompts, GenerationOptions(max_new_tokens=1))
    alone = sum(len(x.input_ids) for x in samples)
    num_prefix, num_image = 6, len(samples[0].input_ids) - 6 - 1
    tails = alone - 12 * (num_prefix + num_image)
    assert sum(seen) <= num_prefix + 3 * num_image + tails
    assert sum(seen) < alone / 2


def test_prompts_that_end_with_their_picture(case):
    image = random_sample(0, 1, seed=3)
    sample = replace(image, input_ids=image.input_ids[:-1])  # without <im_end>
    assert sample.input_ids[-1] == TOKENIZER.image_token_id
    samples = [sample] * 2
    found = generate(
        case.llava, Letters(), shared_prompts(samples, 1), GenerationOptions(max_new_tokens=4)
    )
    assert [x.token_ids for x in found] == [case.theirs(sample, 4) for sample in samples]


def test_log_probabilities_of_the_first_token(case):
    samples = questions_about_pictures(2, 3)
    watch = [5, 17, 60]
    options = GenerationOptions(max_new_tokens=1)
    found = generate(case.llava, Letters(), shared_prompts(samples, 2), options, watch=watch)
    for sample, generation in zip(samples, found, strict=True):
        with torch.no_grad():
            logits = case.hf(
                input_ids=sample.input_ids[None], pixel_values=hf_pixels(sample.pixels)
            ).logits[0, -1]
        expected = logits.log_softmax(0)[watch]
        torch.testing.assert_close(torch.tensor(generation.first_logprobs), expected)


def test_draws_belong_to_the_prompt(case):
    """A part of a list draws what the whole list draws."""
    samples = [random_sample(length, seed=length) for length in (9, 5, 14)]
    options = GenerationOptions(max_new_tokens=8, temperature=1.0, seed=3)
    whole = generate(case.llava, Letters(), [prompt_of(x) for x in samples], options)
    part = replace(prompt_of(samples[2]), draws=2)
    assert generate(case.llava, Letters(), [part], options)[0] == whole[2]


def test_sampling_is_reproducible_and_independent_of_the_batch(case):
    samples = [random_sample(length, seed=length) for length in (9, 5, 14)] * 2
    options = dict(temperature=1.0, top_p=0.95, seed=3)
    found = case.ours(samples, **options)
    assert case.ours(samples, **options) == found
    assert case.ours(samples, cache_tokens=1, **options) == found
    assert case.ours(samples, **options | {"seed": 4}) != found
    assert found[:3] != found[3:]  # equal prompts, other draws


def test_stop_strings_end_a_sequence_and_leave_the_others(case):
    samples = mixed_samples()
    free = [Letters().decode(ids) for ids in case.ours(samples)]
    stop = (free[0][4:6], free[3][1:3])
    pieces = {i: "" for i in range(len(samples))}

    def on_text(index, text):
        pieces[index] += text

    found = run(case.llava, samples, stop=stop, on_text=on_text)
    for index, (text, generation) in enumerate(zip(free, found, strict=True)):
        ends = [text.find(term) for term in stop if term in text]
        assert generation.text == (text[: min(ends)] if ends else text)
        assert pieces[index] == generation.text
        assert (generation.reason == "stop") == bool(ends)
    assert found[0].reason == found[3].reason == "stop"


def test_generation_config_says_what_ends_an_answer(case, tmp_path):
    """As in Qwen2.5-Instruct, which also ends at a token that its config.json does not name."""
    sample, hf = random_sample(9), deepcopy(case.hf)
    third = case.ours([sample])[0][2]
    hf.generation_config.eos_token_id = [END, third]
    hf.save_pretrained(tmp_path)
    theirs = hf.generate(sample.input_ids[None], max_new_tokens=20, do_sample=False, pad_token_id=0)
    (generation,) = run(ours(hf, tmp_path), [sample])
    assert generation.reason == "end"
    assert [*generation.token_ids, third] == theirs[0, len(sample.input_ids) :].tolist()


def test_end_of_text_and_length_are_told_apart(case):
    reasons = {len(x.token_ids): x.reason for x in run(case.llava, mixed_samples())}
    assert reasons[20] == "length"
    assert {reason for length, reason in reasons.items() if length < 20} == {"end"}


BAD_OPTIONS = [("max_new_tokens", 0), ("top_k", -1), ("top_p", 0.0), ("top_p", math.nan)]
BAD_OPTIONS += [("temperature", x) for x in (-1.0, 1e-300, math.inf, math.nan)] + [("seed", -1)]


@pytest.mark.parametrize("name, value", BAD_OPTIONS)
def test_bad_options(name, value):
    with pytest.raises(UserError, match=f"{name} is {value}; expected"):
        GenerationOptions(**{name: value})


def test_bad_prompts_and_broken_weights(case, tmp_path):
    def fails(prompt, message):
        with pytest.raises(UserError, match=message):
            generate(case.llava, Letters(), [Prompt([5]), prompt], GenerationOptions())

    image = random_sample(4, 1)
    fails(Prompt([]), "prompt 1 is empty")
    fails(Prompt([5, 103]), "token 103, but the model's vocabulary has 103")
    fails(Prompt([5, 6], image.pixels), "need 4 image tokens, it holds 0")
    broken = Case(tmp_path, **SHAPES["tied"]).llava
    broken.decoder.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="logits that are not finite"):
        run(broken, [image])
    broken.vision_tower = None
    with pytest.raises(UserError, match="no vision tower"):
        run(broken, [image])
