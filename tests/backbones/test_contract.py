"""What every backbone must do; registering a network is enough to have it tested.

The cases are all registered names, small, and all declared rows of the ablations, small. Where a
family departs from the contract, it says so and why in `Exceptions` at `register(...)`; a departure
that is declared and does not exist fails as well.
"""

from fnmatch import fnmatch

import pytest
import torch
from torch import nn

import backbones
from backbones.captions import TextNetwork
from tests.support.marks import slow_after_first
from tests.support.networks import CASES, CLASSES, FAMILIES, Case, randomise, relative_rms

# The first case of each family is fast.
LABELS = {id(case): label for label, case in CASES.items()}
every_case = pytest.mark.parametrize(
    "case",
    slow_after_first(CASES.values(), lambda case: case.family, lambda case: LABELS[id(case)]),
)
every_family = pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES)


def out_channels(case: Case) -> int:
    """Return the channels of the output: the image's, twice if it holds the variance."""
    learns = case.all_options.get("learn_sigma", False) and not case.exceptions.drops_variance
    return case.image_channels * (2 if learns else 1)


def modes(model: nn.Module, case: Case) -> list[nn.Module]:
    """Return the network in training mode, and a second time in eval mode if that differs."""
    if not case.exceptions.fuses:
        return [model.train()]
    other = case.build()
    other.load_state_dict(model.state_dict())
    return [model.train(), other.eval()]


def test_every_registered_name_is_a_case():
    covered = {name for case in CASES.values() for name in case.names}
    assert covered == set(backbones.list_backbones())


@every_case
def test_starts_the_same_from_a_seed_and_predicts_zero(case: Case):
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(case.build())
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)

    with torch.no_grad():
        out = models[0](*case.inputs())
    assert out.isfinite().all()
    assert bool(out.any()) == bool(case.exceptions.open_head)


@every_case
def test_is_built_and_run_on_the_meta_device(case: Case):
    with torch.device("meta"):
        meta = case.build().to("meta")
    shapes = {key: value.shape for key, value in case.build().state_dict().items()}
    assert {key: value.shape for key, value in meta.state_dict().items()} == shapes

    inputs = [part.to("meta") for part in case.inputs()]
    with torch.no_grad():
        for model in (meta.train(), meta.eval()):
            assert model(*inputs).shape == (3, out_channels(case), case.size, case.size)


@every_case
def test_output_is_a_function_of_each_sample(case: Case):
    """Shape, determinism, independence of the batch and of the mode, and float32 accuracy."""
    model = randomise(case.build())
    declared = (case.size, case.options["in_channels"], CLASSES, out_channels(case))
    actual = (model.input_size, model.in_channels, model.num_classes, model.out_channels)
    assert declared == actual

    # The truth is the same network in float64.
    x, t, y = case.inputs()
    with torch.no_grad():
        exact = case.build().double()
        exact.load_state_dict(model.state_dict())
        exact_out = exact(x.double(), t, y)
        assert exact_out.dtype == torch.float64

        # A batch, the same batch again, and every sample alone.
        for mode in modes(model, case):
            out = mode(x, t, y)
            assert out.shape == (3, out_channels(case), case.size, case.size)
            assert torch.equal(out, mode(x, t, y))
            assert relative_rms(out, exact_out) <= 1e-5
            for i in range(3):
                alone = mode(x[i : i + 1], t[i : i + 1], y[i : i + 1])
                assert relative_rms(alone[0], out[i]) <= 1e-5
        if not case.exceptions.fuses:
            assert torch.equal(out, model.eval()(x, t, y))


@every_case
def test_output_depends_on_image_time_and_label(case: Case):
    model = randomise(case.build())
    x, t, y = case.inputs()
    with torch.no_grad():
        out = model(x, t, y)[0]
        for other in ((x.flip(0), t, y), (x, t.flip(0), y), (x, t, y.flip(0))):
            assert relative_rms(model(*other)[0], out) > 1e-3


@every_case
def test_gradients_reach_every_parameter(case: Case):
    """In float64, so that a gradient of zero is told apart from one that rounding makes."""
    frozen = case.exceptions.frozen
    unreached = case.exceptions.unreached
    for model in modes(randomise(case.build()), case):
        model.double()
        x, t, y = case.inputs()
        x = x.double().requires_grad_()
        out = model(x, t, y)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).double())

        # Exceptions are declared, and must be true.
        for key, p in [("x", x), *model.named_parameters()]:
            if matches(key, frozen):
                assert not p.requires_grad, f"{key} is declared frozen and is trained"
                assert p.grad is None, key
                continue
            if matches(key, unreached):
                reached = p.grad is not None and p.grad.any()
                assert not reached, f"{key} is declared unreached and has a gradient"
                continue

            # Every other parameter has a gradient of its own size.
            assert p.grad is not None, f"{key} has no gradient"
            assert p.grad.isfinite().all(), key
            assert p.grad.norm() > 1e-6 * p.norm(), f"no gradient reaches {key}"


def matches(key: str, patterns: dict[str, str]) -> bool:
    return any(fnmatch(key, pattern) for pattern in patterns)


@every_case
def test_the_null_label_is_an_ordinary_condition(case: Case):
    """It has a row of its own, which other samples neither change nor are changed by."""
    options = {"null_label": True} if "null_label" in case.all_options else {}
    model = randomise(case.build(**options))
    x, t, y = case.inputs(**options)
    assert y[2] == CLASSES

    out = model(x, t, y)
    with torch.no_grad():
        labelled = model(x, t, torch.tensor([0, 3, 4]))
    assert relative_rms(labelled[:2], out[:2]) <= 1e-5
    assert relative_rms(labelled[2], out[2]) > 1e-3

    # A table of captions is not trained. Of other tables, the sample with the null label trains the
    # last row and no other.
    if isinstance(model, TextNetwork):
        return
    out[2].square().sum().backward()
    tables = [layer for layer in model.modules() if isinstance(layer, nn.Embedding)]
    assert tables, "no label table found"
    for table in tables:
        assert table.weight.grad[CLASSES].any() and not table.weight.grad[:CLASSES].any()


@every_family
def test_a_network_without_a_null_label_refuses_it(case: Case):
    if not case.exceptions.no_null_label:
        assert case.has_null_label
        return
    x, t, _ = case.inputs()
    with pytest.raises(IndexError):
        case.build(null_label=False)(x, t, torch.full((3,), CLASSES))


@every_case
def test_another_input_size_is_taken_or_refused_in_a_line(case: Case):
    model, other = case.build(), case.size + 2
    x, t, y = case.inputs()
    channels = x.shape[1]
    with pytest.raises(ValueError, match=f"{other}x{other}") as refusal:
        model(torch.zeros(3, channels, other, other), t, y)
    assert "\n" not in str(refusal.value)

    # A U-shape takes multiples and other proportions; a network with positions refuses them.
    size = (case.size, 2 * case.size)
    try:
        assert model(torch.zeros(3, channels, *size), t, y).shape == (3, out_channels(case), *size)
    except ValueError as error:
        assert "\n" not in str(error) and "input size" in str(error).replace("_", " ")


@every_family
def test_learn_sigma_sets_the_width_of_the_output(case: Case):
    if "learn_sigma" not in case.all_options:
        assert out_channels(case) == case.image_channels
        return
    x, t, y = case.inputs()
    for learn_sigma in (False, True):
        model = case.build(learn_sigma=learn_sigma)
        wide = learn_sigma and not case.exceptions.drops_variance
        channels = case.image_channels * (2 if wide else 1)
        assert model.out_channels == model(x, t, y).shape[1] == channels


@every_family
def test_declared_exceptions_exist(case: Case):
    """Every pattern names a parameter of some network of the family, and every reason is words."""
    family = type(case.build())
    names: set[str] = set()
    for other in CASES.values():
        if backbones.exceptions_of(other.name) is case.exceptions:
            names |= {key for key, _ in other.build().named_parameters()}
    for patterns in (case.exceptions.frozen, case.exceptions.unreached):
        for pattern, reason in patterns.items():
            assert any(fnmatch(key, pattern) for key in names), f"{family.__name__}: {pattern}"
            assert len(reason.split()) > 3
