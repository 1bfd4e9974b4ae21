"""The extractor's structure, layouts and rules, on an untrained network of the same shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy import ndarray

from experiments.engine.records.manifest import UNKNOWN_FEATURES
from experiments.engine.scoring import inception
from experiments.engine.scoring.inception import Inception, build_network, spatial_vector

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 20, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def extractor() -> Iterator[Inception]:
    pytest.importorskip("torch_fidelity")
    return Inception(build_network(), "untrained")


def resized(images: ndarray) -> ndarray:
    """Resize to (N, 299, 299, 3) by TensorFlow 1's rule: source = target * in / out, fp32."""

    def along(x: ndarray, axis: int) -> ndarray:
        size = x.shape[axis]
        at = np.arange(299, dtype=np.float32) * np.float32(size / 299)
        low = at.astype(int)

        # Shares vary along the axis alone.
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        share = (at - low).astype(np.float32).reshape(shape)
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
    """Another bias changes nothing; probabilities are the softmax of the weighted features."""
    fc = extractor.network.fc
    pool, _, before = extractor(IMAGES[:1])
    with torch.no_grad():
        bias = fc.bias.clone()
        fc.bias.uniform_(-9, 9)
        after = extractor(IMAGES[:1])[2]
        fc.bias.copy_(bias)
        truth = (torch.from_numpy(pool) @ fc.weight.T).softmax(1)
    np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(after, truth, rtol=1e-4, atol=1e-9)


def test_the_network_sees_the_tensorflow_resize_and_range(extractor: Inception):
    """Images reach the network resized, and from about -1 to 1."""
    inputs = []
    first = extractor.network.Conv2d_1a_3x3
    handle = first.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    extractor(IMAGES)
    handle.remove()
    seen = inputs[0].permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(seen, (resized(IMAGES) - 128) / 128, atol=1e-5)


def test_the_spatial_layer_is_the_first_branch_of_the_third_17_x_17_block_after_its_relu(
    extractor: Inception,
):
    """Seven channels of the branch are kept at every place."""
    outputs = []
    norm = extractor.network.Mixed_6d.branch1x1.bn
    handle = norm.register_forward_hook(lambda module, args, out: outputs.append(out.clone()))
    spatial = extractor(IMAGES)[1]
    handle.remove()
    assert outputs[0].shape == (3, 192, 17, 17)
    branch = outputs[0].relu()[:, :7].permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(spatial.reshape(3, 17, 17, 7), branch)


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
    pairs = zip(again.parameters(), extractor.network.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


Weights = dict[str, torch.Tensor]


def round_to(dtype: torch.dtype, value: torch.Tensor) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def save(path: Path, weights: Weights) -> Path:
    torch.save(weights, path)
    return path


def test_unknown_weights_are_allowed_warned_of_and_called_unknown(
    tmp_path: Path, extractor: Inception
):
    """Weights of another hash are loaded with a warning, unless the published ones are required."""
    state = extractor.network.state_dict()
    path = save(tmp_path / "weights.pth", {name: value + 1 for name, value in state.items()})
    loaded = inception.load_inception(path)
    assert torch.equal(loaded.network.fc.bias, extractor.network.fc.bias + 1)
    assert len(loaded.sha256) == 64
    assert loaded.name == UNKNOWN_FEATURES

    # The warning names the hash.
    (warning,) = loaded.warnings
    assert loaded.sha256[:16] in warning
    assert "compare with no others" in warning
    with pytest.raises(ValueError, match="not that of the published Inception"):
        inception.require_published(path)


def test_the_published_weights_are_known_by_their_hash_alone(
    tmp_path: Path, extractor: Inception, monkeypatch: pytest.MonkeyPatch
):
    path = save(tmp_path / "any-name.bin", extractor.network.state_dict())
    monkeypatch.setattr(inception, "SHA256", inception.file_sha256(path)[:8])
    loaded = inception.load_inception(path)
    assert (loaded.name, loaded.warnings) == (inception.PUBLISHED, ())
    inception.require_published(path)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: {"fc.weight": torch.zeros(2)}, "another model"),
        (lambda state: {name: value * 0 for name, value in state.items()}, "matrices are zero"),
        (lambda state: state | {"fc.bias": state["fc.bias"] / 0 * 0}, "not finite"),
        (lambda state: state | {"fc.bias": state["fc.bias"] + torch.inf}, "not finite"),
        (lambda state: state | {"fc.bias": state["fc.bias"].int()}, "stored as int32"),
        (lambda state: state | {"fc.bias": state["fc.bias"].to("meta")}, "a meta tensor"),
        (lambda state: {"a": 1}, "expected tensors by name"),
    ],
)
def test_weights_that_no_training_left_are_refused(
    change: Callable[[Weights], Weights], words: str, tmp_path: Path, extractor: Inception
):
    path = save(tmp_path / "weights.pth", change(dict(extractor.network.state_dict())))
    with pytest.raises(ValueError, match=words):
        inception.load_inception(path)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda name, value: (f"module.{name}", value), "removed from the names"),
        (lambda name, value: (name, round_to(torch.float16, value)), "stored in fp16"),
        (lambda name, value: (name, round_to(torch.bfloat16, value)), "stored in bf16"),
        (lambda name, value: (name, round_to(torch.float8_e5m2, value)), "stored in fp8"),
    ],
)
def test_what_the_weights_lost_is_said(
    change: Callable[[str, torch.Tensor], tuple], words: str, tmp_path: Path, extractor: Inception
):
    """A warning says how weights were renamed or rounded."""
    state = extractor.network.state_dict().items()
    path = save(tmp_path / "weights.pth", dict(change(name, value) for name, value in state))
    lost, unknown = inception.load_inception(path).warnings
    assert words in lost
    assert "unknown Inception weights" in unknown


def test_files_of_old_versions_of_torch_are_read(tmp_path: Path, extractor: Inception):
    state = extractor.network.state_dict()
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    loaded = inception.load_inception(save(tmp_path / "old.pth", old))
    assert torch.equal(loaded.network.fc.weight, extractor.network.fc.weight)


def test_a_missing_file_says_where_to_get_it(tmp_path: Path):
    with pytest.raises(ValueError, match="no such Inception weights; get https"):
        inception.load_inception(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="is a folder, and no Inception weights"):
        inception.load_inception(tmp_path)


def test_weights_that_hold_code_are_refused_unrun(tmp_path: Path):
    ran = tmp_path / "ran"

    class Touch:
        def __reduce__(self) -> tuple:
            return Path.touch, (ran,)

    torch.save({"fc.weight": Touch()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="it holds pickled code"):
        inception.load_inception(tmp_path / "weights.pth")
    assert not ran.exists()
