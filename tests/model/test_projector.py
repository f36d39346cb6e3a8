"""Projectors from runs, from LLaVA's own files and from LLaVA folders."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mmalign.errors import UserError
from mmalign.model.hf import load_projector
from mmalign.model.layers import RMSNorm
from mmalign.model.projector import (
    Projector,
    ProjectorShape,
    make_projector,
    projector_of,
    projector_tensors,
    read_projector,
)
from tests.model.tiny import GROUPED_QUERY, hf_llava

KINDS = ("linear", "mlp2x_gelu")


@pytest.fixture
def projector():
    torch.manual_seed(0)
    return {"weight": torch.randn(128, 48), "bias": torch.randn(128)}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_in_all_three_spellings(kind):
    shape = ProjectorShape(48, 128, kind)
    ours = make_projector(shape)
    expected = {name: p.detach() for name, p in ours.named_parameters()}
    assert {name: x.shape for name, x in expected.items()} == shape.parameters
    llava = {f"model.mm_projector.{name}": tensor for name, tensor in expected.items()}
    nested = {f"model.{name}": tensor for name, tensor in ours.to_hf_tensors().items()}
    in_folder = [(tensors, ours.HF_CONFIG) for tensors in (ours.to_hf_tensors(), nested)]
    for tensors, hf in ((projector_tensors(ours), None), (llava, None), *in_folder):
        state = read_projector(tensors, "file", hf)
        assert state.keys() == expected.keys()
        other = projector_of(state, 48, 128)
        assert type(other) is type(ours)
        assert all(torch.equal(p, expected[name]) for name, p in other.named_parameters())


def test_two_layers_compute_what_the_one_does():
    """The Hugging Face tensors, in a LlavaMultiModalProjector of transformers."""
    ours = Projector(48, 128)
    theirs = hf_llava(**GROUPED_QUERY).model.multi_modal_projector
    prefix = "multi_modal_projector."
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in ours.to_hf_tensors().items()})
    features = torch.randn(7, 48)
    with torch.no_grad():
        expected = features @ ours.weight.T + ours.bias
        torch.testing.assert_close(theirs(features), expected)


def test_llava_15s_projector_file(tmp_path):
    """Saved by LLaVA: an nn.Sequential of two layers with GELU between them."""
    layers = torch.nn.Linear(48, 128), torch.nn.GELU(), torch.nn.Linear(128, 128)
    theirs = torch.nn.Sequential(*layers)
    state = {f"model.mm_projector.{name}": x for name, x in theirs.state_dict().items()}
    torch.save(state, tmp_path / "mm_projector.bin")
    ours = projector_of(load_projector(tmp_path), 48, 128)
    features, norm = torch.randn(4, 48), RMSNorm(128, 1e-5)
    torch.nn.init.ones_(norm.weight)
    hidden_states, normed = ours(features, torch.zeros(6, 128), torch.tensor([1, 2, 4, 5]), norm)
    with torch.no_grad():
        torch.testing.assert_close(hidden_states[[1, 2, 4, 5]], theirs(features))
        expected = torch.nn.functional.rms_norm(hidden_states, (128,), norm.weight, 1e-5)
        torch.testing.assert_close(normed, expected)


def test_llavas_projector_file(tmp_path, projector):
    path = tmp_path / "mm_projector.bin"
    state = {f"model.mm_projector.{name}": tensor for name, tensor in projector.items()}
    torch.save(state, path)
    assert load_projector(path).keys() == {"weight", "bias"}
    table = torch.randn(103, 128)
    for rows in (table, table[-2:].clone()):
        torch.save(state | {"model.embed_tokens.weight": rows}, path)
        for source in (path, tmp_path):
            loaded = load_projector(source)
            assert torch.equal(loaded["weight"], projector["weight"])
            assert torch.equal(loaded["bias"], projector["bias"])
            assert torch.equal(loaded["image_token_embeddings"], table[-2:])


def test_projector_of_a_run(tmp_path, projector):
    path = tmp_path / "export" / "projector.safetensors"
    path.parent.mkdir()
    save_file(projector, path)
    for source in (tmp_path, path.parent, path):
        assert torch.equal(load_projector(source)["weight"], projector["weight"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {"weight": s["weight"]}, "expected a projector of one layer"),
        (lambda s: s | {"2.weight": torch.ones(128, 128)}, "expected a projector of one layer"),
        (lambda s: s | {"bias": torch.ones(48)}, r"bias of shape \(128,\).*found \(48,\)"),
        (lambda s: s | {"weight": torch.ones(0)}, r"weight of shape .*found \(0,\)"),
    ],
)
def test_projectors_that_are_refused(tmp_path, projector, change, message):
    path = tmp_path / "projector.safetensors"
    save_file(change(projector), path)
    with pytest.raises(UserError, match=message):
        load_projector(path)


def test_missing_projector(tmp_path):
    with pytest.raises(UserError, match=r"looked for export/projector\.safetensors"):
        load_projector(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_projector(tmp_path / "projector.safetensors")


def test_llava_folder_whose_projector_is_not_linear(tmp_path):
    model = hf_llava(**GROUPED_QUERY)
    model.model.multi_modal_projector.linear_2.weight.data[0, 1] = 1.0
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="linear_2 is not the identity"):
        load_projector(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"projector_hidden_act": "relu"}))
    with pytest.raises(UserError, match="'projector_hidden_act': 'relu'"):
        load_projector(tmp_path)
