"""DiS: its small network, and what is particular to it."""

from typing import Any

import pytest
import torch
from test_backbones import randomise, relative_rms, weights_and_biases
from torch import Tensor, nn

import backbones
from backbones.dis import BidirectionalMamba
from backbones.kernels import use
from backbones.mamba import Mamba

CHANNELS, CLASSES = 3, 7
FAMILIES = {"dis_s_2": 6}  # one size stands for its family; the side of the input
LEARNS_SIGMA = {"dis_s_2"}
STARTS_AT_ZERO: set[str] = set()  # DiS has an open head
DEAD: dict[str, tuple[str, ...]] = {"dis_s_2": ()}
every_family = pytest.mark.parametrize("name", FAMILIES)


def network(name: str, **options: Any) -> nn.Module:
    shape = dict(input_size=FAMILIES[name], in_channels=CHANNELS, num_classes=CLASSES)
    return backbones.build(name, **backbones.tiny_options_of(name) | shape | options)


def inputs(name: str, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y; the last label is the null label."""
    x = torch.randn(batch, CHANNELS, FAMILIES[name], FAMILIES[name], generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 37, 999])[-batch:], torch.tensor([0, 3, CLASSES])[-batch:]


def out_channels(name: str) -> int:
    return CHANNELS * (2 if name in LEARNS_SIGMA else 1)


@every_family
def test_starts_the_same_from_a_seed_and_on_the_meta_device(name: str):
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(network(name))
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    with torch.no_grad():
        out = models[0](*inputs(name))
    assert out.any() == (name not in STARTS_AT_ZERO) and out.isfinite().all()
    with torch.device("meta"):
        meta = network(name).to("meta")
    assert {key: value.shape for key, value in meta.state_dict().items()} == {key: value.shape for key, value in first.items()}
    assert meta(*(part.to("meta") for part in inputs(name))).shape == out.shape


@every_family
def test_is_a_function_of_each_sample(name: str):
    model = randomise(network(name))
    size = FAMILIES[name]
    assert (model.input_size, model.in_channels, model.num_classes, model.out_channels) == (size, CHANNELS, CLASSES, out_channels(name))
    x, t, y = inputs(name)
    with torch.no_grad():
        out = model(x, t, y)
        assert out.shape == (3, out_channels(name), size, size) and out.isfinite().all()
        assert torch.equal(out, model(x, t, y)) and torch.equal(out, model.eval()(x, t, y))
        for i in range(3):
            assert relative_rms(out[i], model(x[i:i + 1], t[i:i + 1], y[i:i + 1])[0]) <= 1e-5
        exact = model.double()(x.double(), t, y)
        assert exact.dtype == torch.float64 and relative_rms(out, exact) <= 1e-5


@every_family
def test_every_choice_of_kernels_gives_the_same(name: str):
    model = randomise(network(name)).double()
    x, t, y = inputs(name)
    with torch.no_grad(), use(selective_scan="reference", causal_conv="reference", attention="reference"):
        truth = model(x.double(), t, y)
    with torch.no_grad():
        assert relative_rms(model(x.double(), t, y), truth) <= 1e-12


@every_family
def test_runs_under_autocast_with_its_residual_stream_in_float32(name: str):
    model = randomise(network(name))
    with torch.no_grad():
        exact = model(*inputs(name))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(*inputs(name))
    assert relative_rms(out, exact) < 0.1


@every_family
def test_gradients_reach_every_live_parameter(name: str):
    model = randomise(network(name))
    x, t, y = inputs(name)
    x.requires_grad_()
    out = model(x, t, y)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
    dead = {key for key, p in model.named_parameters() if not p.requires_grad}
    for key, p in [("x", x), *model.named_parameters()]:
        assert p.grad is None if key in dead else p.grad.isfinite().all() and p.grad.any(), key
    assert dead == {key for key in model.state_dict() if key.endswith(DEAD[name])}


@every_family
def test_another_input_size_is_refused_in_a_line(name: str):
    size = FAMILIES[name]
    _, t, y = inputs(name)
    for other in (size + 2, 2 * size):
        with pytest.raises(ValueError, match=f"{other}x{other}.*input_size") as refusal:
            network(name)(torch.zeros(3, CHANNELS, other, other), t, y)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name, options, words", [
    ("dis_s_2", {"input_size": 7}, ["divisible by patch", "7"]),
    ("dis_s_2", {"depth": 3}, ["even depth", "3"]),
])
def test_errors_name_what_is_known(name: str, options: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError) as refusal:
        backbones.build(name, **options)
    assert "\n" not in str(refusal.value) and all(word in str(refusal.value) for word in words)


@every_family
def test_learn_sigma_doubles_the_head(name: str):
    for learn_sigma in (True, False):
        out = network(name, learn_sigma=learn_sigma)(*inputs(name))
        assert out.shape[1] == CHANNELS * (2 if learn_sigma else 1)


def depends(out: Tensor, x: Tensor) -> Tensor:
    """Which positions of x (1, T, D) each position of the output (1, T, D) depends on."""
    rows = [torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)[0][0].abs().sum(-1) > 0 for i in range(out.shape[1])]
    return torch.stack(rows)


def test_mamba_is_causal_and_its_twin_reads_both_ways():
    x = torch.randn(1, 9, 12, requires_grad=True)
    past = torch.ones(9, 9, dtype=torch.bool).tril()
    assert torch.equal(depends(randomise(Mamba(12))(x), x), past)
    mixer = randomise(BidirectionalMamba(12))
    assert depends(mixer(x), x).all()
    for silent, seen in (("_b", past), ("", past.T)):
        mixer = randomise(BidirectionalMamba(12))
        nn.init.zeros_(getattr(mixer, f"x_proj{silent}").weight)  # no b and no c: the scan keeps and reads nothing
        nn.init.zeros_(getattr(mixer, f"D{silent}"))
        assert torch.equal(depends(mixer(x), x), seen)


def test_dis_skips_carry_the_increments_of_the_in_blocks_last_in_first_out():
    model = randomise(network("dis_s_2"))
    made: list[Tensor] = []
    taken: list[Tensor] = []
    for block in model.in_blocks:
        block.mixer.register_forward_hook(lambda mixer, args, out: made.append(out))
    for block in model.out_blocks:
        block.register_forward_pre_hook(lambda block, args: taken.append(args[2]))
    model(*inputs("dis_s_2"))
    assert len(made) == 2 and all(skip is out for skip, out in zip(taken, reversed(made), strict=True))


def test_dis_has_the_label_in_front_of_the_time_in_front_of_the_patches():
    model = randomise(network("dis_s_2"))
    x, t, y = inputs("dis_s_2")
    seen = []
    model.in_blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    model(x, t, y)
    tokens = (seen[0] - model.pos_embed).detach()
    assert relative_rms(tokens[:, 0], model.label_emb(y).detach()) < 1e-5
    assert relative_rms(tokens[:, 2:], model.patch_embed(x).detach()) < 1e-5


def mamba_keys(dim: int, rank: int, kernel: int = 4, suffix: str = "") -> dict[str, tuple[int, ...]]:
    """One direction of a mixer."""
    inner, b = 2 * dim, suffix
    keys = {f"A{b}_log": (inner, 16), f"D{b}": (inner,), f"conv1d{b}.weight": (inner, 1, kernel), f"conv1d{b}.bias": (inner,)}
    keys |= {f"x_proj{b}.weight": (rank + 32, inner), f"dt_proj{b}.weight": (inner, rank), f"dt_proj{b}.bias": (inner,)}
    return keys | {"in_proj.weight": (2 * inner, dim), "out_proj.weight": (dim, inner)}


def dis_h_2_keys() -> dict[str, tuple[int, ...]]:
    d = 1536
    keys = weights_and_biases({
        "patch_embed.proj": (d, 4, 2, 2), "time_embed.0": (4 * d, d), "time_embed.2": (d, 4 * d),
        "final_layer.linear": (32, d), "final_layer.adaLN_modulation.1": (2 * d, d),
    })
    keys |= {"pos_embed": (1, 258, d), "label_emb.embedding_table.weight": (1001, d), "norm_f.weight": (d,)}
    mixer = mamba_keys(d, 96) | mamba_keys(d, 96, suffix="_b")
    for block in [*(f"{arm}_blocks.{i}" for arm in ("in", "out") for i in range(24)), "mid_block"]:
        keys |= {f"{block}.mixer.{key}": shape for key, shape in mixer.items()} | {f"{block}.norm.weight": (d,)}
        if block.startswith("out"):
            keys |= weights_and_biases({f"{block}.skip_linear": (d, 2 * d)})
    return keys


@pytest.mark.parametrize("name, keys", [("dis_h_2", dis_h_2_keys())])
def test_state_dict_has_the_authors_keys(name: str, keys: dict[str, tuple[int, ...]]):
    with torch.device("meta"):
        state = backbones.build(name).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == keys
