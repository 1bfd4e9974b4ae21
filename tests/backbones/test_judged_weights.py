"""Weights that are not what their file's name says: each is refused in one line, or said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones.checkpoint import load_published, read_weights

Weights = dict[str, Tensor]


def network(seed: int) -> nn.Module:
    """Two layers with a bias that begins as zeros, as a network's modulations do."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    nn.init.zeros_(model[1].bias)
    return model


def trained() -> Weights:
    return {name: torch.randn_like(value) for name, value in network(1).state_dict().items()}


def load(content: Any, folder: Path) -> tuple[nn.Module, list[str]]:
    """Load what a file holds; return the network and all that was said."""
    torch.save(content, folder / "file.pt")
    said: list[str] = []
    model = network(2)
    load_published(model, folder / "file.pt", warn=said.append)
    return model, said


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize(
    "wrap, removed",
    [
        (prefixed(""), []),
        (prefixed("module."), ["module."]),
        (prefixed("_orig_mod."), ["_orig_mod."]),
        (prefixed("_orig_mod.module."), ["_orig_mod.", "module."]),
        (prefixed("module._orig_mod.module."), ["_orig_mod.", "module.", "module."]),
        (prefixed("_fsdp_wrapped_module."), ["_fsdp_wrapped_module."]),
        (
            lambda w: {name.replace(".", "._orig_mod."): value for name, value in w.items()},
            ["_orig_mod."],
        ),
        (
            lambda w: prefixed("module.")(w) | {"n_averaged": torch.tensor(9)},
            ["n_averaged", "module."],
        ),
        (
            lambda w: prefixed("_orig_mod.")(
                prefixed("module.")(w) | {"n_averaged": torch.ones(1)}
            ),
            ["_orig_mod.", "n_averaged", "module."],
        ),
    ],
)
def test_what_wrapped_the_names_is_removed_with_a_word(
    wrap: Callable[[Weights], Weights], removed: list[str], tmp_path: Path
):
    weights = trained()
    model, said = load({"ema": wrap(weights)}, tmp_path)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    expected = "file.pt: removed from the names of the weights what wrapped the network: "
    assert said == ([expected + ", ".join(removed)] if removed else [])


@pytest.mark.parametrize(
    "dtype, word",
    [
        (torch.float32, ""),
        (torch.float64, ""),
        (torch.bfloat16, "bf16"),
        (torch.float16, "fp16"),
        (torch.float8_e4m3fn, "fp8 (e4m3fn)"),
        (torch.float8_e5m2, "fp8 (e5m2)"),
    ],
)
def test_rounded_weights_are_loaded_with_a_word(dtype: torch.dtype, word: str, tmp_path: Path):
    stored = {name: value.to(dtype) for name, value in trained().items()}
    model, said = load(stored, tmp_path)
    state = model.state_dict()
    assert all(torch.equal(state[name], value.float()) for name, value in stored.items())
    assert [f"4 of 4 tensors are stored in {word}:" in text for text in said] == [True] * bool(word)


def change(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: value(weights[name])}


@pytest.mark.parametrize(
    "spoil, words",
    [
        (change("0.weight", lambda v: v.to(torch.int8)), "0.weight is stored as int8"),
        (change("1.bias", lambda v: v > 0), "1.bias is stored as bool"),
        (change("0.bias", lambda v: v * 1j), "0.bias is stored as complex64"),
        (change("0.weight", lambda v: v.to("meta")), "0.weight is a meta tensor"),
        (change("0.weight", lambda v: v.to_sparse()), "0.weight is sparse"),
        (change("1.weight", lambda v: v / 0), "1 of 4 tensors are not finite"),
        (change("0.bias", lambda v: v * torch.nan), "1 of 4 tensors are not finite"),
        (change("0.weight", lambda v: (v * 1e6).half()), "0.weight"),
        (lambda w: {name: value * 0 for name, value in w.items()}, "matrices are zero"),
        (
            lambda w: {name: value * (value.dim() < 2) for name, value in w.items()},
            "matrices are zero",
        ),
        (
            lambda w: prefixed("module.")(w) | {"n_averaged": torch.tensor(0)},
            "never updated (n_averaged is 0)",
        ),
        (lambda w: w | {"module.0.bias": w["0.bias"]}, "another model"),
    ],
)
def test_weights_that_no_training_left_are_refused_in_a_line(
    spoil: Callable[[Weights], Weights], words: str, tmp_path: Path
):
    with pytest.raises(ValueError) as refusal:
        load({"ema": spoil(trained())}, tmp_path)
    message = str(refusal.value)
    assert words in message and message.startswith("file.pt") and "\n" not in message


def test_an_average_that_kept_its_first_constants_is_refused(tmp_path: Path):
    torch.save({"model": trained(), "ema": network(1).state_dict()}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="never updated: 1 of its tensors are constant.*1.bias"):
        read_weights(tmp_path / "file.pt")
    assert read_weights(tmp_path / "file.pt", "model")[1] == "model"


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind, name", [(Path, "pathlib"), (slice, "slice")])
def test_what_is_not_unpickled_is_named(kind: type, name: str, protocol: int, tmp_path: Path):
    held = {"ema": trained(), "args": kind("x")}
    torch.save(held, tmp_path / "file.pt", pickle_protocol=protocol)
    with pytest.raises(ValueError) as refusal:
        read_weights(tmp_path / "file.pt")
    assert any(word in str(refusal.value) for word in (name, "instruction"))
