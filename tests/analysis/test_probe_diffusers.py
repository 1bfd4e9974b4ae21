"""Locality of diffusers' transformers, on small randomly initialised configurations."""

import json

import numpy as np
import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

from analysis.probes.declared import DiffusersLocality  # noqa: E402
from analysis.probes.diffusers_models import Adapted, conditioning_from, load  # noqa: E402
from analysis.probes.execute import run  # noqa: E402
from analysis.probes.layers import watching  # noqa: E402


def transformer(name: str) -> nn.Module:
    torch.manual_seed(0)
    small = dict(num_attention_heads=2, attention_head_dim=8)
    if name == "DiT":
        return diffusers.DiTTransformer2DModel(
            **small,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=6,
            patch_size=2,
            num_embeds_ada_norm=10,
        )
    if name == "PixArt":
        return diffusers.PixArtTransformer2DModel(
            **small,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=6,
            patch_size=2,
            caption_channels=12,
            cross_attention_dim=16,
        )
    return diffusers.FluxTransformer2DModel(
        **small,
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )


def adapted(name: str) -> Adapted:
    return Adapted(transformer(name).eval(), grid=(3, 5) if name == "Flux" else None)


@pytest.mark.parametrize("name", ["DiT", "PixArt", "Flux"])
def test_rows_are_the_models_own_attention(name: str):
    """Against the softmax of every product of queries and keys, the image's part of it scaled to sum 1."""
    model, seen, outputs = adapted(name), [], []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.nn.functional.scaled_dot_product_attention:
                given = kwargs or {}
                outputs.append(
                    tuple(
                        given[name] if name in given else args[i]
                        for i, name in enumerate(("query", "key"))
                    )
                )
            return out

    x = torch.randn(2, model.channels, *model.input_grid)
    t = torch.full((2,), 0.5) if model.flux else torch.tensor([500, 500])
    with torch.no_grad(), Spy(), watching(model.layers(), seen.append):
        model(x, t, torch.tensor([1, 3]))
    assert len(seen) == len(model.layers()) == {"DiT": 2, "PixArt": 2, "Flux": 3}[name]
    tokens = model.grid[0] * model.grid[1]
    text = 16 if model.flux else 0
    own = [call for call in outputs if call[0].shape[2] == call[1].shape[2] == tokens + text]
    assert len(own) == len(seen)
    for call, (q, k) in zip(seen, own, strict=True):
        full = ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1)
        image = full[:, 1, text:, text:]
        torch.testing.assert_close(
            call.weights.rows(1, torch.arange(tokens)),
            image / image.sum(-1, keepdim=True),
            rtol=1e-5,
            atol=1e-7,
        )


@pytest.mark.parametrize("name", ["DiT", "PixArt", "Flux"])
def test_the_whole_walk(name: str):
    model = adapted(name)
    spec = DiffusersLocality(
        type(model.model).__name__,
        "0" * 64,
        steps=3,
        images=2,
        gradient_queries=4 if name == "DiT" else 0,
    )
    arrays, values = run(spec, model, torch.device("cpu"), memory=64)
    assert arrays["timesteps"].shape == (3,) and values["attention"]["parts"] == 2 * len(
        model.layers()
    )
    assert 0 < values["attention"]["distance"] < 2 and ("network gradient" in values) == (
        name == "DiT"
    )


def test_a_folder_is_loaded_without_code(tmp_path):
    model = transformer("PixArt")
    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    loaded = load(tmp_path / "pipeline")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True)
    )


def test_bad_folders_and_embeddings(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="holds a UNet2DModel; this probe takes DiT"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(tmp_path)
    np.savez(tmp_path / "objects.npz", encoder_hidden_states=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="plain arrays"):
        conditioning_from(tmp_path / "objects.npz")
    with pytest.raises(ValueError, match="needs \\(1, ..., 12\\)"):
        Adapted(transformer("PixArt"), {"encoder_hidden_states": torch.zeros(1, 5, 7)})
    with pytest.raises(ValueError, match="is not probed"):
        Adapted(nn.Linear(2, 2))
