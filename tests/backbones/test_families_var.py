"""VAR and its tokenizer: the authors' outputs, what their kind of network must do, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backbones
from backbones.checkpoint import load_published
from backbones.vqvae import PHIS_OF_TEN, assign_phis
from tests.support.authors import build_like_authors, digest_shapes
from tests.support.networks import randomise, relative_rms
from tests.support.scales import CASES, error_of, images_of

# Parameters and entries of the authors' state_dicts.
PUBLISHED = {
    "var_d16": (310_283_520, 220),
    "var_d20": (600_917_136, 272),
    "var_d24": (1_033_399_360, 324),
    "var_d30": (2_010_020_356, 402),
    "var_d36_s": (2_353_893_904, 446),
    "vqvae_ch160": (108_948_355, 324),
}
CLASSES = 7
NETWORKS = {
    "own modulation": dict(shared_adaln=False),
    "shared modulation": dict(shared_adaln=True),
    "without norms of queries": dict(qk_norm=False),
}
every_network = pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
TOKENIZERS = [name for name in CASES if name.startswith("vqvae")]
TRANSFORMERS = [name for name in CASES if name.startswith("var")]


def network(**options: Any) -> nn.Module:
    tiny = backbones.tiny_options_of("var_d16") | dict(num_classes=CLASSES)
    return backbones.build("var_d16", **tiny | options)


def tokenizer(**options: Any) -> nn.Module:
    return backbones.build("vqvae_ch160", **backbones.tiny_options_of("vqvae_ch160") | options)


def inputs(batch: int = 3) -> tuple[Tensor, Tensor]:
    """Labels, the last of which is the null label, and the inputs of two scales."""
    drawn = torch.randn(batch, 4 + 9, 6, generator=torch.Generator().manual_seed(1))
    return torch.tensor([0, 3, CLASSES])[-batch:], drawn


# ---- Listings


def test_the_kinds_are_listed_apart():
    """Diffusion, which lists backbones, never meets them."""
    assert backbones.list_autoregressive() == sorted(set(PUBLISHED) - {"vqvae_ch160"})
    assert backbones.list_tokenizers() == ["vqvae_ch160"]
    assert not set(PUBLISHED) & set(backbones.list_backbones())
    assert backbones.kind_of("var_d16") is backbones.Kind.AUTOREGRESSIVE
    assert backbones.kind_of("vqvae_ch160") is backbones.Kind.TOKENIZER
    with pytest.raises(ValueError, match="var_d16 is of kind autoregressive, not backbone"):
        backbones.require_kind("var_d16", backbones.Kind.BACKBONE)
    with pytest.raises(ValueError, match="var_d36_s"):
        backbones.build("var_d36")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_entries_are_those_of_the_authors(name: str):
    with torch.device("meta"):
        model = backbones.build(name)
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == PUBLISHED[name]


# ---- The authors' outputs


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_computes_what_the_authors_compute(name: str):
    """Features, codes and images are those of the authors' tokenizer with the same weights."""
    case = CASES[name]
    model = build_like_authors(case)
    state = model.state_dict()
    assert (len(state), digest_shapes(state)) == (case["entries"], case["digest"])
    assert sum(p.numel() for p in model.parameters()) == case["params"]

    # From images to codes, and back.
    with torch.no_grad():
        features = model.encode(images_of(case))
        quantised = model.quantise(features)
        image = model.decode(quantised.features)[:, :, ::8, ::8]
    assert error_of(case, "f", features) < case["tolerance"]
    assert error_of(case, "fhat", quantised.features) < case["tolerance"]
    assert error_of(case, "tokens", quantised.tokens) == 0

    # Some cases also store what the transformer reads, and the image.
    if "inputs" in case["outputs"]:
        assert error_of(case, "inputs", quantised.inputs) < case["tolerance"]
        assert error_of(case, "image_every_8th_pixel", image) < case["image_tolerance"]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_logits_are_those_of_the_authors_code(name: str):
    case = CASES[name]
    model = build_like_authors(case)
    state = model.state_dict()
    assert (len(state), digest_shapes(state)) == (case["entries"], case["digest"])
    assert sum(p.numel() for p in model.parameters()) == case["params"]

    other = CASES[case["tokenizer"]]
    with torch.no_grad():
        coder = build_like_authors(other)
        quantised = coder.quantise(coder.encode(images_of(other)))
        logits = model(torch.tensor(case["y_teacher"]), quantised.inputs)
    assert error_of(case, "logits", logits) < case["tolerance"]


# ---- What every network of the kind must do


@every_network
def test_logits_are_a_function_of_each_image(options: dict[str, Any]):
    """Shape, determinism, independence of the batch, and float32 accuracy."""
    model = randomise(network(**options))
    exact = network(**options).double()
    exact.load_state_dict(model.state_dict())
    y, x = inputs()
    with torch.no_grad():
        logits = model(y, x)
        truth = exact(y, x.double())
        assert logits.shape == (3, 14, model.vocabulary)
        assert truth.dtype == torch.float64
        assert torch.equal(logits, model(y, x))
        assert torch.equal(logits, model.eval()(y, x))
        assert relative_rms(logits, truth) < 1e-5

        # Every image alone, and an image under another label.
        for i in range(3):
            alone = model(y[i : i + 1], x[i : i + 1])
            assert relative_rms(alone[0], logits[i]) < 1e-5
        assert relative_rms(model(y.flip(0), x)[0], logits[0]) > 1e-3


@every_network
def test_a_scale_sees_itself_and_coarser_scales_alone(options: dict[str, Any]):
    model = randomise(network(**options))
    y, x = inputs()
    changed = x.clone()
    changed[:, 4] += 1  # the first token of the last scale
    with torch.no_grad():
        logits, other = model(y, x), model(y, changed)
    assert torch.equal(logits[:, :5], other[:, :5])
    assert (logits[:, 5:] != other[:, 5:]).any(-1).all()


@every_network
def test_steps_with_a_cache_give_the_logits_of_one_pass(options: dict[str, Any]):
    """Scale by scale, and several scales at once, as CoDe's second network begins."""
    model = randomise(network(**options)).double()
    y, x = inputs()
    x = x.double()
    with torch.no_grad():
        expected = model(y, x)
        for calls in ([(0, 1), (1, 5), (5, 14)], [(0, 5), (5, 14)], [(0, 14)]):
            cache, logits = model.new_cache(), []
            for first, last in calls:
                tokens = model.embed(y, x[:, max(first - 1, 0) : last - 1], first)
                logits.append(model.step(tokens, y, cache))
            assert cache.num_tokens == 14
            torch.testing.assert_close(torch.cat(logits, dim=1), expected)


def test_rows_of_null_labels_share_the_inputs():
    model = randomise(network())
    y, x = inputs()
    labels = torch.cat([y, torch.full_like(y, CLASSES)])
    with torch.no_grad():
        both = model.step(model.embed(labels, x), labels)
        null = model(labels[3:], x)
    torch.testing.assert_close(both[:3], model(y, x))
    torch.testing.assert_close(both[3:], null)


@every_network
def test_gradients_reach_every_parameter(options: dict[str, Any]):
    model = randomise(network(**options)).double()
    y, x = inputs()
    logits = model(y, x.double())
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).double())
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.norm() > 1e-6 * p.norm(), key

    # The null label is a row like every other one.
    rows = model.class_emb.weight.grad.any(dim=1)
    assert rows.tolist() == [index in (0, 3, CLASSES) for index in range(CLASSES + 1)]


@every_network
def test_is_built_and_run_on_the_meta_device(options: dict[str, Any]):
    with torch.device("meta"):
        model = network(**options)
    y, x = (part.to("meta") for part in inputs())
    assert model(y, x).shape == (3, 14, model.vocabulary)


@pytest.mark.parametrize("shared", [False, True])
def test_starts_as_published(shared: bool):
    """Normal weights, gates near zero but not at it, and smaller ends of branches."""
    torch.manual_seed(0)
    model = network(dim=96, heads=3, depth=2, shared_adaln=shared, gate_init=1e-2)
    std = (3 * 96) ** -0.5

    # Two of six modulations are gates.
    if shared:
        gates, others = model.blocks[0].ada_gss[0, 0].split([2, 4])
        whole = 96**-0.5
    else:
        gates, others = model.blocks[0].ada_lin[1].weight.split([2 * 96, 4 * 96])
        whole = std

    # Deviations of what is drawn, and constants.
    expected = {
        model.pos_1LC: std,
        model.class_emb.weight: std,
        model.blocks[1].attn.mat_qkv.weight: std,
        model.blocks[1].ffn.fc2.weight: std / 2,
        model.head.weight: 0.02 * std,
        model.head_nm.ada_lin[1].weight: 0.5 * std,
        gates: 0.01 * whole,
        others: 0.5 * whole,
    }
    for value, size in expected.items():
        assert value.std().item() == pytest.approx(size, rel=0.1)
    assert model.blocks[0].attn.scale_mul_1H11.exp().allclose(torch.tensor(4.0))
    assert not model.head.bias.any()


# ---- The tokenizer


def test_ten_scales_share_four_convolutions_as_published():
    """Two scales lie between two convolutions, where another rounding takes the other one."""
    assert assign_phis(10, 4) == PHIS_OF_TEN == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    shared = [assign_phis(scales, 4) for scales in (3, 4, 5)]
    assert shared == [(0, 2, 3), (0, 1, 2, 3), (0, 1, 2, 2, 3)]


def test_tokens_alone_give_a_networks_inputs_and_the_features():
    model = randomise(tokenizer())
    with torch.no_grad():
        quantised = model.quantise(torch.randn(2, 6, 3, 3))
        parts = quantised.tokens.split(model.lengths, dim=1)
        total = sum(model.contribution(scale, part) for scale, part in enumerate(parts))
    assert torch.equal(model.inputs(quantised.tokens), quantised.inputs)
    torch.testing.assert_close(total, quantised.features)


def test_each_scale_codes_what_coarser_ones_leave():
    """With exact codes and no convolution, one scale after the other would reach the features."""
    model = randomise(tokenizer(vocabulary=9))
    codes = model.quantize.embedding.weight
    with torch.no_grad():
        for phi in model.quantize.quant_resi.qresi_ls:
            nn.init.dirac_(phi.weight)
            nn.init.zeros_(phi.bias)

        # Two coarse scales take the nearest codes of what is left.
        rest = torch.randn(1, 6, 3, 3)
        for scale in (0, 1):
            coarse = nn.functional.adaptive_avg_pool2d(rest, model.sides[scale])
            pixels = coarse.permute(0, 2, 3, 1).reshape(-1, 6)
            index = torch.cdist(pixels, codes).argmin(dim=1)
            rest = rest - model.contribution(scale, index[None])

        # The last scale finds exact codes.
        pixels = rest.permute(0, 2, 3, 1).reshape(9, 6)
        codes.copy_(pixels)
        index = model.quantize.nearest(pixels)
    assert index.tolist() == list(range(9))


def test_training_the_tokenizer_reaches_every_parameter():
    model = randomise(tokenizer())
    images = torch.randn(2, 3, 6, 6)
    out, loss = model(images)
    assert out.shape == images.shape and loss.shape == ()
    ((out - images).square().mean() + loss).backward()
    unused = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == [
        "quantize.quant_resi.qresi_ls.1.weight",
        "quantize.quant_resi.qresi_ls.1.bias",
    ]

    # Gradients pass the quantisation, and the codes learn from the loss of the quantisation alone.
    model.zero_grad()
    model(images)[0].square().mean().backward()
    assert model.encoder.conv_in.weight.grad.any()
    assert model.quantize.embedding.weight.grad is None


# ---- Checkpoints and refusals


def test_a_published_file_loads_with_its_infinite_mask(tmp_path: Path):
    """The authors keep the mask among the weights; only their own infinities pass."""
    stored = randomise(network(), seed=3).state_dict()
    torch.save(stored, tmp_path / "var.pth")
    model = network()
    load_published(model, tmp_path / "var.pth")
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())

    stored["attn_bias_for_masking"] = stored["attn_bias_for_masking"].mT.contiguous()
    torch.save(stored, tmp_path / "var.pth")
    with pytest.raises(ValueError, match="not finite.*attn_bias_for_masking"):
        load_published(model, tmp_path / "var.pth")


def test_a_tokenizer_of_another_vocabulary_is_refused_in_a_line(tmp_path: Path):
    torch.save(tokenizer(vocabulary=48).state_dict(), tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=r"embedding.weight is \(48, 6\), needs \(40, 6\)") as line:
        load_published(tokenizer(), tmp_path / "vae.pth")
    assert "\n" not in str(line.value)


@pytest.mark.parametrize("build", [network, tokenizer])
@pytest.mark.parametrize("sides", [(), (2, 3), (1, 3, 3)])
def test_impossible_sides_are_refused(build: Any, sides: tuple[int, ...]):
    with pytest.raises(ValueError, match="sides that begin with 1 and rise"):
        build(sides=sides)


def test_other_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="dim 24, heads 5"):
        network(heads=5)
    with pytest.raises(ValueError, match="divide by 32, got 24"):
        tokenizer(ch=24)
    with pytest.raises(ValueError, match=r"takes inputs of \(3, 13, 6\).*got \(3, 4, 6\)"):
        network()(torch.zeros(3, dtype=torch.long), torch.zeros(3, 4, 6))
    with pytest.raises(ValueError, match="images of 6x6, got 8x8"):
        tokenizer().encode(torch.zeros(1, 3, 8, 8))
