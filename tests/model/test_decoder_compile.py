"""torch.compile of the decoder traces through the registered operations in one graph."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mmalign.config import LoraConfig
from mmalign.model.config import DecoderConfig
from mmalign.model.decoder import Decoder
from mmalign.model.layers import init_weights
from mmalign.model.lora import add_lora
from mmalign.model.positions import PackedPositions

CONFIG = DecoderConfig(
    vocab_size=51,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
BATCHES = ([3, 1, 5], [7], [2, 9, 4, 1], [40, 23])  # the lengths of the samples


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def position_ids(lengths) -> torch.Tensor:
    return torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])


def outputs_and_gradients(model, module, inputs, leaves) -> list[torch.Tensor]:
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((x * torch.linspace(0.5, 1, x.numel()).view(x.shape)).sum() for x in outputs)
    trained = [p for p in (*module.parameters(), *leaves) if p.requires_grad]
    return [*outputs, *torch.autograd.grad(loss, trained, allow_unused=True)]


def assert_one_graph(module, batches, dynamic: bool | None) -> None:
    """Compiled equals eager, forward and backward, in one graph that serves every length."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=dynamic)
    num_compiled = []
    for inputs, leaves in batches:
        found = outputs_and_gradients(compiled, module, inputs, leaves)
        expected = outputs_and_gradients(module, module, inputs, leaves)
        torch.testing.assert_close(found, expected)
        num_compiled.append(counter.frame_count)
    known = 0 if dynamic else 1  # by default the second length says which sizes change
    assert num_compiled[-1] == num_compiled[known], "a token count was specialised on"
    operations = {str(node.target) for node in counter.graphs[-1].graph.nodes}
    for name in ("rotary_attention_fwd", "add_rms_norm_fwd", "swiglu_fwd"):
        assert f"mmalign.{name}.default" in operations, operations


def layer_batch(lengths, norm):
    hidden, residual = (torch.randn(sum(lengths), 64, requires_grad=True) for _ in range(2))
    cos, sin = (torch.randn(64, 8) for _ in range(2))
    positions = PackedPositions(cos, sin, position_ids(lengths), offsets(lengths), max(lengths))
    return (hidden, residual, norm, positions), (hidden, residual)


@pytest.mark.parametrize("dynamic", (True, None))
@pytest.mark.parametrize("adapted", (False, True), ids=("full", "lora"))
def test_decoder_layer(adapted, dynamic):
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    init_weights(decoder, seed=0)
    if adapted:
        decoder.requires_grad_(False)
        add_lora(decoder, LoraConfig(rank=4, dropout=0.0))
    layer, norm = decoder.layers[0], decoder.norm
    assert_one_graph(layer, [layer_batch(lengths, norm) for lengths in BATCHES], dynamic)


class TextDecoder(Decoder):
    def forward(self, input_ids, *batch):
        return super().forward(input_ids, self.packed_positions(*batch))


def test_whole_decoder():
    decoder = TextDecoder(CONFIG)
    init_weights(decoder, seed=0)
    batches = []
    for lengths in BATCHES:
        input_ids = torch.randint(CONFIG.vocab_size, (sum(lengths),))
        inputs = input_ids, position_ids(lengths), offsets(lengths), max(lengths)
        batches.append((inputs, ()))
    assert_one_graph(decoder, batches, dynamic=True)
