"""Learning rate of a step: linear warm-up, then cosine to zero."""

import math


def num_warmup_steps(num_steps: int, warmup_ratio: float) -> int:
    return math.ceil(num_steps * warmup_ratio)


def learning_rate_at(step: int, num_steps: int, peak: float, warmup_ratio: float) -> float:
    """Learning rate of optimizer step `step` (the first is 0) of `num_steps`.

    Equal to Hugging Face's get_cosine_schedule_with_warmup, whose very first step has learning
    rate 0 wherever there is a warm-up: the released models were trained with it.
    """
    warmup = num_warmup_steps(num_steps, warmup_ratio)
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
