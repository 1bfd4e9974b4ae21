"""Locality of diffusers' transformers, on small randomly initialised configurations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from analysis.probes.declared import DiffusersLocality  # noqa: E402
from analysis.probes.diffusers_models import Adapted, adapt, conditioning_from, load  # noqa: E402
from analysis.probes.execute import Machine, measure  # noqa: E402
from analysis.probes.watch import SoftmaxObserver, watching  # noqa: E402
from tests.support.diffusers import transformer  # noqa: E402

TEXT_TOKENS = 16
NUM_LAYERS = {"DiT": 2, "PixArt": 2, "Flux": 3}


def adapted(name: str) -> Adapted:
    return adapt(transformer(name).eval(), grid=(3, 5) if name == "Flux" else None)


@pytest.mark.parametrize("name", NUM_LAYERS)
def test_rows_are_the_models_own_attention(name: str):
    """Rows equal the softmax of queries and keys; the image's share is scaled to a sum of 1."""
    model = adapted(name)
    calls = []
    products = []

    def keep(kind: str, q: Tensor, k: Tensor | None = None, *rest: object) -> None:
        if kind == "attention":
            products.append((q, k))

    x = torch.randn(2, model.channels, *model.input_grid)
    t = torch.full((2,), 0.5) if name == "Flux" else torch.tensor([500, 500])
    with torch.no_grad(), SoftmaxObserver(keep), watching(model.layers(), calls.append):
        model(x, t, torch.tensor([1, 3]))
    assert len(calls) == len(model.layers()) == NUM_LAYERS[name]

    # Attention to the text alone, as in PixArt, is not probed.
    tokens = model.grid[0] * model.grid[1]
    text = TEXT_TOKENS if name == "Flux" else 0
    own = [(q, k) for q, k in products if q.shape[2] == k.shape[2] == tokens + text]
    assert len(own) == len(calls)

    for call, (q, k) in zip(calls, own, strict=True):
        full = ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1)
        image = full[:, 1, text:, text:]
        rows = call.weights.rows(1, torch.arange(tokens))
        truth = image / image.sum(-1, keepdim=True)
        torch.testing.assert_close(rows, truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NUM_LAYERS)
def test_a_model_is_probed_on_its_whole_way_from_noise(name: str):
    model = adapted(name)
    gradients = 4 if name == "DiT" else 0
    spec = DiffusersLocality(
        type(model.model).__name__, "0" * 64, steps=3, images=2, gradient_queries=gradients
    )
    arrays, values = measure(spec, model, Machine(torch.device("cpu"), memory=64))
    assert arrays["timesteps"].shape == (3,)
    assert values["attention"]["parts"] == 2 * NUM_LAYERS[name]
    assert 0 < values["attention"]["distance"] < 2
    assert ("network gradient" in values) == (name == "DiT")


def test_a_pipelines_folder_is_loaded_with_its_weights(tmp_path: Path):
    model = transformer("PixArt")
    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    loaded = load(tmp_path / "pipeline")
    for saved, read in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(saved, read)


def test_bad_folders_and_embeddings_are_refused(tmp_path: Path):
    """What is no transformer, or no embedding of its text, is refused with the reason."""
    # Folders: without a configuration, of another network, without weights.
    config = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"cannot read .*config\.json: No such file"):
        load(tmp_path)
    config.write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="holds a UNet2DModel; this probe takes DiT"):
        load(tmp_path)
    config.write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(tmp_path)

    # Embeddings: no plain arrays, of another width, for another network.
    objects = tmp_path / "objects.npz"
    np.savez(objects, encoder_hidden_states=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="plain arrays"):
        conditioning_from(objects)
    with pytest.raises(ValueError, match="needs \\(1, ..., 12\\)"):
        adapt(transformer("PixArt"), {"encoder_hidden_states": torch.zeros(1, 5, 7)})
    with pytest.raises(ValueError, match="is not probed"):
        adapt(nn.Linear(2, 2))
