"""DiT in the form of the diffusers library: both directions, against the library itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import backbones
from backbones.diffusers_format import WARNING, from_diffusers, to_diffusers, write_pipeline
from backbones.dit import DiT
from experiments import checkpoint
from tests.support.networks import randomise

diffusers = pytest.importorskip("diffusers")
SIZE = dict(input_size=6, in_channels=3, num_classes=7, dim=24, depth=2, heads=3)
TRAINED_THERE = dict(time_divisor=127, mlp_norm_eps=1e-5)


def network(**options: Any) -> DiT:
    torch.manual_seed(0)
    model = randomise(backbones.build("dit_s_2", **SIZE | options)).eval()
    assert isinstance(model, DiT)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y; the last label is the null label."""
    x = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([3, 450, 999]), torch.tensor([0, 3, 7])


def run_there(folder: Path) -> Tensor:
    """The output of the library's own network, with the weights of a folder."""
    model = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    x, t, y = inputs()
    with torch.no_grad():
        return model(x, timestep=t, class_labels=y).sample


@torch.no_grad()
def test_a_folder_of_the_library_runs_as_it_does_there(tmp_path: Path):
    torch.manual_seed(3)
    config = to_diffusers(network(**TRAINED_THERE))[1]
    theirs = diffusers.DiTTransformer2DModel.from_config(config)
    for p in theirs.parameters():
        p.copy_(0.2 * torch.randn_like(p))

    # Its blocks share what embeds time and label, as every converted network does.
    for block in theirs.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.save_pretrained(tmp_path / "transformer")

    model, weights = from_diffusers(tmp_path)
    model.load_state_dict(weights, strict=True)
    assert (model.time_divisor, model.mlp_norm_eps) == (127, 1e-5)
    torch.testing.assert_close(model.eval()(*inputs()), run_there(tmp_path), rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_export_comes_back_with_its_bits_and_numerics(tmp_path: Path):
    for name, options in (("ours", {}), ("theirs", TRAINED_THERE)):
        model = network(**options)
        warnings = write_pipeline(model, tmp_path / name)
        assert warnings == ([] if options else [WARNING])

        again, weights = from_diffusers(tmp_path / name)
        again.load_state_dict(weights, strict=True)
        assert torch.equal(again.eval()(*inputs()), model(*inputs()))

        # The library agrees with the network that was trained there, and not with the authors'.
        difference = (run_there(tmp_path / name) - model(*inputs())).abs().max().item()
        assert difference < 1e-5 if options else difference > 1e-3


@pytest.mark.slow
def test_the_librarys_pipeline_samples_an_export(tmp_path: Path):
    write_pipeline(network(in_channels=4, **TRAINED_THERE), tmp_path / "pipeline")
    vae = diffusers.AutoencoderKL(latent_channels=4, norm_num_groups=8, block_out_channels=(16,))
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "pipeline", vae=vae)
    pipeline.set_progress_bar_config(disable=True)

    # Its null label is 1000, whatever the network's; without guidance it is not used.
    images = pipeline([3, 5], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 6, 6, 3)


def change(folder: Path, **config: Any) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_other_folders_are_refused_in_a_line(tmp_path: Path):
    write_pipeline(network(), tmp_path / "dit")
    path = tmp_path / "dit" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)

    # A block whose embedder differs was trained apart.
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    save_file(weights | {name: weights[name] + 1}, path)
    with pytest.raises(ValueError, match="linear_1.bias differs from block 0's"):
        from_diffusers(tmp_path / "dit")
    save_file({key: value for key, value in weights.items() if key != name}, path)
    with pytest.raises(ValueError, match="this is no DiT of the diffusers library"):
        from_diffusers(tmp_path / "dit")

    change(tmp_path / "dit", _class_name="UNet2DModel")
    with pytest.raises(ValueError, match="is not that of a DiT"):
        from_diffusers(tmp_path / "dit")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["checkpoint.py", *arguments])
    return checkpoint.main()


@torch.no_grad()
def test_the_command_exports_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """From a file to a folder and back, the weights keep their bits."""
    first, folder, last = (tmp_path / name for name in ("a.safetensors", "b", "c.safetensors"))
    save_file({key: value.clone() for key, value in network().state_dict().items()}, first)
    options = [f"--option={key}={value}" for key, value in SIZE.items()]
    export = ["export", "dit_s_2"]
    assert (
        call(monkeypatch, *export, str(first), "--out", str(folder), "--diffusers", *options) == 0
    )
    assert WARNING in capsys.readouterr().err
    assert call(monkeypatch, *export, str(folder), "--out", str(last), *options) == 0
    before, after = load_file(first), load_file(last)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    # What is there is kept, and a network without such a form is refused.
    assert call(monkeypatch, *export, str(first), "--out", str(last), *options) == 2
    assert "is there; name another --out" in capsys.readouterr().err
    assert list(tmp_path.glob(".*")) == []
