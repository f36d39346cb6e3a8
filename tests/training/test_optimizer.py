"""Our AdamW with clipping against torch's, step by step."""

import torch

from mmalign.config import OptimizerConfig
from mmalign.training.optimizer import AdamW


def test_equals_torch_with_clipping_and_weight_decay():
    torch.manual_seed(0)
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)
    ours = {str(i): torch.nn.Parameter(torch.randn(7, 5)) for i in range(3)}
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours.values()]
    optimizer = AdamW(ours, config)
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for _ in range(10):
        for mine, other in zip(ours.values(), theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, config.max_grad_norm)
        torch.testing.assert_close(optimizer.gradient_norm(), norm)
        optimizer.step(1e-2, optimizer.gradient_norm())
        reference.step()
    for mine, other in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_bf16_parameters_follow_an_fp32_master():
    """Updates far below bf16's resolution must add up, as they do in fp32."""
    torch.manual_seed(0)
    config = OptimizerConfig(max_grad_norm=0.0)
    start = torch.randn(64).to(torch.bfloat16)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = AdamW({"weight": parameter}, config)
    master = torch.nn.Parameter(start.float())
    reference = torch.optim.AdamW([master], lr=1e-5, weight_decay=0.0)
    for _ in range(200):
        parameter.grad = torch.ones_like(parameter)
        master.grad = torch.ones_like(master)
        optimizer.step(1e-5, optimizer.gradient_norm())
        reference.step()
    # read as integers, the weight's 16 bits and the signed remainder add up to the fp32 master
    bits = (parameter.detach().view(torch.int16).int() << 16) + optimizer.remainder["weight"].int()
    torch.testing.assert_close(bits.view(torch.float32), master.detach())
