"""The passes in C equal the references in float64, forward and backward, on odd grids."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backbones import kernels
from backbones.kernels import rows
from experiments.engine.data.sets import load
from experiments.engine.specs.spec import Recipe, Train
from experiments.engine.training.trainer import Trainer
from tests.support.interpreter import INTERPRETED
from tests.support.kernels import with_gradients
from tests.support.trainings import DICO, DIGITS

pytestmark = pytest.mark.skipif(
    INTERPRETED or rows.library() is None, reason="needs a C compiler and AVX2"
)

# Of a unit in the last place of float32, after sums of hundreds of terms.
LIMIT = 1e-5
# Samples, channels, height and width.
# The last two fill no whole vectors.
SHAPES = [(1, 8, 1, 1), (67, 24, 1, 3), (3, 24, 2, 5), (2, 40, 7, 3), (2, 104, 11, 9)]
SHAPES += [(3, 5, 3, 4), (65, 21, 1, 3)]
SIDES_OF_WEIGHT = {"linear": (), "pointwise": (1, 1), "conv3x3": (3, 3)}
# Operations whose passes are shared among threads.
SHARED = ["adaln", "addcmul", "scale", "pool", "gelu", "depthwise 5", "depthwise_gelu 3"]
SHARED += ["pixel_shuffle", "pixel_unshuffle"]
# Operations that multiply matrices.
PRODUCTS = ["linear", "pointwise", "adaln_pointwise_gelu", "pointwise_gated with factor"]
PRODUCTS += ["conv3x3", "conv3x3 few inputs", "attention", "self attention"]
# Inputs and outputs of the convolutions that take all taps in one product.
FEW_CHANNELS = {"conv3x3 few inputs": (2, 7), "conv3x3 few outputs": (13, 3)}


def image(*shape: int) -> Tensor:
    return normal(*shape).contiguous(memory_format=torch.channels_last)


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def part(n: int, c: int, index: int) -> Tensor:
    """Return one of six parts of a modulation, whose rows lie apart: (N, C)."""
    return normal(n, 6 * c).chunk(6, dim=1)[index]


def inputs_of(op: str, n: int, c: int, h: int, w: int) -> list[Tensor]:
    """Return inputs of one operation, in float64."""
    gate = part(n, c, 4)[..., None, None]
    if op == "adaln":
        return [normal(n, h * w, c), part(n, c, 0)[:, None], part(n, c, 1)[:, None]]
    if op == "addcmul":
        return [image(n, c, h, w), gate, image(n, c, h, w)]
    if op == "scale":
        return [image(n, c, h, w), gate]
    alone = {"pixel_shuffle": (n, 4 * c, h, w), "pixel_unshuffle": (n, c, 2 * h, 2 * w)}
    alone |= dict.fromkeys(("pool", "gelu"), (n, c, h, w))
    if op in alone:
        return [image(*alone[op])]
    if op == "linear of a grid":
        return [normal(n, h, w, c), normal(2 * c, c), normal(2 * c)]
    name = op.partition(" ")[0]
    if name in SIDES_OF_WEIGHT:
        inputs, outputs = FEW_CHANNELS.get(op, (c, 2 * c))
        x = normal(n, h * w, c) if name == "linear" else image(n, inputs, h, w)
        return [x, normal(outputs, inputs, *SIDES_OF_WEIGHT[name]), normal(outputs)]

    if "attention" in op:
        return inputs_of_attention(op, n, c, h * w)

    # Operations that are fused with others, and convolutions named by their kernels.
    if op.startswith("adaln_pointwise"):
        modulation = [part(n, c, i)[..., None, None] for i in range(2)]
        return [image(n, c, h, w), *modulation, normal(16, c, 1, 1), normal(16)]
    if op.startswith("pointwise_gated"):
        inputs = [image(n, c, h, w), gate, image(n, 40, h, w), normal(c, 40, 1, 1), normal(c)]
        return [*inputs, normal(n, 40, 1, 1)] if "factor" in op else inputs
    side = int(op[-1])
    return [image(n, c, h, w), normal(c, 1, side, side), normal(c)]


def inputs_of_attention(op: str, n: int, c: int, t: int) -> list[Tensor]:
    """Return inputs of two heads, in float64."""
    # Long queries would leave one key all the weight, and gradients of nothing.
    if op == "channel_attention":
        heads = [scale * normal(n, 2, c, t) for scale in (0.1, 1.0, 1.0)]
        norms = [1 + normal(n, 2, c, 1).abs() for _ in range(2)]
        return [*heads, *norms, normal(2, 1, 1)]
    keys = t if "self" in op else 3
    heads = [normal(n, 2, tokens, 5) for tokens in (t, keys, keys)]
    return [*heads, normal(1, 2, t, keys)] if "bias" in op else heads


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "case",
    ["adaln", "addcmul", "scale", "pool", "gelu", "conv3x3", "depthwise 3", "depthwise 5"]
    + ["depthwise 7", "depthwise_gelu 3", "depthwise_gelu 5", "depthwise_gelu 7"]
    + ["linear", "linear of a grid", "pointwise", "adaln_pointwise_gelu"]
    + ["pointwise_gated", "pointwise_gated with factor", "channel_attention"]
    + ["attention", "self attention", "attention with bias", "pixel_shuffle", "pixel_unshuffle"]
    + ["conv3x3 few inputs", "conv3x3 few outputs"],
)
def test_a_pass_computes_what_the_reference_computes(case: str, shape: tuple[int, ...]):
    name = case.removeprefix("self ").split()[0]
    op = getattr(kernels, name)
    inputs = inputs_of(case, *shape)
    truths = with_gradients(op.choices["reference"].run, inputs)
    with kernels.use(**{name: "rows"}):
        values = with_gradients(op, [x.float() for x in inputs])
    for value, truth in zip(values, truths, strict=True):
        assert value.shape == truth.shape
        assert (value - truth).norm() <= LIMIT * truth.norm()


@pytest.mark.parametrize("name", ["pixel_shuffle", "pixel_unshuffle"])
def test_a_gradient_of_joined_channels_is_shuffled_where_it_lies(name: str):
    op = getattr(kernels, name)
    (x,) = inputs_of(name, 3, 5, 4, 2)
    other = op(x)

    def join(x: Tensor) -> Tensor:
        return torch.cat([other.to(x.dtype), op(x)], dim=1)

    truth = with_gradients(join, [x])
    with kernels.use(**{name: "rows"}):
        value = with_gradients(join, [x.float()])
    assert all(torch.equal(a, b.float()) for a, b in zip(value, truth, strict=True))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", SHARED)
def test_threads_that_share_a_pass_change_no_bit(case: str, shape: tuple[int, ...]):
    op = getattr(kernels, case.split()[0])
    inputs = [x.float() for x in inputs_of(case, *shape)]
    with threads(1):
        alone = with_gradients(op, inputs)
    with threads(3):
        kernels.reset_used()
        shared = with_gradients(op, inputs)
        assert kernels.used()[op.name] == ["rows"]
        assert rows.library().threads() == 3
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a processor with AVX-512"
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", PRODUCTS)
def test_vectors_of_any_width_give_the_same_bits(
    case: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    name = case.removeprefix("self ").split()[0]
    inputs = [x.float() for x in inputs_of(case, *shape)]
    results = []
    for capability in rows.CAPABILITIES:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        monkeypatch.setattr(rows, "library", cache(rows.library.__wrapped__))
        with kernels.use(**{name: "rows"}):
            results.append(with_gradients(getattr(kernels, name), inputs))
        monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("size", [(1, 1), (8, 64), (70, 13), (129, 40), (64, 7), (3, 9)])
def test_a_matrix_is_laid_out_transposed(size: tuple[int, int]):
    x = normal(*size).float()
    for matrix in (x, x.t(), x.double()):
        for count in (1, 2):
            with threads(count):
                turned = rows.transposed(matrix)
            assert torch.equal(turned, matrix.t())
            assert turned.is_contiguous()


def test_gelu_is_exact_far_from_zero():
    x = torch.linspace(-40, 40, 8000)
    truth = torch.nn.functional.gelu(x.double())
    assert (rows.gelu(x) - truth).abs().max() < 1e-6 * truth.abs().max()
    assert rows.gelu(torch.tensor([float("nan")] * 8)).isnan().all()


@pytest.mark.parametrize(
    "case", ["depthwise 3", "conv3x3", "conv3x3 few inputs", "conv3x3 few outputs"]
)
def test_a_convolution_needs_no_bias(case: str):
    op = getattr(kernels, case.split()[0])
    inputs = inputs_of(case, 2, 24, 3, 5)[:2]
    truths = with_gradients(op.choices["reference"].run, inputs)
    with kernels.use(**{op.name: "rows"}):
        values = with_gradients(op, [x.float() for x in inputs])
    for value, truth in zip(values, truths, strict=True):
        assert (value - truth).norm() <= LIMIT * truth.norm()


def test_a_convolution_of_images_needs_no_gradient_of_them():
    x, weight, bias = (x.float() for x in inputs_of("conv3x3", 70, 16, 2, 3))
    conv = kernels.conv3x3.choices["rows"].run
    weight.requires_grad_()
    (alone,) = torch.autograd.grad(conv(x, weight, bias).sum(), weight)
    (beside,) = torch.autograd.grad(conv(x.requires_grad_(), weight, bias).sum(), weight)
    assert torch.equal(alone, beside)


def attend_by_parts(packed: Tensor) -> Tensor:
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    return kernels.attention.choices["reference"].run(q, k, v)


@pytest.mark.parametrize("shape", [(3, 7, 3, 2, 5), (2, 4, 3, 2, 8)], ids=str)
def test_queries_keys_and_values_return_their_gradients(shape: tuple[int, ...]):
    packed = normal(*shape)
    truths = with_gradients(attend_by_parts, [packed])
    with kernels.use(attention="rows"):
        values = with_gradients(lambda x: kernels.attention(*kernels.unpack(x)), [packed.float()])
    for value, truth in zip(values, truths, strict=True):
        assert (value - truth).norm() <= LIMIT * truth.norm()


def test_a_training_follows_the_references():
    spec = Train(DICO.but(dim=16), DIGITS, Recipe(steps=8, batch=16, lr=1e-3))
    kernels.reset_used()
    losses = [loss.item() for loss in Trainer(spec).steps(load(DIGITS))]
    assert "rows" in kernels.used()["depthwise_gelu"]
    with kernels.use(**kernels.references()):
        truths = [loss.item() for loss in Trainer(spec).steps(load(DIGITS))]
    assert losses == pytest.approx(truths, rel=1e-4)


def test_a_machine_without_a_compiler_runs_the_references(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.warns(UserWarning, match=r"/bin/false did not build the passes in C"):
        assert rows.library.__wrapped__() is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match="no C compiler"):
        assert rows.library.__wrapped__() is None
    assert not list(tmp_path.glob("**/*.so"))


def test_the_source_compiles_without_a_warning(tmp_path: Path):
    with_parts = [source for source in rows.SOURCES if "PARTS" in source.read_text()]
    assert with_parts
    variants = [("-DWHOLE", rows.SOURCES), ("-mavx512f", rows.SOURCES), ("-DPARTS", with_parts)]
    for choice, sources in variants:
        command = ["cc", *rows.FLAGS, "-O0", "-Wall", "-Wextra", choice, *sources]
        built = subprocess.run(
            [*command, "-o", tmp_path / "rows.so"], capture_output=True, text=True
        )
        assert (built.returncode, built.stderr) == (0, "")
