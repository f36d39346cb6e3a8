"""Settings that nothing reads: refused where the user wrote them, accepted where a recipe did."""

import logging
from dataclasses import replace

import pytest

from mmalign.errors import UserError
from mmalign.recipes import RECIPES
from mmalign.training.unused import options_in, refuse_unused

TINY = RECIPES["tiny-finetune"][1]
TEXT_ONLY = RECIPES["tiny-finetune-text-only"][1]  # with the toy world's tower and image root


@pytest.mark.parametrize(
    "config, argument",
    [
        (TEXT_ONLY, "--model.projector"),
        (TEXT_ONLY, "--data.image_root=images"),
        (RECIPES["pretrain-7b-plain"][1], "--data.use-im-start-end"),
        (TINY, "--lora.alpha"),
        (TINY, "--evaluation.limit"),
        (TINY, "--num-epochs"),
        (TINY, "--parallel.shard-size"),
    ],
)
def test_a_setting_without_effect_is_refused(config, argument):
    name = argument.partition("=")[0].replace("_", "-")
    with pytest.raises(UserError, match=f"^{name} would have no effect: .*Leave it out"):
        refuse_unused(config, options_in(["--run-dir", "run", argument, "1"]))


def test_settings_that_are_read(caplog):
    """Of whole recipes as they are, and of each setting with what it needs."""
    for _, config in RECIPES.values():
        refuse_unused(config, ["seed"])
    config = replace(TINY, num_steps=None, lora=replace(TINY.lora, rank=4))
    config = replace(config, evaluation=replace(TINY.evaluation, every=5))
    names = ("model.projector", "num-epochs", "lora.alpha", "evaluation.limit")
    refuse_unused(config, names)
    assert not caplog.records


def test_a_switch_beside_what_it_turns_off_is_a_line_of_the_log(caplog):
    with caplog.at_level(logging.WARNING):
        refuse_unused(TEXT_ONLY, ["data.text_only", "model.projector"])
    assert caplog.messages == [
        "--model.projector would have no effect: the run trains on text alone (data.text-only)"
    ]
