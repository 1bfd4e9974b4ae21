"""BERT's encoder against PyTorch's own transformer layers, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backbones import Bert

SIZES = dict(vocabulary=31, tokens=7, dim=12, depth=3, heads=3, hidden=20)


def reference(network: Bert, ids: Tensor, lengths: Tensor) -> Tensor:
    """Run the same weights through nn.TransformerEncoderLayer with a mask of the padding."""
    parts = network.embeddings
    x = parts.word_embeddings(ids) + parts.position_embeddings(torch.arange(ids.shape[1]))
    x = parts.LayerNorm(x + parts.token_type_embeddings(torch.zeros_like(ids)))
    padding = torch.arange(ids.shape[1]) >= lengths[:, None]
    for layer in network.encoder["layer"].children():
        other = nn.TransformerEncoderLayer(
            12, 3, 20, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True
        )
        attention = layer.attention["self"]
        stacked = [attention.query, attention.key, attention.value]
        weights = {
            "self_attn.in_proj_weight": torch.cat([part.weight for part in stacked]),
            "self_attn.in_proj_bias": torch.cat([part.bias for part in stacked]),
        }
        pairs = {
            "self_attn.out_proj": layer.attention["output"].dense,
            "norm1": layer.attention["output"].LayerNorm,
            "linear1": layer.intermediate["dense"],
            "linear2": layer.output.dense,
            "norm2": layer.output.LayerNorm,
        }
        for name, part in pairs.items():
            weights |= {f"{name}.weight": part.weight, f"{name}.bias": part.bias}
        masks = {"src_key_padding_mask": padding}
        x = torch.func.functional_call(other, weights, (x,), masks)
    return x


@pytest.mark.parametrize("std", [0.05, 0.15])
def test_states_and_gradients_are_those_of_pytorchs_layers(std: float):
    torch.manual_seed(0)
    network = Bert(**SIZES)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std)
    ids = torch.randint(0, 31, (5, 6))
    lengths = torch.tensor([6, 2, 5, 1, 3])
    told = torch.arange(6) < lengths[:, None]
    gradients = []
    for run in (network, lambda *inputs: reference(network, *inputs)):
        states = run(ids, lengths)[told]  # nothing is said of padding
        loss = (states * torch.linspace(-1, 1, 12)).square().sum()
        grads = torch.autograd.grad(loss, list(network.parameters()))
        gradients.append([states, *grads])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing():
    torch.manual_seed(0)
    network = Bert(**SIZES).eval()
    ids = torch.randint(0, 31, (1, 7))
    padded = network(ids, torch.tensor([4]))[:, :4]
    torch.testing.assert_close(padded, network(ids[:, :4], torch.tensor([4])))
    assert (padded - network(ids, torch.tensor([7]))[:, :4]).abs().min() > 0


def test_the_published_size_has_the_published_parameters():
    with torch.device("meta"):
        network = Bert()
    number = sum(parameter.numel() for parameter in network.parameters())
    pooler, position_ids = 384 * 385, 512  # the published file holds these too
    assert number + pooler + position_ids == 22_713_728


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="divisible by its heads"):
        Bert(**SIZES | dict(heads=5))
