"""DINOv2's class tokens: resizing, positions, weights, and the scores that rest on them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from experiments import evaluate
from experiments.engine.judges import dinov2
from experiments.engine.judges.dinov2 import (
    DEVIATION,
    MEAN,
    SIZE,
    load_dinov2,
    resample_positions,
    standardise,
)
from experiments.engine.records.store import read_record
from experiments.engine.scoring import reference
from experiments.engine.scoring.frechet import frechet
from experiments.engine.scoring.moments import moments_of
from experiments.engine.scoring.reference import Layer
from tests.support.score_scripts import IMAGES, Script, use_grey_extractor

DIM = 12


def small_network(side: int = SIZE) -> VisionTransformer:
    """A vision transformer with DINOv2's parts and names, untrained."""
    return VisionTransformer(
        img_size=side,
        patch_size=14,
        embed_dim=DIM,
        depth=2,
        num_heads=2,
        init_values=0.5,
        num_classes=0,
    )


def draw_weights(side: int = 518) -> dict[str, Tensor]:
    """Random weights as DINOv2 stores them: positions of another side, and a masked token."""
    draw = torch.Generator().manual_seed(0)
    shapes = small_network(side).state_dict()
    weights = {name: torch.randn(value.shape, generator=draw) / 4 for name, value in shapes.items()}
    return weights | {"mask_token": torch.zeros(1, DIM)}


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a small network's weights, which the suite takes for DINOv2's."""
    monkeypatch.setattr(dinov2, "build_network", small_network)
    path = tmp_path / "dinov2.pth"
    torch.save(draw_weights(), path)
    return path


# ---- Features


@pytest.mark.parametrize("height, width", [(32, 32), (5, 7), (300, 256)])
def test_images_are_resized_as_pil_resizes_numbers_that_are_not_rounded(height: int, width: int):
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    found = standardise(torch.from_numpy(images).permute(0, 3, 1, 2))
    for image, x in zip(images, found, strict=True):
        for channel in range(3):
            grey = Image.fromarray(image[..., channel].astype(np.float32))
            resized = np.asarray(grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            expected = (resized / 255 - MEAN[channel]) / DEVIATION[channel]
            np.testing.assert_allclose(x[channel].numpy(), expected, atol=2e-4)


def cubic(distance: float) -> float:
    """Weight of a tap in bicubic interpolation with a = -0.75."""
    x = abs(distance)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_positions_are_resampled_with_an_offset_and_without_antialiasing():
    """Each axis by four taps about (i + 1/2) / scale - 1/2, where the scale is 16.1 / 37."""
    table = torch.randn(1, 1 + 37**2, 3, generator=torch.Generator().manual_seed(0)).double()
    matrix = np.zeros((16, 37))
    for new in range(16):
        place = (new + 0.5) / (16.1 / 37) - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            matrix[new, min(max(tap, 0), 36)] += cubic(place - tap)

    found = resample_positions(table, 16)
    grid = table[0, 1:].reshape(37, 37, 3).numpy()
    expected = np.einsum("ui,vj,ijd->uvd", matrix, matrix, grid).reshape(256, 3)
    np.testing.assert_allclose(found[0, 1:].numpy(), expected, atol=1e-9)
    assert torch.equal(found[:, 0], table[:, 0])


def test_a_feature_is_the_normalised_class_token(weights: Path):
    network = small_network().eval()
    stored = draw_weights()
    del stored["mask_token"]
    stored["pos_embed"] = resample_positions(stored["pos_embed"], 16)
    network.load_state_dict(stored)
    images = IMAGES[:3]
    with torch.no_grad():
        x = standardise(torch.from_numpy(images).permute(0, 3, 1, 2))
        tokens = network.pos_drop(network._pos_embed(network.patch_embed(x)))
        for block in network.blocks:
            tokens = block(tokens)
        expected = network.norm(tokens)[:, 0]
    np.testing.assert_allclose(load_dinov2(weights)(images), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_weights_are_read_strictly_and_named_by_their_hash(weights: Path, tmp_path: Path):
    loaded = load_dinov2(weights)
    assert loaded.sha256[:16] in loaded.warnings[0]
    with pytest.raises(ValueError, match="name it with --dinov2"):
        load_dinov2(tmp_path / "none.pth")
    stored = draw_weights()
    del stored["blocks.1.ls1.gamma"]
    torch.save(stored, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="missing blocks.1.ls1.gamma"):
        load_dinov2(tmp_path / "other.pth")


# ---- Scores


@pytest.fixture
def script(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Script:
    """`evaluate.py` with a small extractor in place of Inception."""
    use_grey_extractor(monkeypatch)
    monkeypatch.setattr(reference, "DINOV2", Layer("dinov2", "mu_dinov2", "sigma_dinov2", DIM))
    monkeypatch.chdir(tmp_path)
    return Script(evaluate, capsys, monkeypatch)


def test_scores_on_dinov2_stand_beside_inceptions(script: Script, weights: Path):
    np.savez("a.npz", arr_0=IMAGES[:50])
    np.savez("real.npz", arr_0=IMAGES[30:])
    options = ("--dinov2", weights, "--record", "a.json")
    status, out, _ = script.run("a.npz", "--against", "real.npz", *options)
    assert status == 0
    assert "FD-DINOv2-50 " in out
    assert "DINOv2, k 3, 50 reference rows" in out

    # The distance is that of the features, whatever measured them.
    values = read_record(Path("a.json")).values
    network = load_dinov2(weights)
    a, b = (moments_of(network(images)) for images in (IMAGES[:50], IMAGES[30:]))
    assert values["fd_dinov2"] == pytest.approx(frechet(a, b), rel=1e-3)
    assert 0 <= values["precision_dinov2"] <= 1
    assert values["coverage_dinov2_se"] >= 0

    # The record names the weights, and both choices in which other codes differ.
    named = values["manifest"]["measure"]["extractor"]["dinov2"]
    assert named["sha256"] == network.sha256
    assert "antialiasing" in named["resize"]
    assert "offset 0.1" in named["positions"]
    assert "timm" in values["manifest"]["measure"]["versions"]


def test_a_reference_keeps_dinov2s_statistics_and_others_are_refused(
    script: Script, weights: Path, monkeypatch: pytest.MonkeyPatch
):
    np.savez("a.npz", arr_0=IMAGES[:50])
    np.savez("real.npz", arr_0=IMAGES[30:])
    monkeypatch.setattr(
        reference,
        "LAYERS",
        (Layer("pool", "mu", "sigma", 6), Layer("spatial", "mu_s", "sigma_s", 5)),
    )
    for name, options in (("with", ("--dinov2", weights)), ("without", ())):
        assert script.run("reference", "real.npz", "--out", f"{name}.npz", *options)[0] == 0
    _, out, _ = script.run("a.npz", "--against", "with.npz", "--dinov2", weights)
    assert "FD-DINOv2-50 " in out
    error = script.refuse("a.npz", "--against", "without.npz", "--dinov2", weights)
    assert "neither images nor DINOv2's statistics" in error

    # Statistics under other weights are another score.
    with np.load("with.npz") as stored:
        made = json.loads(str(stored["made"]))
        made["features"]["dinov2"]["sha256"] = "1" * 64
        arrays = dict(stored) | {"made": np.array(json.dumps(made))}
    np.savez("with.npz", **arrays)
    error = script.refuse("a.npz", "--against", "with.npz", "--dinov2", weights)
    assert "are of features 1111" in error
