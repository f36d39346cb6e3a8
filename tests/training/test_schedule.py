"""The learning rate equals Hugging Face's scheduler at every step."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from mmalign.training.schedule import learning_rate_at, num_warmup_steps


@pytest.mark.parametrize(("num_steps", "warmup_ratio"), [(20, 0.2), (2500, 0.03), (7, 0.0), (1, 1)])
def test_equals_hugging_face(num_steps, warmup_ratio):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-3)
    warmup = num_warmup_steps(num_steps, warmup_ratio)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, num_steps)
    for step in range(num_steps):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate_at(step, num_steps, 2e-3, warmup_ratio) == pytest.approx(expected)
        optimizer.step()
        schedule.step()
