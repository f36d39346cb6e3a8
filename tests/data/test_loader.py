"""Which samples a step takes, and that every way of loading gives the same batches."""

from itertools import islice

import numpy as np
import pytest
import torch

from mmalign.data.check import CheckReport, check_samples
from mmalign.data.loader import Step, StepLoader, StepPlan, num_steps_of
from mmalign.errors import SampleError, UserError


def load(world, start_step=0, num_steps=7, **options) -> list[Step]:
    names = ("global_batch_size", "micro_batch_tokens", "seed", "rank", "world_size", "num_workers")
    settings = {name: options.pop(name) for name in names if name in options}
    require_images = options.pop("require_images", False)
    dataset = world.dataset(**options)
    report = check_samples(dataset, num_workers=0, progress=False)
    loader = StepLoader(
        dataset,
        report,
        **{"global_batch_size": 6, "micro_batch_tokens": 400, "seed": 3, **settings},
        num_steps=num_steps,
        start_step=start_step,
        require_images=require_images,
    )
    steps = list(loader)
    assert len(loader) == len(steps) == max(0, num_steps - start_step)
    return steps


def assert_same(a: list[Step], b: list[Step]) -> None:
    assert len(a) == len(b)
    for ours, theirs in zip(a, b, strict=True):
        assert ours.index == theirs.index and ours.sample_ids == theirs.sample_ids
        assert ours.num_loss_tokens == theirs.num_loss_tokens
        assert len(ours.batches) == len(theirs.batches)
        for x, y in zip(ours.batches, theirs.batches, strict=True):
            for name, value in vars(x).items():
                other = getattr(y, name)
                same = torch.equal(value, other) if torch.is_tensor(value) else value == other
                assert same, name


# ---- the plan ----


def test_steps_are_slices_of_endless_epochs():
    plan = StepPlan(num_samples=10, global_batch_size=4, seed=0, shuffle=True)
    order = np.concatenate([plan.samples_of_step(step) for step in range(15)])
    assert len(order) == 60
    epochs = order.reshape(6, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    other = StepPlan(10, 4, seed=1, shuffle=True)
    assert other.samples_of_step(0).tolist() != plan.samples_of_step(0).tolist()
    in_order = StepPlan(10, 4, seed=0, shuffle=False)
    assert in_order.samples_of_step(2).tolist() == [8, 9, 0, 1]


def test_the_order_does_not_depend_on_the_batch_size():
    small, large = (StepPlan(10, size, seed=5, shuffle=True) for size in (5, 15))
    first = [small.samples_of_step(step).tolist() for step in range(3)]
    assert sum(first, []) == large.samples_of_step(0).tolist()


def test_a_batch_larger_than_the_data_wraps():
    plan = StepPlan(num_samples=3, global_batch_size=8, seed=0, shuffle=False)
    assert plan.samples_of_step(1).tolist() == [2, 0, 1, 2, 0, 1, 2, 0]


def test_a_step_with_samples_more_than_once_is_said_or_refused(world, caplog):
    load(world, num_steps=1, global_batch_size=20)
    assert not caplog.text
    load(world, num_steps=1, global_batch_size=21)
    assert "--global-batch-size 21 is more than the 20 usable samples" in caplog.text
    with pytest.raises(UserError, match="--global-batch-size 1000000000 is more than the 20 us"):
        load(world, num_steps=1, global_batch_size=10**9)  # before anything of that size


def test_number_of_steps_is_that_of_the_recipe():
    assert num_steps_of(80_000, 32, 1.0) == 2500
    assert num_steps_of(595_375, 128, 1.0) == 4652  # the last step takes 49 of a second epoch
    assert num_steps_of(100, 32, 0.5) == 2 and num_steps_of(3, 32, 1.0) == 1


# ---- loading ----


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(world, num_workers):
    expected = load(world)
    assert len({len(step.batches) for step in expected}) > 1  # several a step, not always as many
    assert_same(load(world, num_workers=num_workers), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_continues_at_any_step_with_the_same_batches(world, num_workers):
    expected = load(world, num_workers=num_workers)
    for start_step in (1, 3, 6, 7):
        continued = load(world, start_step, num_workers=num_workers)
        assert_same(continued, expected[start_step:])


def test_leaving_in_the_middle_and_starting_again(world):
    dataset = world.dataset()
    report = check_samples(dataset, num_workers=0, progress=False)
    sizes = {"global_batch_size": 6, "micro_batch_tokens": 400, "seed": 3, "num_steps": 7}
    loader = StepLoader(dataset, report, **sizes, num_workers=2)
    assert_same(list(islice(loader, 2)), load(world)[:2])
    assert_same(list(loader), load(world))


def test_the_global_generator_is_left_alone(world):
    for num_workers in (0, 1):
        torch.manual_seed(0)
        expected = torch.get_rng_state()
        load(world, num_steps=2, num_workers=num_workers)
        assert torch.equal(torch.get_rng_state(), expected)


def test_a_step_holds_exactly_its_samples(world):
    dataset = world.dataset()
    report = check_samples(dataset, num_workers=0, progress=False)
    lengths = {f"sample-{i}": report.lengths[i] for i in range(20)}
    for step in load(world, shuffle=False, num_steps=4):
        places = [i % 20 for i in range(step.index * 6, step.index * 6 + 6)]
        assert step.sample_ids == [f"sample-{i}" for i in places]
        found = sorted(n for b in step.batches for n in b.cu_seqlens.diff().tolist())
        assert found == sorted(lengths[i] for i in step.sample_ids)
        assert step.num_tokens == sum(lengths[i] for i in step.sample_ids)
        assert step.num_loss_tokens == report.num_loss_tokens[places].sum()
        assert step.num_loss_tokens == sum(batch.num_loss_tokens for batch in step.batches)
        assert all(len(batch.input_ids) <= 400 for batch in step.batches)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_step_of_one_process(world, world_size):
    alone = load(world)
    ranks = [load(world, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, *shares in zip(alone, *ranks, strict=True):
        for share in shares:
            assert share.sample_ids == step.sample_ids
            assert share.num_loss_tokens == step.num_loss_tokens
            assert len(share.batches) == len(shares[0].batches) > 0
        batches = [batch for share in shares for batch in share.batches]
        assert sum(batch.num_loss_tokens for batch in batches) == step.num_loss_tokens
        assert sorted(rows(batches)) == sorted(rows(step.batches))


def rows(batches) -> list[tuple]:
    return [
        (tuple(ids.tolist()), tuple(targets.tolist()))
        for batch in batches
        for ids, targets in zip(
            batch.input_ids.split(batch.cu_seqlens.diff().tolist()),
            batch.target_ids.split(batch.cu_seqlens.diff().tolist()),
            strict=True,
        )
    ]


def test_skipped_samples_never_come(world):
    world.samples[5]["conversations"][1]["value"] = ""
    steps = load(world, on_bad_sample="skip", num_steps=19)
    assert {i for step in steps for i in step.sample_ids} == {
        f"sample-{i}" for i in range(20) if i != 5
    }


def test_a_sample_longer_than_a_micro_batch_is_named_before_the_first_step(world):
    world.samples[7]["conversations"][1]["value"] = "boat " * 500
    with pytest.raises(UserError, match=r"'sample-7' has \d+ tokens, more than --micro-batch-tok"):
        load(world)


def test_a_global_batch_that_the_ranks_cannot_share(world):
    with pytest.raises(UserError, match="cannot feed 3 processes"):
        load(world, global_batch_size=2, world_size=3)


def test_a_step_without_images_is_refused_where_only_images_train(world):
    assert load(world, shuffle=False, global_batch_size=2, require_images=True)
    with pytest.raises(UserError, match="step 4 .*'sample-4'.* has no image, so nothing to train"):
        load(world, shuffle=False, global_batch_size=1, start_step=1, require_images=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_vanishes_during_the_run_names_its_sample(world, num_workers):
    dataset = world.dataset(shuffle=False)
    report: CheckReport = check_samples(dataset, num_workers=0, progress=False)
    (world.root / "images/9.png").unlink()
    loader = StepLoader(
        dataset, report, global_batch_size=4, micro_batch_tokens=2000, seed=0, num_steps=5,
        num_workers=num_workers,
    )  # fmt: skip
    seen = []
    with pytest.raises(SampleError, match="sample 'sample-9': no file .*9.png") as caught:
        for step in loader:
            seen.append(step.index)
    assert seen == [0, 1] and caught.value.sample_id == "sample-9"
