"""VA-VAE: the authors' names, counts and outputs, its loss of alignment, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import backbones
from backbones.vavae import VAVAE, align_features, weigh_alignment
from experiments.engine.timing.cost import counting
from tests.support.authors import build_like_authors, draw_normal, largest_error
from tests.support.paths import DATA

STORED = json.loads((DATA / "outputs_vavae.json").read_text())
CASE, ALIGNMENT = STORED["vavae"], STORED["alignment"]


@torch.no_grad()
def test_outputs_are_those_of_the_authors_modules():
    model = build_like_authors(CASE)
    assert isinstance(model, VAVAE)
    assert sum(p.numel() for p in model.parameters()) == CASE["params"]
    assert len(model.state_dict()) == CASE["entries"]

    mean, log_variance = model.encode(draw_normal(32, tuple(CASE["image_shape"])).float())
    image = model.decode(draw_normal(33, tuple(CASE["latent_shape"])).float())[:1]
    assert largest_error(mean, CASE, CASE["outputs"]["mean"]) < 1e-5
    assert largest_error(log_variance, CASE, CASE["outputs"]["logvar"]) < 1e-5
    assert largest_error(image, CASE, CASE["outputs"]["image"]) < 2e-5


def test_the_published_size_has_the_authors_counts():
    """Parameters by part, and multiply-accumulates at 256 pixels."""
    with torch.device("meta"):
        model = backbones.build("vavae_f16d32")
    assert backbones.kind_of("vavae_f16d32") is backbones.Kind.AUTOENCODER
    assert "vavae_f16d32" not in backbones.list_backbones()
    assert {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
    } == {
        "encoder": 28_413_248,
        "decoder": 41_417_603,
        "quant_conv": 4_160,
        "post_quant_conv": 1_056,
    }

    with counting() as macs, torch.no_grad():
        latents = model.encode(torch.empty(1, 3, 256, 256, device="meta")).mean
    assert latents.shape == (1, 32, 16, 16)
    assert round(macs.core / 1e9, 4) == 68.9722
    with counting() as macs, torch.no_grad():
        model.decode(latents)
    assert round(macs.core / 1e9, 4) == 126.0936


def test_the_loss_of_alignment_is_that_of_the_authors():
    seeds, shapes = ALIGNMENT["seeds"], ALIGNMENT["shapes"]
    projection, z, features = (
        draw_normal(seeds[name], tuple(shapes[name])).float()
        for name in ("projection", "z", "features")
    )
    z.requires_grad_()
    projected = torch.einsum("dc,nchw->ndhw", projection, z)
    for name, margins in (("margins", ()), ("no_margins", (0.0, 0.0))):
        terms = align_features(projected, features, *margins)
        assert [term.item() for term in terms] == pytest.approx(
            ALIGNMENT["outputs"][name], abs=1e-6
        )

    # The adaptive weight, with z itself in the place of the last layer's weights.
    nll = (z * draw_normal(seeds["nll"], tuple(shapes["z"])).float()).sum() / len(z)
    alignment = torch.stack(align_features(projected, features)).sum()
    weight = weigh_alignment(nll, alignment, z)
    assert weight.item() == pytest.approx(ALIGNMENT["outputs"]["weight"][0], rel=1e-5)
    assert not weight.requires_grad


def test_files_hold_more_than_the_autoencoder_and_others_are_refused(tmp_path):
    model = backbones.build("vavae_f16d32", **backbones.tiny_options_of("vavae_f16d32"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "vavae.safetensors"
    save_file(
        weights | {"loss.logvar": torch.ones(1), "linear_proj.weight": torch.ones(2, 2)}, path
    )
    backbones.load_published(model, path)

    # Another number of channels, as a Stable Diffusion autoencoder has, is named.
    other = VAVAE(channels=6, dim=32, multipliers=(1, 2), res_blocks=1)
    with pytest.raises(ValueError, match="an autoencoder with 4 latent channels, and not of this"):
        backbones.load_published(other, path)
    with pytest.raises(ValueError, match="decodes latents of 6 channels, got 4"):
        other.decode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="sides that divide by 2"):
        other.encode(torch.zeros(1, 3, 5, 4))
