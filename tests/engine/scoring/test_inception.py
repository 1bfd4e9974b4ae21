"""The extractor's structure, layouts and rules, on an untrained network of the same shape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy import ndarray

from experiments.engine.scoring import inception
from experiments.engine.scoring.inception import Inception, build_network, spatial_vector

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 20, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def extractor() -> Iterator[Inception]:
    pytest.importorskip("torch_fidelity")
    return Inception(build_network(), "untrained")


def resized(images: ndarray) -> ndarray:
    """Bilinear to (N, 299, 299, 3) by TensorFlow 1's rule: source = target * in / out, fp32."""

    def along(x: ndarray, axis: int) -> ndarray:
        size = x.shape[axis]
        at = np.arange(299, dtype=np.float32) * np.float32(size / 299)
        low = at.astype(int)
        share = (at - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(4)])
        a = x.take(low, axis)
        b = x.take(np.minimum(low + 1, size - 1), axis)
        return a + (b - a) * share

    return along(along(images.astype(np.float32), 2), 1)


def test_features_have_the_published_shapes_and_probabilities_are_probabilities(
    extractor: Inception,
):
    pool, spatial, probabilities = extractor(IMAGES)
    assert pool.shape == (3, 2048)
    assert spatial.shape == (3, 2023)
    assert probabilities.shape == (3, 1008)
    assert {part.dtype for part in (pool, spatial, probabilities)} == {np.dtype(np.float32)}
    assert (pool >= 0).all()
    assert (spatial >= 0).all()
    assert pool.std() > 0
    assert spatial.std() > 0
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)


def test_probabilities_come_without_the_bias_of_the_last_layer(extractor: Inception):
    before = extractor(IMAGES[:1])[2]
    pool = torch.from_numpy(extractor(IMAGES[:1])[0])
    with torch.no_grad():
        bias = extractor.network.fc.bias.clone()
        extractor.network.fc.bias.uniform_(-9, 9)
        after = extractor(IMAGES[:1])[2]
        extractor.network.fc.bias.copy_(bias)
    np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(
        after, (pool @ extractor.network.fc.weight.T).softmax(1), rtol=1e-4, atol=1e-9
    )


def test_the_network_sees_the_tensorflow_resize_and_range(extractor: Inception):
    seen = []
    handle = extractor.network.Conv2d_1a_3x3.register_forward_pre_hook(
        lambda module, given: seen.append(given[0].clone())
    )
    extractor(IMAGES)
    handle.remove()
    np.testing.assert_allclose(
        seen[0].permute(0, 2, 3, 1).numpy(), (resized(IMAGES) - 128) / 128, atol=1e-5
    )


def test_the_spatial_layer_is_the_first_branch_of_the_third_17_x_17_block_after_its_relu(
    extractor: Inception,
):
    seen = []
    handle = extractor.network.Mixed_6d.branch1x1.bn.register_forward_hook(
        lambda module, given, out: seen.append(out.clone())
    )
    spatial = extractor(IMAGES)[1]
    handle.remove()
    assert seen[0].shape == (3, 192, 17, 17)
    np.testing.assert_array_equal(
        spatial.reshape(3, 17, 17, 7), seen[0].relu()[:, :7].permute(0, 2, 3, 1).numpy()
    )


def test_spatial_entries_lie_rows_then_columns_then_channels():
    maps = torch.rand(2, 192, 17, 17)
    vector = spatial_vector(maps)
    for h, w, c in ((0, 0, 0), (0, 0, 6), (0, 16, 3), (9, 4, 1), (16, 16, 6)):
        assert torch.equal(vector[:, (h * 17 + w) * 7 + c], maps[:, c, h, w])


def test_batches_of_any_size_are_cut_to_at_most_the_batch_of_the_evaluator(
    monkeypatch: pytest.MonkeyPatch,
):
    cut = Inception.__new__(Inception)
    monkeypatch.setattr(Inception, "__call__", lambda self, images: (len(images),))
    assert [n for (n,) in cut.features(iter([np.zeros(150), np.zeros(3)]))] == [64, 64, 22, 3]


@pytest.mark.parametrize("images", [IMAGES / 255, IMAGES[0], IMAGES[..., :1]])
def test_other_images_are_refused(images: ndarray, extractor: Inception):
    with pytest.raises(ValueError, match="uint8 images"):
        extractor(images)


def test_an_untrained_network_is_the_same_every_time_and_leaves_the_generator_alone(
    extractor: Inception,
):
    state = torch.get_rng_state()
    again = build_network()
    assert torch.equal(torch.get_rng_state(), state)
    assert not again.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.parameters(), extractor.network.parameters(), strict=True)
    )


def test_weights_are_loaded_only_if_their_hash_and_names_are_right(
    tmp_path: Path, extractor: Inception, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "weights.pth"
    with pytest.raises(ValueError, match="no Inception weights"):
        inception.load_inception(path)
    torch.save({"fc.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not that of the published Inception"):
        inception.load_inception(path)
    monkeypatch.setattr(inception, "SHA256", "")
    with pytest.raises(ValueError, match="not the weights of the FID Inception"):
        inception.load_inception(path)
    torch.save({name: tensor + 1 for name, tensor in extractor.network.state_dict().items()}, path)
    loaded = inception.load_inception(path)
    assert torch.equal(loaded.network.fc.bias, extractor.network.fc.bias + 1)
    assert len(loaded.sha256) == 64


def test_weights_that_hold_code_are_refused_unrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inception, "SHA256", "")
    ran = tmp_path / "ran"

    class Touch:
        def __reduce__(self) -> tuple:
            return Path.touch, (ran,)

    torch.save({"fc.weight": Touch()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="not the weights"):
        inception.load_inception(tmp_path / "weights.pth")
    assert not ran.exists()
