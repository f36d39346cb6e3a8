"""One training step on hand-made batches, against torch's own loop, and without any file."""

import copy
from dataclasses import replace

import pytest
import torch
from mmalign_kernels import adding_to_gradients

from mmalign.config import LoraConfig, OptimizerConfig
from mmalign.data.loader import Step
from mmalign.training.schedule import learning_rate_at
from mmalign.training.trainer import Trainer
from tests.training.activations_kept import decoder_config, random_batch, small_model, train_config
from tests.training.helpers import CPU

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)


def hand_made_step(index: int) -> Step:
    """Two micro-batches, one of them without an image."""
    batches = [random_batch((40, 7, 66), num_images=2), random_batch((9, 30), num_images=0)]
    return Step(
        index=index,
        sample_ids=list("abcde"),
        batches=batches,
        num_loss_tokens=sum(batch.num_loss_tokens for batch in batches),
        num_tokens=sum(len(batch.input_ids) for batch in batches),
    )


def trainer_of(config, num_steps: int = 4) -> Trainer:
    return Trainer(config, CPU, small_model(decoder_config(), config), num_steps=num_steps)


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_equals_torchs_loop(tmp_path, stage, as_on_a_gpu, monkeypatch):
    """Token mean over the micro-batches, clipping by the global norm, AdamW, warm-up and cosine."""
    monkeypatch.chdir(tmp_path)
    config = replace(train_config(stage), optimizer=OPTIMIZER)
    trainer = trainer_of(config)
    if as_on_a_gpu:
        trainer.gradient_sums = adding_to_gradients
    model = copy.deepcopy(trainer.model)
    theirs = model.trainable_parameters()
    reference = torch.optim.AdamW(theirs.values(), weight_decay=OPTIMIZER.weight_decay)
    for index in range(4):
        step = hand_made_step(index)
        learning_rate = learning_rate_at(index, 4, OPTIMIZER.learning_rate, OPTIMIZER.warmup_ratio)
        losses = [model(batch) for batch in step.batches]
        loss = sum(losses) / step.num_loss_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), OPTIMIZER.max_grad_norm)
        reference.param_groups[0]["lr"] = learning_rate
        reference.step()
        reference.zero_grad()

        result = trainer.train_step(step)
        numbers = result.wait()
        assert numbers.loss == pytest.approx(loss.item(), rel=1e-6)
        assert numbers.gradient_norm == pytest.approx(norm.item(), rel=1e-4)
        assert (numbers.finite, numbers.stop, numbers.save_failed) == (1, 0, 0)
        assert (result.number, result.learning_rate) == (index + 1, learning_rate)
    for name, parameter in trainer.parameters.items():
        torch.testing.assert_close(parameter, theirs[name], atol=2e-5, rtol=1e-4, msg=name)
        assert parameter.grad is None
    assert not list(tmp_path.iterdir())  # neither run folder nor metrics


def test_flags_travel_with_the_loss():
    numbers = trainer_of(train_config()).train_step(hand_made_step(0), stop=True).wait()
    assert (numbers.stop, numbers.save_failed) == (1, 0)


def test_dropout_is_a_function_of_seed_and_step():
    """So a resumed run draws the same masks, whatever was drawn before."""
    config = train_config(rank=4, lora={"dropout": 0.3})
    config = replace(config, optimizer=replace(OPTIMIZER, learning_rate=0.0, weight_decay=0.0))

    def loss(seed: int, index: int) -> float:
        trainer = trainer_of(replace(config, seed=seed))
        trainer.model.train()
        torch.rand(index + 7)
        return trainer.train_step(hand_made_step(index)).wait().loss

    assert loss(1, 2) == loss(1, 2)
    assert len({loss(1, 2), loss(1, 3), loss(2, 2)}) == 3


def test_a_state_is_loaded_in_place():
    """What a checkpoint stores: parameters and optimizer state of trained parameters alone."""
    config = replace(train_config(), lora=LoraConfig(rank=4, dropout=0.0), precision="fp32")
    trainer = trainer_of(config)
    state = trainer.state()
    kinds = {name.partition(".")[0] for name in state}
    assert kinds == {"parameter", "exp_avg", "exp_avg_sq"}
    trained = trainer.model.trainable_parameters()
    assert {name for name in state if name.startswith("parameter.")} == {
        f"parameter.{name}" for name in trained
    }
    for name, parameter in trained.items():
        assert state[f"parameter.{name}"].data_ptr() == parameter.data_ptr()
