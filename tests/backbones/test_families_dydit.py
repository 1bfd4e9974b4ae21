"""What is particular to DyDiT: the authors' gates, its three paths, and what they cost."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones import kernels
from backbones.routers import Gates, open_gate, used_share
from experiments.engine.timing.cost import MacCounter, count_network
from tests.support.authors import (
    CASES,
    build_like_authors,
    digest_shapes,
    draw_normal,
    inputs_of,
    largest_error,
)
from tests.support.networks import randomise, relative_rms

CASE = CASES["dydit"]
TRAINING = CASE["training"]
SMALL = dict(input_size=6, in_channels=3, num_classes=7)


def network(**options: object) -> nn.Module:
    return backbones.build("dydit_s_2", **backbones.tiny_options_of("dydit_s_2") | SMALL | options)


def inputs(time: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y of three images, at one time if it is given; the last label is the null label."""
    x = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 37, 999]) if time is None else torch.full((3,), time)
    return x, t, torch.tensor([0, 3, 7])


def authors() -> nn.Module:
    """Build the authors' small network; its routers are drawn so that gates fall both ways."""
    model = build_like_authors(CASE)
    for key, p in model.named_parameters():
        if ".router." in key or ".token_selection." in key:
            noise = draw_normal(zlib.crc32(key.encode()), tuple(p.shape))
            p.data = (CASE["router_gain"] * noise).float()
    return model


def logistic(block: int, field: str, shape: tuple[int, ...]) -> Tensor:
    """Draw the noise of a block's gates as the file of the authors' outputs does."""
    name = f"noise.{TRAINING['noise_seed']}.{block}.{field}"
    u = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).random(shape)
    return torch.from_numpy(np.log(u / (1 - u))).float()


def assert_gates(gates: Gates, expected: dict[str, list[int]]) -> None:
    for field, values in expected.items():
        gate = getattr(gates, field)
        assert torch.equal(gate, torch.tensor(values, dtype=gate.dtype).view(gate.shape)), field


def test_outputs_and_gates_are_those_of_the_authors_code():
    model = authors()
    assert sum(p.numel() for p in model.parameters()) == CASE["params"]
    assert digest_shapes(model.state_dict()) == CASE["digest"]
    x, t, y = inputs_of(CASE)
    same = t[1].expand(2)

    with torch.no_grad():
        out, gates = model.forward_with_gates(x, t, y)
        ours = dict(output=out, complete=model.forward_complete(x, t, y))
        ours["same_t"] = model(x, same, y)
        gathered = model.forward_gathered(x, same, y)

        # Guidance of three channels at scale 1.5, as the authors return it.
        labelled, null = model(x[:1].expand(2, -1, -1, -1), t[:1].expand(2), y).chunk(2)
        guided = null[:, :3] + 1.5 * (labelled[:, :3] - null[:, :3])
        rows = [torch.cat([guided, half[:, 3:]], dim=1) for half in (labelled, null)]
        ours["cfg"] = torch.cat(rows)

    assert_gates(gates, CASE["gates"])
    for name, values in CASE["outputs"].items():
        assert largest_error(ours[name], CASE, values) < CASE["tolerance"], name
    assert largest_error(gathered, CASE, CASE["outputs"]["same_t"]) < CASE["tolerance"]
    assert backbones.guided_channels_of(model) == 3


def test_training_with_noise_is_that_of_the_authors_code():
    """Gates, loss of the work and gradients, which pass straight through the gates."""
    model = authors().train()
    shapes = model.gate_shapes(2)
    noise = Gates(
        **{
            field: torch.stack(
                [logistic(block, field, (shape[0], *shape[2:])) for block in range(shape[1])], dim=1
            )
            for field, shape in shapes.items()
        }
    )
    out, gates = model.forward_with_gates(*inputs_of(CASE), noise)
    assert_gates(gates, TRAINING["gates"])
    assert largest_error(out, CASE, TRAINING["output"]) < CASE["tolerance"]

    # The authors hold the mean share of a batch at a target.
    share = used_share(gates, TRAINING["attention"], TRAINING["mlp"]).mean()
    flops = TRAINING["weight"] * (share - TRAINING["target"]) ** 2
    torch.testing.assert_close(torch.stack([flops, share]), torch.tensor(TRAINING["flops"]))

    (out.square().mean() + flops).backward()
    parameters = dict(model.named_parameters())
    for key, values in TRAINING["gradients"].items():
        gradient = parameters[key].grad
        assert largest_error(gradient, CASE, values) < 1e-5 * gradient.abs().max(), key


@pytest.mark.parametrize("time", [0, 37, 999])
def test_the_gathered_path_is_the_masked_one(time: int):
    model = randomise(network(heads=6, depth=4)).double().eval()
    x, t, y = inputs(time)
    x = x.double()
    with torch.no_grad():
        masked, gates = model.forward_with_gates(x, t, y)
        gathered = model.forward_gathered(x, t, y)
    assert relative_rms(gathered, masked) < 1e-12
    assert 0.1 < used_share(gates, 1, 2).mean() < 0.9
    for gate in (gates.heads, gates.groups):
        assert torch.equal(gate[0], gate[1])  # width depends on time, not on the label


@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_the_gathered_path_takes_blocks_that_are_all_off_or_all_on(bias: float):
    model = randomise(network()).double().eval()
    for key, p in model.named_parameters():
        if ".router.bias" in key or ".mlp_head.2.bias" in key:
            nn.init.constant_(p, bias)
    x, t, y = inputs(37)
    with torch.no_grad():
        masked, gates = model.forward_with_gates(x.double(), t, y)
        assert relative_rms(model.forward_gathered(x.double(), t, y), masked) < 1e-12
    assert gates.tokens.unique().tolist() == [float(bias > 0)]
    assert gates.heads[..., 0].all() and gates.groups[..., 0].all()
    assert bool(gates.heads[..., 1:].any()) == (bias > 0)


def test_the_gathered_path_serves_inference_if_asked_to_and_needs_one_time():
    model = randomise(network(gathered=True))
    with torch.no_grad():
        assert torch.equal(model.eval()(*inputs(37)), model.forward_gathered(*inputs(37)))
    model.train()(*inputs())
    with pytest.raises(ValueError, match="give all images of a batch the same t") as refusal:
        model.eval()(*inputs())
    assert "\n" not in str(refusal.value)


def test_the_gathered_path_runs_in_half_precision_and_with_one_condition_for_all():
    model = randomise(network()).eval()
    x, t, y = inputs(37)
    with torch.no_grad():
        exact = model.forward_gathered(x, t, y)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_rms(model.forward_gathered(x, t, y), exact) < 0.1
        shared = model.forward_gathered(x, t[:1], y[:1])
        assert relative_rms(shared, model.forward_gathered(x, t, y[:1].expand(3))) < 1e-5


def test_a_network_fresh_from_a_dense_one_computes_its_output_bit_for_bit():
    tiny = backbones.tiny_options_of("dydit_s_2")
    dense = randomise(backbones.build("dit_s_2", **tiny | SMALL))
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items() if "rate" in key}
    model.load_dense(dense.state_dict())
    with torch.no_grad():
        truth = dense(*inputs())
        out, gates = model.forward_with_gates(*inputs())
        assert torch.equal(out, truth)
        assert torch.equal(model.forward_complete(*inputs()), truth)
    assert torch.equal(used_share(gates, 1, 2), torch.ones(3))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())

    # The complete path is DiT's whatever the gates are.
    other = randomise(network(), seed=3)
    other.load_dense(dense.state_dict())
    with torch.no_grad():
        assert torch.equal(other.forward_complete(*inputs()), truth)
        assert not torch.equal(other(*inputs()), truth)


def test_a_dense_checkpoint_is_refused_in_a_line_that_says_so(tmp_path: Path):
    tiny = backbones.tiny_options_of("dydit_s_2")
    dense = randomise(backbones.build("dit_s_2", **tiny | SMALL)).state_dict()
    torch.save(dense, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="weights of a dense DiT, which has no routers") as refusal:
        backbones.load_published(network(), tmp_path / "dit.pt")
    assert "\n" not in str(refusal.value)

    # The opposite is refused too, and a network of another depth.
    with pytest.raises(ValueError, match="2 keys or shapes differ.*blocks.0.attn.qkv.bias"):
        without = {key: value for key, value in dense.items() if ".attn.qkv.bias" not in key}
        network().load_dense(without)
    with pytest.raises(ValueError, match="keys or shapes differ.*pos_embed"):
        network(input_size=8).load_dense(dense)
    trained = randomise(network()).state_dict()
    torch.save(trained, tmp_path / "dydit.pt")
    assert backbones.load_published(network(), tmp_path / "dydit.pt").startswith("none")
    with pytest.raises(ValueError, match="unexpected blocks.0.attn_rate.router.weight"):
        backbones.load_published(backbones.build("dit_s_2", **tiny | SMALL), tmp_path / "dydit.pt")


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(heads=1), "heads 1"),
        (dict(dim=12), "dim 12"),
        (dict(heads=5), "heads 5"),
        (dict(mlp_ratio=0.53), "mlp_ratio 0.53"),
        (dict(input_size=7), "input_size 7"),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(options: dict[str, float], word: str):
    with pytest.raises(ValueError, match="DyDiT needs .* at least 2 heads and a dim of") as refusal:
        network(**options)
    assert word in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_gate_is_hard_forward_and_soft_backward():
    logits = torch.tensor([-3.0, -0.1, 0.0, 0.1, 3.0], requires_grad=True)
    gate = open_gate(logits, None)
    assert gate.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    gate.sum().backward()
    soft = torch.sigmoid(logits.detach() / 5)
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 5)

    # Noise decides, and a gate is on with probability sigmoid(logit) whatever the temperature.
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    drawn = open_gate(torch.full((100_000,), 0.7), torch.log(u / (1 - u)))
    assert abs(drawn.mean() - torch.sigmoid(torch.tensor(0.7))) < 0.01


@pytest.mark.parametrize(
    "name, attention, mlp",
    [
        ("dydit_s_2", 201_326_592, 301_989_888),
        ("dydit_b_2", 704_643_072, 1_207_959_552),
        ("dydit_xl_2", 1_509_949_440, 2_717_908_992),
    ],
)
def test_the_gated_work_of_a_block_is_the_authors_constant(name: str, attention: int, mlp: int):
    with torch.device("meta"):
        assert backbones.build(name).gated_macs() == (attention, mlp)


def test_the_gates_left_out_cost_what_dit_costs():
    """Routers cost half a percent; the published 118.69 leaves them out."""
    with torch.device("meta"):
        model = backbones.build("dydit_xl_2")
    x = torch.empty(1, 4, 32, 32, device="meta")
    t = torch.zeros(1, dtype=torch.long, device="meta")
    with torch.no_grad(), kernels.use(attention="reference"), MacCounter() as macs:
        model.forward_complete(x, t, t)

    # The authors' fused attention hides that queries are scaled.
    all_on = count_network(model, 32, 4)
    queries = 28 * 256 * 1152
    assert round(macs.core / 1e9, 4) == 118.6214
    assert round((macs.core + macs.extra - queries) / 1e9, 4) == 118.6547
    assert round((all_on["macs_torchprofile"] - queries) / 1e9, 4) == 119.3003

    # A block has two routers that see t, and one that sees every token.
    routers = 28 * (2 * 1152 * 15 + 256 * (1152 * 72 + 72))
    assert all_on["macs_core"] - macs.core == routers


def test_the_gathered_path_spends_the_share_that_the_gates_leave_on():
    model = randomise(network(heads=6, depth=4)).eval()
    x, t, y = (part[:1] for part in inputs(37))
    spent = []
    with torch.no_grad(), kernels.use(**kernels.references()):
        for path in (model.forward_complete, model.forward, model.forward_gathered):
            with MacCounter() as macs:
                path(x, t, y)
            spent.append(macs.core)
        share = used_share(model.forward_with_gates(x, t, y)[1], *model.gated_macs())
    complete, masked, gathered = spent
    assert 0.1 < share < 0.9
    off = (1 - share.item()) * len(model.blocks) * sum(model.gated_macs())
    assert gathered == round(masked - off) < complete < masked
