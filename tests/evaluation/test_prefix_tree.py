"""The tree of shared prefixes and its batches, against sets of prefixes and dense masks."""

import numpy as np
import pytest

from mmalign.evaluation.prefix_tree import build_tree, cut_batches
from mmalign.evaluation.scoring import plan_scoring
from mmalign.evaluation.tasks import load_documents, resolve_tasks

WORDS = ["a", "ab", "abc", "abd", "abdef", "abdef", "xyz", "x", "ab"]
WORD_TOKENS = ["a", "b", "c", "d", "e", "f", "x", "y", "z"]  # depth first


def sequences(words):
    return [np.array([ord(letter) for letter in word], np.int32) for word in words]


def random_sequences(seed):
    generator = np.random.default_rng(seed)
    few = [generator.integers(0, 3, generator.integers(1, 30)) for _ in range(60)]
    tails = [generator.integers(0, 40000, generator.integers(1, 9)) for _ in range(60)]
    return [np.concatenate(pair) for pair in zip(few, tails, strict=True)] + few


def prefixes(sequence):
    return [tuple(sequence[: i + 1].tolist()) for i in range(len(sequence))]


def test_by_hand():
    tree = build_tree(sequences(WORDS))
    assert "".join(map(chr, tree.tokens)) == "".join(WORD_TOKENS)
    assert tree.parents.tolist() == [-1, 0, 1, 1, 3, 4, -1, 6, 7]
    assert tree.depths.tolist() == [0, 1, 2, 2, 3, 4, 0, 1, 2]
    assert tree.segment_begins.tolist() == [0, 2, 3, 6]  # ab, c, def, xyz
    assert tree.paths[4].tolist() == tree.paths[5].tolist() == [0, 1, 3, 4, 5]
    first, second = cut_batches(tree, 5)
    assert (first.begin, first.end, second.begin, second.end) == (0, 5, 5, 9)
    assert first.cu_seqlens.tolist() == [0, 2, 3, 5]
    assert first.cu_spans.tolist() == [0, 1, 2, 4]
    spans = list(zip(first.span_begins.tolist(), first.span_ends.tolist(), strict=True))
    assert spans == [(0, 2), (0, 3), (0, 2), (3, 5)]  # ab and c are adjacent
    assert first.next_rows.tolist() == [0, 1, 3, 4] and first.next_depth == 0  # a b d e, then f
    assert second.num_kept == 4 and second.cu_seqlens.tolist() == [0, 1, 4]
    spans = list(zip(second.span_begins.tolist(), second.span_ends.tolist(), strict=True))
    assert spans == [(0, 5), (5, 8)]


@pytest.mark.parametrize("seed", range(3))
def test_every_prefix_is_one_token(seed):
    given = random_sequences(seed)
    tree = build_tree(given)
    assert len(tree.tokens) == len({prefix for x in given for prefix in prefixes(x)})
    for sequence, path in zip(given, tree.paths, strict=True):
        assert tree.tokens[path].tolist() == sequence.tolist()
        assert tree.parents[path].tolist() == [-1, *path[:-1]]
        assert tree.depths[path].tolist() == list(range(len(path)))
    after: dict[int, list[int]] = {}
    for token, parent in enumerate(tree.parents.tolist()):
        after.setdefault(parent, []).append(token)
    begins = {
        x for parent, children in after.items() if parent < 0 or children[1:] for x in children
    }
    assert tree.segment_begins.tolist() == sorted(begins)  # roots, and wherever the tree branches


@pytest.mark.parametrize("batch_tokens", (1, 7, 100, 10_000))
def test_what_each_token_sees(batch_tokens):
    """Batches through a simulated cache of token numbers: each token sees its path and itself."""
    tree = build_tree(random_sequences(9))
    path_rows = [-1] * 64
    batches = cut_batches(tree, batch_tokens)
    assert [b.begin for b in batches] == list(range(0, len(tree.tokens), batch_tokens))
    assert batches[-1].end == len(tree.tokens)
    for batch in batches:
        own = list(range(batch.begin, batch.end))
        cache = path_rows[: batch.num_kept] + own
        for i, begin in enumerate(batch.cu_seqlens[:-1]):
            end = batch.cu_seqlens[i + 1]
            spans = range(batch.cu_spans[i], batch.cu_spans[i + 1])
            rows = [cache[batch.span_begins[j] : batch.span_ends[j]] for j in spans]
            for offset in range(end - begin):
                seen = sum(rows[:-1], []) + rows[-1][: len(rows[-1]) - (end - begin) + offset + 1]
                token = own[begin + offset]
                assert seen[-1] == token and seen[0] >= 0
                assert tree.parents[seen].tolist() == [-1, *seen[:-1]]
        for i, row in enumerate(batch.next_rows):
            path_rows[batch.next_depth + i] = cache[row]


def test_nothing():
    tree = build_tree([])
    assert len(tree.tokens) == 0 and cut_batches(tree, 8) == []


COMPLETE = {  # requests, tokens of the tree, of lm-evaluation-harness's backend, longest input
    "truthfulqa": (9996, 58983, 1242477, 263),
    "ethics": (39936, 1229878, 1921428, 1511),
}


@pytest.mark.parametrize("tasks", COMPLETE)
def test_tokens_of_the_complete_sets(shared_data, tokenizer, tasks):
    """Each prompt and each question once; what the harness computes beside it."""
    num_requests, num_tokens, num_tokens_harness, longest = COMPLETE[tasks]
    documents = load_documents(resolve_tasks([tasks]), shared_data)
    requests = [x for rows in documents.values() for document in rows for x in document.requests]
    plan = plan_scoring(tokenizer, requests, 2048, 32000, 8192, progress=False)
    assert (len(requests), plan.num_tokens) == (num_requests, num_tokens)
    assert plan.num_tokens_harness == num_tokens_harness
    assert len(plan.batches) == -(-num_tokens // 8192)
    assert plan.path_rows <= longest and plan.workspace_rows <= longest + 8192
