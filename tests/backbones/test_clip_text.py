"""CLIP's text encoder against PyTorch's own transformer layers, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backbones import ClipText
from backbones.clip_text import ACTIVATIONS

SIZES = dict(vocabulary=31, tokens=7, dim=12, depth=3, heads=3, hidden=20)


def reference(network: ClipText, ids: Tensor, activation: str) -> Tensor:
    """Run the same weights through nn.TransformerEncoderLayer with a causal mask."""
    length = ids.shape[1]
    x = network.embeddings.token_embedding(ids)
    x = x + network.embeddings.position_embedding(torch.arange(length))
    mask = nn.Transformer.generate_square_subsequent_mask(length)
    for layer in network.encoder.layers:
        other = nn.TransformerEncoderLayer(
            12, 3, 20, 0.0, ACTIVATIONS[activation], batch_first=True, norm_first=True
        )
        attention = layer.self_attn
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        weights = {
            "self_attn.in_proj_weight": torch.cat([part.weight for part in parts]),
            "self_attn.in_proj_bias": torch.cat([part.bias for part in parts]),
        }
        pairs = {
            "self_attn.out_proj": attention.out_proj,
            "linear1": layer.mlp.fc1,
            "linear2": layer.mlp.fc2,
            "norm1": layer.layer_norm1,
            "norm2": layer.layer_norm2,
        }
        for name, part in pairs.items():
            weights |= {f"{name}.weight": part.weight, f"{name}.bias": part.bias}
        x = torch.func.functional_call(other, weights, (x,), {"src_mask": mask})
    return network.final_layer_norm(x)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("std", [0.05, 0.15])
def test_states_and_gradients_are_those_of_pytorchs_layers(activation: str, std: float):
    torch.manual_seed(0)
    network = ClipText(**SIZES, activation=activation)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std)
    ids = torch.randint(0, 31, (5, 6))
    gradients = []
    for states in (network(ids), reference(network, ids, activation)):
        loss = (states * torch.linspace(-1, 1, 12)).square().sum()
        gradients.append([states, *torch.autograd.grad(loss, list(network.parameters()))])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_token_sees_nothing_of_later_ones():
    torch.manual_seed(0)
    network = ClipText(**SIZES).eval()
    ids = torch.randint(0, 31, (1, 7))
    changed = ids.clone()
    changed[0, 4:] = (changed[0, 4:] + 1) % 31
    ours, theirs = network(ids), network(changed)
    torch.testing.assert_close(ours[:, :4], theirs[:, :4])
    assert (ours[:, 4:] - theirs[:, 4:]).abs().min() > 0


def test_the_published_size_has_the_published_parameters():
    with torch.device("meta"):
        network = ClipText()
    assert sum(parameter.numel() for parameter in network.parameters()) == 123_060_480


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="unknown activation 'relu'; known: quick_gelu, gelu"):
        ClipText(**SIZES, activation="relu")
    with pytest.raises(ValueError, match="divisible by its heads"):
        ClipText(**SIZES | dict(heads=5))
