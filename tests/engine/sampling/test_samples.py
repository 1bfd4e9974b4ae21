"""Images on disk: independent of the batch, resumed, and shuffled with their labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.declared.protocols import DIGITS
from experiments.engine.data.image_files import ImageFile, find_common_order
from experiments.engine.data.quantise import to_uint8
from experiments.engine.runtime.context import Resources, RunContext
from experiments.engine.sampling import samples
from experiments.engine.sampling.generate import generate_images, image_labels
from experiments.engine.sampling.networks import Decoder
from experiments.engine.sampling.samples import (
    ImageSource,
    SampleSet,
    fill_sample_folder,
    generate_samples,
)
from experiments.engine.scoring.files.folders import ImageFolder
from experiments.engine.specs.spec import Checkpoint, Evaluate, spec_id
from experiments.engine.training.networks import build
from tests.support.networks import randomise
from tests.support.sampling import CPU, SPEC, TINY, levels_of

IDENTITY = {"network": "1"}


def keep(x: Tensor) -> Tensor:
    """The decoder of pixels."""
    return x


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write five images a file, so that a small set takes several files."""
    monkeypatch.setattr(samples, "CHUNK", 5)


def fill(
    folder: Path,
    decode: Callable[[Tensor], Tensor] = keep,
    **identity: Any,
) -> SampleSet:
    """Draw the images of SPEC into a folder, four at a time, by a network of this identity."""
    network = build(TINY, 0, CPU).eval()
    source = ImageSource(network, Decoder(decode, {}), IDENTITY | identity)
    return fill_sample_folder(SPEC, folder, source, RunContext(folder, Resources(sample_batch=4)))


# ---- What a set holds


def test_a_set_holds_every_image_once_quantised_in_the_order_of_its_labels(tmp_path: Path):
    drawn = fill(tmp_path)
    assert drawn.shape == (23, 8, 8, 3)

    # Every image is there once, and the order is shuffled.
    assert sorted(drawn.index) == list(range(23))
    assert list(drawn.index) != list(range(23))

    # Images and labels are those of the sampler, in that order; rounding may differ by a level.
    network = build(TINY, 0, CPU).eval()
    x = torch.cat([x for x, _ in generate_images(SPEC, network, CPU, 4)])
    expected = to_uint8(x).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    off = np.abs(levels_of(drawn).astype(int) - expected[drawn.index])
    assert off.max() <= 1
    labels = image_labels("random", 23, 10, 0).numpy()
    np.testing.assert_array_equal(drawn.labels, labels[drawn.index])


def test_another_batch_size_draws_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At a size at which convolutions do round by the batch."""
    monkeypatch.setattr(samples, "CHUNK", 12)
    wide = TINY.but(dim=24, input_size=32)
    data = replace(SPEC.train.data, size=32)
    spec = replace(SPEC, train=replace(SPEC.train, backbone=wide, data=data), num=12)
    source = ImageSource(randomise(build(wide, 0, CPU)).eval(), Decoder(keep, {}), {})

    def draw(batch: int) -> np.ndarray:
        context = RunContext(tmp_path, Resources(sample_batch=batch))
        return levels_of(fill_sample_folder(spec, tmp_path / str(batch), source, context))

    np.testing.assert_array_equal(draw(3), draw(8))


def test_a_network_that_diverged_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="not finite"):
        fill(tmp_path, decode=lambda x: x / 0)


# ---- Interrupted and mixed sets


def test_a_stopped_run_goes_on_and_draws_nothing_twice(tmp_path: Path):
    whole = levels_of(fill(tmp_path / "whole"))
    decoded: list[int] = []

    def count(x: Tensor) -> Tensor:
        decoded.append(len(x))
        return x

    def fail_after_twelve(x: Tensor) -> Tensor:
        if sum(decoded) + len(x) > 12:
            raise KeyboardInterrupt
        return count(x)

    # Two whole files are left by a run that is cut in the third.
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "cut", decode=fail_after_twelve)
    names = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert names == ["00000000.npy", "00000005.npy", "counts", "made.json"]

    # The next run draws the other thirteen images.
    decoded.clear()
    again = fill(tmp_path / "cut", decode=count)
    assert sum(decoded) == 13
    np.testing.assert_array_equal(levels_of(again), whole)


@pytest.mark.parametrize(
    "identity, complaint",
    [({"network": "2"}, "another network"), ({"decoder": {}}, "another decoder")],
)
def test_images_of_another_network_or_decoder_are_not_mixed(
    identity: dict[str, Any], complaint: str, tmp_path: Path
):
    fill(tmp_path / "samples")
    with pytest.raises(ValueError, match=complaint):
        fill(tmp_path / "samples", **identity)


# ---- Files


def test_packed_files_read_back_with_labels_order_and_origin(tmp_path: Path):
    """A packed file holds the folder's images, and says where they come from."""
    drawn = fill(tmp_path / "samples")
    drawn.pack(tmp_path / "a.npz")
    packed = ImageFile(tmp_path / "a.npz")

    # The arrays, and the origin.
    np.testing.assert_array_equal(np.concatenate(list(packed.batches())), levels_of(drawn))
    np.testing.assert_array_equal(packed.labels, drawn.labels)
    np.testing.assert_array_equal(packed.index, drawn.index)
    assert packed.origin == IDENTITY | {
        "data": "digits",
        "labels": "random",
        "order": samples.ORDER,
        "seed": 0,
        "precision": "fp32",
        "nfe": 3,
    }


def test_pngs_are_lossless_and_named_by_index_and_label(tmp_path: Path):
    from PIL import Image

    drawn = fill(tmp_path / "samples")
    folder = tmp_path / "png"
    drawn.write_png(folder)

    named = zip(drawn.index, drawn.labels, strict=True)
    names = [f"{index:06d}-{label}.png" for index, label in named]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    pictures = np.stack([np.asarray(Image.open(folder / name)) for name in names])
    np.testing.assert_array_equal(pictures, levels_of(drawn))

    # Each file bears the spec's id and the digest of the weights.
    for name in names:
        assert Image.open(folder / name).info["set"] == f"{spec_id(SPEC)}-1"

    # The folder knows labels, seeds and origin as the packed file does.
    drawn.pack(tmp_path / "a.npz")
    packed = ImageFile(tmp_path / "a.npz")
    stored = ImageFolder(folder)
    assert stored.origin == packed.origin
    assert stored.labels is not None
    find_common_order(packed, stored)

    # A part of the set does not.
    (folder / names[0]).unlink()
    assert ImageFolder(folder).origin is None


# ---- Published checkpoints


def checkpoint_spec(sha256: str) -> Evaluate:
    """SPEC, of weights with this digest instead of a training's."""
    return replace(SPEC, train=Checkpoint(TINY, DIGITS.data, sha256))


def test_a_published_checkpoint_has_an_id_of_its_own():
    specs = (SPEC, checkpoint_spec("0" * 64), checkpoint_spec("1" * 64))
    assert len({spec_id(spec) for spec in specs}) == 3


def test_a_published_checkpoint_is_sampled_under_its_own_id(tmp_path: Path):
    network = build(TINY, 0, CPU)
    torch.save({"ema": network.state_dict()}, tmp_path / "a.pt")
    resources = Resources(checkpoint=tmp_path / "a.pt", sample_batch=4)
    spec = checkpoint_spec("0" * 64)
    drawn = generate_samples(spec, RunContext(tmp_path / "runs" / "x", resources))
    assert (tmp_path / "runs" / spec_id(spec) / "samples").is_dir()
    np.testing.assert_array_equal(levels_of(drawn), levels_of(fill(tmp_path / "direct")))


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"network": ', b"[]", b"null", b"\xff\xfe", b"no"]
)
def test_a_damaged_origin_is_named(content: bytes, tmp_path: Path):
    whole = fill(tmp_path / "set")
    path = tmp_path / "set" / "made.json"
    path.write_bytes(content)
    for use in (
        lambda: fill(tmp_path / "set"),
        lambda: SampleSet(whole.spec, tmp_path / "set", whole.nfe),
    ):
        with pytest.raises(ValueError, match=r"set/made\.json: no JSON.*; remove the folder") as no:
            use()
        assert "\n" not in str(no.value)
