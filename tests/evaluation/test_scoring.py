"""score_requests against transformers, and what must not change a score."""

import random

import pytest
import torch
from transformers import LlamaForCausalLM

from mmalign.errors import UserError
from mmalign.evaluation.scoring import plan_scoring, score_requests
from mmalign.evaluation.tasks import load_documents
from mmalign.model.hf import load_decoder
from mmalign.model.positions import PathCache
from mmalign.tokenizer import Tokenizer

from .conftest import save_llama
from .test_harness_parity import harness, harness_scores

TASKS = ["truthfulqa_mc1", "truthfulqa_mc2", "ethics_deontology", "ethics_virtue"]


def requests_of(root, limit, tasks=TASKS):
    documents = load_documents(tasks, root, limit)
    return [request for rows in documents.values() for doc in rows for request in doc.requests]


def loglikelihoods(decoder, tokenizer, requests, batch_tokens=2048):
    scores = score_requests(decoder, tokenizer, requests, batch_tokens, progress=False)
    return [score.loglikelihood for score in scores]


def test_one_request_at_a_time_in_transformers(shared_data, llama_folder, decoder, tokenizer):
    model = LlamaForCausalLM.from_pretrained(llama_folder).double().eval()
    requests = requests_of(shared_data, 3)
    expected, num_tokens = [], []
    for context, continuation in requests:
        context_ids = tokenizer.encode(context)
        ids = torch.tensor(
            context_ids + tokenizer.encode(context + continuation)[len(context_ids) :]
        )
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        rows = torch.arange(len(context_ids) - 1, len(ids) - 1)
        expected.append(logprobs[rows, ids[rows + 1]].sum().item())
        num_tokens.append(len(rows))
    scores = score_requests(decoder, tokenizer, requests, 1024, progress=False)
    assert [s.loglikelihood for s in scores] == pytest.approx(expected, abs=2e-4, rel=0)
    assert [score.num_tokens for score in scores] == num_tokens
    assert not any(score.num_truncated for score in scores)


def test_batch_size_and_order_change_nothing(shared_data, decoder, tokenizer):
    requests = requests_of(shared_data, 8)
    expected = loglikelihoods(decoder, tokenizer, requests)
    for batch_tokens in (17, 500, 100_000):
        ours = loglikelihoods(decoder, tokenizer, requests, batch_tokens)
        assert ours == pytest.approx(expected, abs=1e-4, rel=0)
    order = random.Random(0).sample(range(len(requests)), len(requests))
    shuffled = loglikelihoods(decoder, tokenizer, [requests[i] for i in order])
    assert shuffled == [expected[i] for i in order]  # the same batches: the same bits


def test_memory_is_as_stated(shared_data, llama_folder, decoder, tokenizer):
    requests = requests_of(shared_data, 20)
    plan = plan_scoring(tokenizer, requests, 2048, 32000, batch_tokens=700, progress=False)
    assert all(batch.end - batch.begin == 700 for batch in plan.batches[:-1])
    longest = max(len(request.input_ids) for request in plan.encoded)
    assert plan.path_rows < longest and plan.workspace_rows <= plan.path_rows + 700
    # keys and values of 2 heads of 16 columns in fp32: paths in 2 layers, a batch in one
    stated = plan.cache_bytes(decoder.config, torch.float32)
    assert stated == 2 * 2 * 16 * 4 * (2 * plan.path_rows + plan.workspace_rows)
    cache = PathCache(decoder.config, plan.path_rows, plan.workspace_rows, torch.empty(0))
    held = [x for part in (*cache.paths, cache.workspace) for x in (part.keys, part.values)]
    assert stated == sum(x.nbytes for x in held)


def test_tokens_are_shared(shared_data, decoder, tokenizer):
    """Fixed answers cost little beyond the document; mc1 choices in mc2 cost nothing."""
    requests = requests_of(shared_data, 10, ["ethics_deontology", "ethics_virtue"])
    plan = plan_scoring(tokenizer, requests, 2048, 32000, 2048, progress=False)
    contexts = {context: len(tokenizer.encode(context)) for context, _ in requests}
    assert len(requests) == 2 * len(contexts)
    assert plan.num_tokens <= sum(contexts.values()) + 2 * 10  # " unreasonable" has three tokens
    twice = requests_of(shared_data, 10, TASKS[:2])
    assert len(twice) > len(set(twice))
    counts = [
        plan_scoring(tokenizer, x, 2048, 32000, 2048, progress=False).num_tokens
        for x in (twice, list(set(twice)))
    ]
    assert counts[0] == counts[1]
    alone = [loglikelihoods(decoder, tokenizer, [request])[0] for request in requests]
    together = loglikelihoods(decoder, tokenizer, requests)
    assert together == pytest.approx(alone, abs=1e-4, rel=0)


@pytest.mark.parametrize("heads, head_dim", (((4, 1), 32), ((2, 2), 100)), ids=str)
def test_head_shapes_against_transformers(
    tmp_path, shared_data, tokenizer_model, tokenizer, heads, head_dim
):
    """Grouped-query attention and OpenLLaMA-3B's head_dim, through many small batches."""
    names = ("num_attention_heads", "num_key_value_heads")
    folder = save_llama(
        tmp_path, tokenizer_model, seed=2, head_dim=head_dim, **dict(zip(names, heads, strict=True))
    )
    requests = requests_of(shared_data, 2, TASKS[1:3])
    theirs = harness_scores(harness(folder, tokenizer_model), requests)
    ours = loglikelihoods(load_decoder(folder), tokenizer, requests, batch_tokens=90)
    assert ours == pytest.approx(theirs, abs=1e-4, rel=0)


def test_equal_requests_get_the_very_same_score(decoder, tokenizer):
    request = ("Q: What is it?\nA:", " It is a test.")
    scores = loglikelihoods(decoder, tokenizer, [request, ("Other:", " yes"), request], 64)
    assert scores[0] == scores[2] != scores[1]


@pytest.mark.parametrize("context", ["", "The answer: ", "No blank,"])
def test_the_seam_of_context_and_continuation(
    llama_folder, tokenizer_model, decoder, tokenizer, context
):
    requests = [(context, "yes"), (context, "maybe so")]
    theirs = harness_scores(harness(llama_folder, tokenizer_model), requests)
    assert loglikelihoods(decoder, tokenizer, requests) == pytest.approx(theirs, abs=1e-4, rel=0)


def test_long_contexts_lose_their_left_end(tmp_path, tokenizer_model):
    folder = save_llama(tmp_path, tokenizer_model, seed=3, max_position_embeddings=24)
    tokenizer, decoder = Tokenizer.from_pretrained(folder), load_decoder(folder)
    requests = [
        ("one two three four five six seven eight nine ten " * k, "eleven") for k in (1, 3, 9)
    ]
    scores = score_requests(decoder, tokenizer, requests, 64, progress=False)
    theirs = harness_scores(harness(folder, tokenizer_model), requests)
    assert [s.loglikelihood for s in scores] == pytest.approx(theirs, abs=1e-4, rel=0)
    lengths = [len(tokenizer.encode(context + "eleven")) for context, _ in requests]
    assert [s.num_truncated for s in scores] == [max(0, length - 25) for length in lengths]
    assert scores[0].num_truncated == 0 < scores[1].num_truncated < scores[2].num_truncated
    with pytest.raises(UserError, match=r"request 0: the continuation .* is \d+ tokens.*1 to 24"):
        score_requests(decoder, tokenizer, [("a", " b" * 30)], 64, progress=False)


# ---- bad input ----


def test_empty_continuation(decoder, tokenizer):
    with pytest.raises(UserError, match="virtue document 3: the continuation is empty"):
        score_requests(
            decoder, tokenizer, [("a", "")], 64, progress=False, names=["virtue document 3"]
        )


@pytest.mark.parametrize("batch_tokens", (1, 2, 4, 64))
def test_nan_names_the_document(llama_folder, tokenizer, batch_tokens):
    """Whichever documents share the batch of the broken one, or lie before it."""
    decoder = load_decoder(llama_folder)
    rare = tokenizer.encode("zebra")[-1]
    with torch.no_grad():
        decoder.embed_tokens.weight[rare] = float("nan")
    names = ["document a", "document b"]
    requests = [("A horse", " runs"), ("A zebra", " runs")]
    with pytest.raises(UserError, match="document b: .*log-likelihood of nan"):
        score_requests(decoder, tokenizer, requests, batch_tokens, progress=False, names=names)


def test_tokenizer_of_another_model(tmp_path, tokenizer_model, tokenizer):
    decoder = load_decoder(save_llama(tmp_path, tokenizer_model, seed=0, vocab_size=300))
    with pytest.raises(UserError, match="the tokenizer gives id .*vocabulary has 300"):
        score_requests(decoder, tokenizer, [("Some", " words")], 64, progress=False)


def test_training_mode_is_given_back(decoder, tokenizer):
    decoder.train()
    score_requests(decoder, tokenizer, [("a", " b")], 64, progress=False)
    assert decoder.training
    decoder.eval()
