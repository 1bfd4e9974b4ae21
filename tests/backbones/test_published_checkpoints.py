"""Reading published checkpoints: every form in which they come, and every way to be wrong."""

import pickle
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import backbones
from backbones.checkpoint import FLAT, load_published, read_weights
from tests.support.networks import randomise

Weights = dict[str, Tensor]


def tiny(name: str, seed: int) -> nn.Module:
    options = backbones.tiny_options_of(name)
    return randomise(backbones.build(name, **options, input_size=8, num_classes=7), seed)


def trained(weights: Weights) -> dict[str, Any]:
    """Return what the authors' training scripts save; the EMA is the one to load."""
    return {
        "model": {name: torch.zeros_like(value) for name, value in weights.items()},
        "ema": weights,
        "opt": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
    }


def save_trained(weights: Weights, path: Path) -> None:
    torch.save(trained(weights), path)


def save_legacy(weights: Weights, path: Path) -> None:
    torch.save(trained(weights), path, _use_new_zipfile_serialization=False)


def save_with_arguments(weights: Weights, path: Path) -> None:
    arguments = Namespace(model="DiCo-S", global_seed=0)
    torch.save(trained(weights) | {"args": arguments}, path)


def same(model: nn.Module, weights: Weights) -> bool:
    """Return whether a model has exactly these weights."""
    state = model.state_dict()
    if state.keys() != weights.keys():
        return False
    return all(torch.equal(state[name], weights[name]) for name in state)


def refused(action: Callable[[], object]) -> str:
    """Return the one line of the ValueError that an action ends with."""
    with pytest.raises(ValueError) as refusal:
        action()
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("name", ["dico_s", "dit_s_2"])
@pytest.mark.parametrize(
    "file, write",
    [
        ("flat.pt", torch.save),
        ("ema.pt", save_trained),
        ("flat.safetensors", save_file),
        ("legacy.pt", save_legacy),
        ("with_args.pt", save_with_arguments),
    ],
)
def test_round_trip(tmp_path: Path, name: str, file: str, write: Callable[[Weights, Path], None]):
    """Weights of every form are loaded, and their place in the file is returned."""
    weights = tiny(name, seed=1).state_dict()
    model = tiny(name, seed=2)
    write({key: value.clone() for key, value in weights.items()}, tmp_path / file)
    assert not same(model, weights)
    expected = FLAT if file.startswith("flat") else "ema"
    assert load_published(model, tmp_path / file) == expected
    assert same(model, weights)


def test_a_file_that_names_its_trainer_s_callback_is_read_without_that_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """LDM's files hold a class of PyTorch Lightning as a key beside the weights."""
    # Pretend that the library is installed while the file is written.
    module = "pytorch_lightning.callbacks.model_checkpoint"
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    callback = type("ModelCheckpoint", (), {"__module__": module})
    monkeypatch.setattr(sys.modules[module], "ModelCheckpoint", callback, raising=False)
    weights = tiny("dico_s", seed=1).state_dict()
    callbacks = {callback: {"best_model_path": "a.ckpt"}}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": weights, "epoch": 1, "callbacks": callbacks}, path)
    monkeypatch.undo()

    # Read it without the library.
    read, key = read_weights(path)
    assert key == "state_dict"
    assert all(torch.equal(read[name], value) for name, value in weights.items())


def test_another_key_can_be_read(tmp_path: Path):
    """The weights under the key that is asked for are read, and not the EMA."""
    weights = tiny("dico_s", seed=1).state_dict()
    torch.save(trained(weights), tmp_path / "run.pt")
    read, key = read_weights(tmp_path / "run.pt", key="model")
    assert key == "model"
    assert not any(value.any() for value in read.values())


def test_a_key_that_is_asked_for_is_not_replaced_by_another(tmp_path: Path):
    """A file without weights under the key is refused, and its keys are listed."""
    weights = tiny("dico_s", seed=1).state_dict()
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "other.pt")
    assert read_weights(tmp_path / "other.pt")[1] == "state_dict"
    for key in ("ema", "epoch"):
        load = partial(load_published, tiny("dico_s", seed=2), tmp_path / "other.pt", key)
        expected = f"other.pt: holds no weights under {key!r}; its keys: state_dict, epoch"
        assert refused(load) == expected

    # Weights without any key around them.
    torch.save(weights, tmp_path / "flat.pt")
    refusal = refused(lambda: read_weights(tmp_path / "flat.pt", "ema"))
    assert "holds no weights under 'ema'; its keys: x_embedder.proj.weight" in refusal


def test_a_wrong_model_is_named_key_by_key_and_nothing_is_loaded(tmp_path: Path):
    """A refusal lists missing, unexpected and misshapen weights, and the model stays as it was."""
    model = tiny("dico_s", seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    # One weight of another name, and one of another shape.
    weights = tiny("dico_s", seed=2).state_dict()
    weights["stem.weight"] = weights.pop("x_embedder.proj.weight")
    weights["latent.0.conv1.bias"] = torch.zeros(5)
    torch.save(weights, tmp_path / "almost.pt")
    refusal = refused(lambda: load_published(model, tmp_path / "almost.pt"))
    assert "almost.pt" in refusal
    assert "3 keys" in refusal
    assert "missing x_embedder.proj.weight" in refusal
    assert "unexpected stem.weight" in refusal
    assert "latent.0.conv1.bias is (5,), needs (48,)" in refusal

    # Another network: the list is cut after six names of a kind.
    torch.save(tiny("dit_s_2", seed=2).state_dict(), tmp_path / "dit.pt")
    refusal = refused(lambda: load_published(model, tmp_path / "dit.pt"))
    assert "missing x_embedder.proj.weight" in refusal or "x_embedder.proj.weight is" in refusal
    assert "unexpected pos_embed" in refusal
    assert refusal.count("missing ") == refusal.count("unexpected ") == 6
    assert " more" in refusal
    assert len(refusal) < 1500
    assert same(model, before)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
@pytest.mark.parametrize("file, write", [("cut.pt", torch.save), ("cut.safetensors", save_file)])
def test_truncated(tmp_path: Path, file: str, write: Callable[[Weights, Path], None], keep: float):
    """A file that was cut, to so many bytes or to a share of them, is refused by its name."""
    path = tmp_path / file
    write({"weight": torch.randn(50, 40)}, path)
    data = path.read_bytes()
    num_bytes = keep if isinstance(keep, int) else int(keep * len(data))
    path.write_bytes(data[:num_bytes])
    refusal = refused(lambda: read_weights(path))
    assert file in refusal
    assert "pickled" not in refusal


@pytest.mark.parametrize(
    "content, found",
    [
        ([torch.zeros(3)], "list"),
        (torch.zeros(3), "Tensor"),
        ({}, "tensors by name"),
        ({"ema": {}}, "tensors by name"),
        ({"ema": {"weight": 3}}, "weight"),
        ({"model": {"weight": torch.zeros(3)}, "step": 7}, "model, step"),
        ("weights", "str"),
    ],
)
def test_not_tensors_by_name(tmp_path: Path, content: Any, found: str):
    torch.save(content, tmp_path / "other.pt")
    assert found in refused(lambda: read_weights(tmp_path / "other.pt"))


class Touch:
    """Creates a file when it is unpickled by a reader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("file", ["code.pt", "legacy.pt", "raw.pt", "code.safetensors"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda touch: touch,
        lambda touch: {"ema": touch},
        lambda touch: {"ema": {"w": torch.zeros(3)}, "args": touch},
    ],
    ids=["whole", "ema", "beside"],
)
def test_pickled_code_is_not_run(tmp_path: Path, file: str, wrap: Callable[[Touch], Any]):
    """Wherever a file holds code, reading it runs none."""
    marker = tmp_path / "marker"
    content = wrap(Touch(marker))
    if file == "raw.pt":
        (tmp_path / file).write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, tmp_path / file, _use_new_zipfile_serialization=file != "legacy.pt")
    refusal = refused(lambda: read_weights(tmp_path / file))
    assert not marker.exists()
    assert "pickled code" in refusal or file.endswith(".safetensors")

    # A reader that runs code would have made the marker.
    beside = isinstance(content, dict) and "args" in content
    pickle.loads(pickle.dumps(content["args"] if beside else content))
    assert marker.exists()


@pytest.mark.parametrize(
    "text",
    ["version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "<!DOCTYPE html>\n<html>\n"],
    ids=["git-lfs", "html"],
)
@pytest.mark.parametrize("file", ["pointer.pt", "pointer.safetensors"])
def test_text_is_no_checkpoint_and_no_pickled_code(tmp_path: Path, file: str, text: str):
    """A text in place of a checkpoint is not taken for code."""
    (tmp_path / file).write_text(text)
    refusal = refused(lambda: read_weights(tmp_path / file))
    assert file in refusal
    assert "pickled" not in refusal


def test_missing(tmp_path: Path):
    """A path that leads to no file is refused with the reason."""
    assert "no such checkpoint" in refused(lambda: read_weights(tmp_path / "none.pt"))
    assert "is a folder, and no checkpoint" in refused(lambda: read_weights(tmp_path))
    (tmp_path / "link.pt").symlink_to(tmp_path / "lost.pt")
    assert "its link leads to" in refused(lambda: read_weights(tmp_path / "link.pt"))
    (tmp_path / "file.pt").write_text("")
    refusal = refused(lambda: read_weights(tmp_path / "file.pt" / "a.pt"))
    assert refusal == f"{tmp_path}/file.pt/a.pt: cannot be opened: Not a directory"
    assert "File name too long" in refused(lambda: read_weights(tmp_path / ("x" * 300)))
