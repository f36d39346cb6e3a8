"""The shared prompt header, with which all samples start, and batches without it."""

import numpy as np
import pytest
import torch

from mmalign.batch import IGNORE_INDEX
from mmalign.data.check import check_samples
from mmalign.data.dataset import EncodedSample
from mmalign.data.loader import StepLoader
from mmalign.data.packing import pack_samples
from mmalign.errors import UserError

from .conftest import World


def longest_common_start(dataset, indices) -> list[int]:
    start = []
    for column in zip(*(dataset.encode(int(i)).input_ids.tolist() for i in indices), strict=False):
        if len(set(column)) > 1:
            break
        start.append(column[0])
    return start


@pytest.mark.parametrize("template", ["v0", "v1", "llava_llama_2"])
def test_prefix_is_what_all_samples_start_with(world: World, template):
    dataset = world.dataset(template=template)
    report = check_samples(dataset, num_workers=0, progress=False)
    assert report.prefix.tolist() == longest_common_start(dataset, report.kept)
    assert len(report.prefix) > 8


@pytest.mark.parametrize("use_im_start_end", [True, False])
def test_prefix_ends_before_anything_of_an_image(world: World, use_im_start_end):
    world.samples = [sample for sample in world.samples if "image" in sample]
    dataset = world.dataset(template="v1", use_im_start_end=use_im_start_end)
    report = check_samples(dataset, num_workers=0, progress=False)
    tokenizer = dataset.tokenizer
    first = tokenizer.im_start_id if use_im_start_end else tokenizer.image_token_id
    for index in report.kept:
        assert dataset.encode(int(index)).input_ids[len(report.prefix)] == first


def test_bare_captions_share_the_first_token_alone(world: World):
    world.samples = [sample for sample in world.samples if "image" in sample]
    for sample in world.samples:
        sample["conversations"] = sample["conversations"][:2]
    report = check_samples(world.dataset(template="plain"), num_workers=0, progress=False)
    assert report.prefix.tolist() == [1]


def test_same_samples_keep_their_first_target_and_a_row(world: World):
    """A prefix never reaches a row that has a target, however much the samples agree."""
    world.samples = [world.samples[1] | {"id": str(i), "image": None} for i in range(3)]
    for sample in world.samples:
        sample["conversations"] = [
            {"from": "human", "value": "what is it"},
            {"from": "gpt", "value": "red"},
        ]
    dataset = world.dataset(template="v1")
    report = check_samples(dataset, num_workers=0, progress=False)
    labels = dataset.encode(0).labels
    first_target = int(np.flatnonzero(labels != IGNORE_INDEX)[0])
    assert len(report.prefix) == first_target - 1


def test_prefix_does_not_depend_on_processes_or_the_cache(world: World, tmp_path):
    dataset = world.dataset(template="v1")
    alone = check_samples(dataset, num_workers=0, progress=False)
    for _ in range(2):
        again = check_samples(dataset, tmp_path / "check.npz", num_workers=0, progress=False)
        assert again.prefix.tolist() == alone.prefix.tolist()


def test_skipped_samples_have_no_say(world: World):
    dataset = world.dataset(template="v1", on_bad_sample="skip")
    expected = check_samples(dataset, num_workers=0, progress=False).prefix
    world.samples.append({"id": "bad", "conversations": [], "image": None})
    dataset = world.dataset(template="v1", on_bad_sample="skip")
    report = check_samples(dataset, num_workers=0, progress=False)
    assert len(report.skipped) == 1 and report.prefix.tolist() == expected.tolist()


def test_packing_leaves_the_prefix_out():
    rng = np.random.default_rng(0)
    samples = []
    for length in (9, 5, 12):
        ids = rng.integers(3, 90, length).astype(np.int32)
        labels = np.where(np.arange(length) > 4, ids, IGNORE_INDEX).astype(np.int32)
        samples.append(EncodedSample("x", ids, labels, (), 0))
    whole, ours = (pack_samples(samples, [None] * 3, 99, length) for length in (0, 4))
    rows = whole.position_ids >= 4
    for name in ("input_ids", "target_ids", "position_ids"):
        assert torch.equal(getattr(ours, name), getattr(whole, name)[rows]), name
    assert ours.cu_seqlens.tolist() == [0, 5, 6, 14] and ours.max_seqlen == 8
    assert ours.num_loss_tokens == whole.num_loss_tokens
    assert (ours.prefix_length, whole.prefix_length) == (4, 0)


def test_steps_hold_the_same_samples_in_fewer_micro_batches(world: World):
    dataset = world.dataset(template="v1", num_workers=0)
    report = check_samples(dataset, num_workers=0, progress=False)
    length = len(report.prefix)
    settings = dict(global_batch_size=6, micro_batch_tokens=400, seed=1, num_steps=3)
    whole = list(StepLoader(dataset, report, **settings))
    ours = list(StepLoader(dataset, report, **settings, prefix_length=length))
    for a, b in zip(whole, ours, strict=True):
        assert (a.sample_ids, a.num_tokens) == (b.sample_ids, b.num_tokens)
        assert len(b.batches) < len(a.batches)
        assert max(len(batch.input_ids) for batch in b.batches) <= 400
        # the same rows, in other micro-batches
        kept = [x.input_ids[x.position_ids >= length] for x in a.batches]
        rows = torch.cat(kept).sort().values, torch.cat([x.input_ids for x in b.batches])
        assert torch.equal(rows[0], rows[1].sort().values)


def test_the_longest_sample_needs_room_for_its_rows_alone(world: World):
    dataset = world.dataset(template="v1", num_workers=0)
    report = check_samples(dataset, num_workers=0, progress=False)
    length = len(report.prefix)
    settings = dict(global_batch_size=2, seed=1, num_steps=1, prefix_length=length)
    rows = int(report.lengths.max()) - length
    StepLoader(dataset, report, micro_batch_tokens=rows, **settings)
    with pytest.raises(
        UserError, match=f"{rows} tokens after the shared header of {length} tokens"
    ):
        StepLoader(dataset, report, micro_batch_tokens=rows - 1, **settings)
